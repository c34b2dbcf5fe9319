"""Load a policy (causal language model) or a classifier with its tokenizer, checked and without dropout.

Nothing is executed from a model's directory unless asked: weights are safetensors, or pickles read as tensors only.
"""

import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.utils import logging as hf_logging

from ..data.tokens import REWARD_PAD
from ..errors import InputError
from . import packed
from .hub import base_of, is_adapter, resolve

__all__ = ["context_length", "load_classifier", "load_policy", "load_reward_start", "load_tokenizer", "resolve"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "spm.model",
                    "sentencepiece.bpe.model", "tiktoken.model", "tekken.json", "tokenizer_config.json")  # fmt: skip
# Architectures that load as a causal model without complaint (the head is tied) and are none.
_NOT_CAUSAL = ("ForSequenceClassification", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")


def load_policy(
    path: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
):
    """(model, tokenizer) of a causal language model: eval mode, every dropout 0, a pad token set.

    The pad token is the EOS where the tokenizer has none; embeddings are never resized. On the device `meta` it has
    shapes and no numbers: for a rank that is given its share of them.
    Raises InputError: no such model, unreadable or missing weights, a model of another kind, no tokenizer,
    a tokenizer with ids that the model has no embedding for.
    """
    folder = resolve(path, revision, with_code=trust_remote_code)
    if is_adapter(folder) and device == "meta":  # merged, it has the shape of its base
        base = resolve(base_of(folder), with_code=trust_remote_code)
        model = _load_model(AutoModelForCausalLM, path, base, dtype, trust_remote_code, empty=True)
        own = folder if _has_tokenizer(folder) else base
        tokenizer = load_tokenizer(path, folder=own, trust_remote_code=trust_remote_code)
    elif is_adapter(folder):
        from .adapter import load_merged

        with quiet():
            model, tokenizer = load_merged(folder, base_of(folder), None, trust_remote_code)
        model = model.to(dtype)
    else:
        model = _load_model(AutoModelForCausalLM, path, folder, dtype, trust_remote_code, empty=device == "meta")
        tokenizer = load_tokenizer(path, folder=folder, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{path}: its tokenizer has no end-of-sequence token", "set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    _check_fit(path, model, tokenizer)
    return model.to(device), tokenizer


def load_classifier(
    path: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
):
    """(model, tokenizer) of a sequence classifier or reward model: eval mode, dropout 0, the model's pad id set.

    Raises InputError as `load_policy` does; also where the classification head is not among the weights.
    """
    folder = resolve(path, revision, with_code=trust_remote_code)
    if is_adapter(folder):
        from .adapter import load_merged_reward

        with quiet():
            model, tokenizer = load_merged_reward(folder, base_of(folder), None, trust_remote_code)
        model = model.to(dtype)
    else:
        model = _load_model(AutoModelForSequenceClassification, path, folder, dtype, trust_remote_code)
        tokenizer = load_tokenizer(path, folder=folder, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError(f"{path}: its tokenizer has no pad token", "set pad_token in tokenizer_config.json")
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.get_text_config().pad_token_id is None:  # a decoder finds the last real token by it
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    _check_fit(path, model, tokenizer)
    return model.to(device), tokenizer


def load_reward_start(
    path: str,
    *,
    device: str = "cpu",
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
):
    """(model, tokenizer) of a reward model to train: a decoder with one label, and a padding token of its own.

    A language model's trunk gets a new head, N(0, 1/sqrt(d + 1)) from `seed` (Stiennon et al. 2020); a reward model's
    head stays. Where padding is the EOS, `transformers` would read the reward one token early: a new token pads.
    Raises InputError as `load_classifier` does, and for a model that has no `score` head on its last token.
    """
    folder = resolve(path, revision, with_code=trust_remote_code)
    empty = device == "meta"
    model = _load_model(
        AutoModelForSequenceClassification, path, folder, torch.float32, trust_remote_code, new_head=1, empty=empty
    )
    if not hasattr(model, "score") or model.config.num_labels != 1:
        raise InputError(
            f"{path}: a {type(model).__name__} with {model.config.num_labels} labels cannot become a reward model",
            hint="start from a causal language model, or from a reward model of train-rm",
        )
    tokenizer = load_tokenizer(path, folder=folder, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{path}: its tokenizer has no end-of-sequence token", "set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": REWARD_PAD})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer.pad_token_id].zero_()
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    if "ForSequenceClassification" not in str(model.config.architectures):
        width = model.score.weight.shape[1]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            model.score.weight.copy_(torch.randn(1, width, generator=generator) / (width + 1) ** 0.5)
    _check_fit(path, model, tokenizer)
    return model.to(device), tokenizer


def untrained(path: str, kind: str, *, revision: str | None = None):
    """The model that `path`'s config.json describes, with weights of no meaning: a `policy` or a `reward` model, ready to train.

    For estimates: it is taken to be packed and to have a plain head, which only real numbers can tell.
    """
    folder = resolve(path, revision, weights=False)
    folder = resolve(base_of(folder), weights=False) if is_adapter(folder) else folder
    with quiet(), _as_input_error(f"{path}: config.json cannot be read"):
        config = AutoConfig.from_pretrained(folder)
    if kind == "reward":
        config.num_labels = 1
        config.pad_token_id = config.pad_token_id or 0
    auto_class = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
    with quiet(), _as_input_error(f"{path}: not a causal language model"):
        model = auto_class.from_config(config, dtype=torch.float32)
    _without_dropout(model)
    _with_fused_gelu(model)
    model.set_attn_implementation(packed.NAME)
    model._dpoctl_can_pack = model._dpoctl_plain_head = True
    return model.eval()


def load_tokenizer(path: str, *, folder: str | None = None, revision: str | None = None, trust_remote_code=False):
    """The tokenizer alone, of a directory or hub id; `folder` where it is resolved already. Raises InputError."""
    folder = folder or resolve(path, revision, with_code=trust_remote_code, weights=False)
    # Asked for a directory without any, transformers builds an empty tokenizer from the model's type.
    if not _has_tokenizer(folder):
        raise InputError(f"{path}: it has no tokenizer", f"expected one of {', '.join(_TOKENIZER_FILES[:4])} in it")
    with quiet(), _as_input_error(f"{path}: its tokenizer cannot be read"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _has_tokenizer(folder: str) -> bool:
    return any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES)


def context_length(model) -> int | None:
    """The most positions the model takes, in tokens; None where its configuration sets no limit."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return None


def _load_model(
    auto_class,
    path: str,
    folder: str,
    dtype: torch.dtype,
    trust_remote_code: bool,
    new_head: int | None = None,
    empty: bool = False,
):
    """The model, complete; with `new_head` (labels) the classification head alone may be missing, and is then new.

    `empty`: its shapes alone, on the meta device.
    """
    files = Path(folder)
    if not any(files.glob("*.safetensors")) and not any(files.glob("pytorch_model*.bin")):
        raise InputError(f"{path}: it has no weights", "expected model.safetensors (or pytorch_model.bin) in it")
    if not any(files.glob("model*.safetensors")) and (files / "adapter_model.safetensors").is_file():
        raise InputError(f"{path}: an adapter, not a whole model", "merge it into its base first (dpoctl merge)")
    head = {} if new_head is None else {"num_labels": new_head}
    if empty:
        with quiet(), _as_input_error(f"{path}: config.json cannot be read"), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **head)
            model = auto_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        _without_dropout(model)
        _with_fused_gelu(model)
        return model.eval()
    with quiet(), _as_input_error(f"{path}: the model cannot be loaded"):
        model, info = auto_class.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            weights_only=True,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
            **head,
        )
    architectures = model.config.architectures or []
    if auto_class is AutoModelForCausalLM and architectures and all(a.endswith(_NOT_CAUSAL) for a in architectures):
        raise InputError(f"{path}: a {architectures[0]}, where a causal language model is expected")
    for name, found, expected in sorted(info["mismatched_keys"]):
        shapes = f"{name} is {list(found)} in the weights, {list(expected)} by config.json"
        raise InputError(f"{path}: {shapes}", "config.json and weights are not of the same model")
    missing = sorted(info["missing_keys"]) + sorted(info["error_msgs"])
    if new_head:
        missing = [name for name in missing if not name.startswith("score.")]
    if missing:  # transformers would go on with random numbers in their place
        wanted = "a causal language model" if auto_class is AutoModelForCausalLM else "a sequence classifier"
        kind = f", {architectures[0]}," if architectures else ""
        raise InputError(
            f"{path}{kind} cannot serve as {wanted}: {len(missing)} of its weights are missing ({missing[0]} ...)",
            hint="the directory holds a model of another kind, or was saved incompletely",
        )
    _without_dropout(model)
    _with_fused_gelu(model)
    return model.eval()


def _check_fit(path: str, model, tokenizer) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest < 0:
        raise InputError(f"{path}: its tokenizer has an empty vocabulary", "are the tokenizer's files complete?")
    for what, token in (("highest", highest), ("EOS", tokenizer.eos_token_id or 0), ("pad", tokenizer.pad_token_id)):
        if token >= rows:
            raise InputError(
                f"{path}: its tokenizer does not fit the model: {what} token id {token}, only {rows} embeddings",
                hint="use the tokenizer the model was trained with",
            )


def _without_dropout(model) -> None:
    """Every dropout to 0, in modules, in the numbers that attention functions read, and in the configuration."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        else:
            _zero_dropouts(module)
    _zero_dropouts(model.config)
    _zero_dropouts(model.config.get_text_config())


def _with_fused_gelu(model) -> None:
    """GPT-2's tanh form of GELU by torch's one kernel in place of eight: equal but for rounding, and lighter to keep."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])


def _zero_dropouts(prompt_noun) -> None:
    for name, value in list(vars(prompt_noun).items()):
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(prompt_noun, name, 0.0)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' own bars and reports off: what matters in them is raised as an InputError."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def _as_input_error(what: str) -> Iterator[None]:
    """Whatever the libraries raise over the files they were given is the input's fault; memory is not."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        if isinstance(e, pickle.UnpicklingError):
            raise InputError(
                f"{what}: a pickle of more than tensors, or a damaged one", "save it as safetensors"
            ) from e
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        hint = "is the copy complete, and its architecture known to the installed transformers?"
        raise InputError(f"{what}: {type(e).__name__}: {reason[:300]}", hint) from e
