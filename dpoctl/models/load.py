"""Load a policy (causal language model), a classifier or a reward model with its tokenizer; every dropout is 0.

Code in a model's directory runs only on request (`trust_remote_code`). Adapters are merged into their base.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import log
from ..data.chats import TemplateOptions
from ..data.codec import Codec
from ..data.tokens import REWARD_PAD, fingerprint
from ..errors import InputError
from ..outputs import adapter_base
from . import adapter, precision, probes
from .hub import is_adapter, resolve, resolve_base
from .pretrained import Source, as_input_error, load_complete, load_shape, prepared, quiet


class Loaded(NamedTuple):
    """A model with its tokenizer, and with how text becomes its token ids."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    codec: Codec


WithTokenizer = tuple[PreTrainedModel, PreTrainedTokenizerBase]

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "spm.model"),
    *("sentencepiece.bpe.model", "tiktoken.model", "tekken.json", "tokenizer_config.json"),
)


def load_policy(
    path: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    frozen_in: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    templates: TemplateOptions | None = None,
) -> Loaded:
    """A causal language model with its tokenizer and codec: eval mode, every dropout 0, a pad token set.

    The pad token is the EOS where the tokenizer has none; embeddings are never resized. On the device `meta` the model
    has shapes without numbers, for a rank that receives its shard of the weights later. `frozen_in` is the compute
    dtype of a model that is not trained: its weights are frozen, and held so (see `precision.hold`).
    Raises InputError: no such model, unreadable or missing weights, a model of another kind, no tokenizer,
    a tokenizer with ids that the model has no embedding for.
    """
    folder = _folder(path, revision, trust_remote_code, device)
    if is_adapter(folder):
        model, tokenizer = _adapted_policy(path, folder, device, trust_remote_code)
        model = model.to(dtype)
    else:
        load = load_shape if str(device) == "meta" else load_complete
        model = load(AutoModelForCausalLM, Source(path, folder, trust_remote_code), dtype)
        tokenizer = load_tokenizer(path, folder=folder, trust_remote_code=trust_remote_code)
    _require_eos(path, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    _check_fit(path, model, tokenizer)
    return Loaded(_placed(model, device, frozen_in), tokenizer, open_codec(path, folder, tokenizer, templates))


def _placed(model: PreTrainedModel, device: str | torch.device, frozen_in: torch.dtype | None) -> PreTrainedModel:
    """The model on its device, frozen where it is not trained; it is cast before it takes the device's memory."""
    if frozen_in is not None:
        model.requires_grad_(False)
        precision.hold(model, frozen_in)
    return model.to(device)


def _folder(path: str, revision: str | None, with_code: bool, device: str | torch.device) -> str:
    """The local directory of a model; for a shape on the meta device the weights of a hub model are not downloaded."""
    weights = str(device) != "meta"
    folder = resolve(path, revision, with_code=with_code, weights=weights)
    if not weights and (Path(folder) / "adapter_config.json").is_file():  # small, and its files say what it is
        folder = resolve(path, revision, with_code=with_code)
    return folder


def load_classifier(
    path: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    frozen_in: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    templates: TemplateOptions | None = None,
) -> Loaded:
    """A sequence classifier or reward model with its tokenizer and codec: eval mode, dropout 0, one pad id.

    The model pads with the tokenizer's id, whatever its configuration says: a decoder finds the last token by it. Its
    head computes in float32; `frozen_in` is as for `load_policy`.

    Raises InputError as `load_policy` does; also where the weights do not contain the classification head.
    """
    folder = resolve(path, revision, with_code=trust_remote_code)
    if is_adapter(folder):
        with quiet():
            base = adapter_base.find(folder)
            model, tokenizer = load_merged_reward(folder, base.path, base.revision, trust_remote_code)
        model = model.to(dtype)
    else:
        source = Source(path, folder, trust_remote_code)
        model = load_complete(AutoModelForSequenceClassification, source, dtype)
        tokenizer = load_tokenizer(path, folder=folder, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _padding_of_classifier(model, tokenizer)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    _check_fit(path, model, tokenizer)
    precision.keep_head_in_float32(model, model.config.num_labels)
    return Loaded(_placed(model, device, frozen_in), tokenizer, open_codec(path, folder, tokenizer, templates))


def _padding_of_classifier(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The pad token where the tokenizer has none: its configuration's, with which it was trained, else a BOS.

    Without padding, `transformers` reads one text at a time, at its last token, which is never a BOS but may be the
    EOS: where that is the BOS too, there is no such token, and None.
    """
    given = getattr(model.config.get_text_config(), "pad_token_id", None)
    known = tokenizer.convert_ids_to_tokens(given) if given is not None and 0 <= given < len(tokenizer) else None
    return known or (None if tokenizer.bos_token == tokenizer.eos_token else tokenizer.bos_token)


def load_reward_start(
    path: str,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    templates: TemplateOptions | None = None,
) -> Loaded:
    """What to train a reward model from: a decoder with one label that does not pad with a token that ends completions.

    A language model's trunk gets a new head, N(0, 1/sqrt(d + 1)) from `seed` (Stiennon et al. 2020); a reward model
    keeps its head. Where padding may end a completion, `transformers` would read that reward one token early: a new
    token pads.
    Raises InputError as `load_classifier` does, and for a model that has no `score` head on its last token.
    """
    folder = _folder(path, revision, trust_remote_code, device)
    load = load_shape if str(device) == "meta" else load_complete
    source = Source(path, folder, trust_remote_code)
    model = load(AutoModelForSequenceClassification, source, torch.float32, new_head=1)
    if not hasattr(model, "score") or model.config.num_labels != 1:
        raise InputError(
            f"{path}: a {type(model).__name__} with {model.config.num_labels} labels cannot become a reward model",
            hint="start from a causal language model, or from a reward model of train-rm",
        )
    tokenizer = load_tokenizer(path, folder=folder, trust_remote_code=trust_remote_code)
    _require_eos(path, tokenizer)
    codec = open_codec(path, folder, tokenizer, templates)
    _use_separate_padding(model, tokenizer, codec.ends)
    if "ForSequenceClassification" not in str(model.config.architectures):
        width = model.score.weight.shape[1]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            model.score.weight.copy_(torch.randn(1, width, generator=generator) / (width + 1) ** 0.5)
    _check_fit(path, model, tokenizer)
    precision.keep_head_in_float32(model, 1)
    return Loaded(model.to(device), tokenizer, Codec(tokenizer, codec.model_ends, templates))


def _use_separate_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> None:
    """Pad with a new token, whose embedding is 0, where the tokenizer has no padding or one of the `ends` pads."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        tokenizer.add_special_tokens({"pad_token": REWARD_PAD})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer.pad_token_id].zero_()
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id


# --- adapters --------------------------------------------------------------------------------------------------------


def load_merged(path: str, base: str, revision: str | None = None, trust_remote_code: bool = False) -> WithTokenizer:
    """(model, tokenizer) of the language model `base` with the adapter at `path` merged in, in float32 on the CPU.

    The adapter's tokenizer is preferred to the base's. Raises InputError: peft is not installed; no adapter, one of
    another kind of model, or one that does not fit the base; and as `load_policy` does for the base.
    """
    found = adapter.read(path)
    if found.task_type not in (None, "CAUSAL_LM"):
        raise InputError(f"{path}: an adapter of task {found.task_type}, where a language model's is expected")
    _check_base(path, base, revision, trust_remote_code)
    model, tokenizer, _ = load_policy(base, revision=revision, trust_remote_code=trust_remote_code)
    folder = Path(path).expanduser()
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = load_tokenizer(path, folder=str(folder))
    return adapter.merge_into(model, found, base, len(tokenizer)), tokenizer


def load_merged_reward(
    path: str, base: str, revision: str | None = None, trust_remote_code: bool = False
) -> WithTokenizer:
    """(model, tokenizer) of a reward model that train-rm saved as adapters and score head; raises as `load_merged`."""
    found = adapter.read(path)
    if found.task_type != "SEQ_CLS" or not {"reward_shift", "reward_scale"} <= set(found.shape):
        raise InputError(f"{path}: an adapter of task {found.task_type}, where one of train-rm's is expected")
    _check_base(path, base, revision, trust_remote_code)
    model, tokenizer, _ = load_reward_start(base, revision=revision, trust_remote_code=trust_remote_code)
    model.config.reward_shift, model.config.reward_scale = found.shape["reward_shift"], found.shape["reward_scale"]
    return adapter.merge_into(model, found, base, len(tokenizer)).eval(), tokenizer


def _check_base(path: str, base: str, revision: str | None, trust_remote_code: bool) -> None:
    """Raises InputError where the base cannot be found, or is not the model that the adapter was trained on."""
    adapter_base.check(path, base, resolve_base(path, base, revision, with_code=trust_remote_code))


def _adapted_policy(path: str, folder: str, device: str | torch.device, trust_remote_code: bool) -> WithTokenizer:
    """An adapter's directory as a policy: merged into its base; on the meta device the base has the same shape."""
    base = adapter_base.find(folder)
    if str(device) != "meta":
        with quiet():
            return load_merged(folder, base.path, base.revision, trust_remote_code)
    place = resolve_base(path, base.path, base.revision, with_code=trust_remote_code, weights=False)
    model = load_shape(AutoModelForCausalLM, Source(path, place, trust_remote_code), torch.float32)
    holder = folder if _has_tokenizer(folder) else place
    tokenizer = load_tokenizer(path, folder=holder, trust_remote_code=trust_remote_code)
    adapter.add_rows(model, adapter.read(folder), len(tokenizer))
    return model, tokenizer


# --- models without weights ------------------------------------------------------------------------------------------


def untrained(path: str, kind: str, *, revision: str | None = None) -> PreTrainedModel:
    """The `policy`, `reward` model or `classifier` that `path`'s config.json describes, with random weights.

    For cost estimates: packing and a plain head are assumed, since only real weights can show them. Raises InputError.
    """
    folder = _config_folder(path, revision)
    with quiet(), as_input_error(f"{path}: config.json cannot be read"):
        config = AutoConfig.from_pretrained(folder)
    if kind == "reward":
        config.num_labels = 1
        config.pad_token_id = config.pad_token_id or 0
    auto_class = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
    wanted = "causal language model" if kind == "policy" else "sequence classifier"
    with quiet(), as_input_error(f"{path}: not a {wanted}"):
        model = auto_class.from_config(config, dtype=torch.float32)
    model = prepared(model)
    probes.assume(model, packs=True, plain_head=True)
    return model


def count_weights(path: str, revision: str | None = None) -> int:
    """Number of parameters of a causal language model, from its config.json alone. Raises InputError."""
    folder = _config_folder(path, revision)
    try:
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: {str(e).splitlines()[0]}", hint="a directory or hub id of a causal LM") from None
    return sum(p.numel() for p in shape.parameters())


def _config_folder(path: str, revision: str | None) -> str:
    """The folder of the config.json that describes a model, for an adapter that of its base."""
    folder = resolve(path, revision, weights=False)
    if not is_adapter(folder):
        return folder
    base = adapter_base.find(folder)
    return resolve_base(path, base.path, base.revision, weights=False)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def load_tokenizer(
    path: str, *, folder: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id; `folder` names its files where they are known. Raises InputError."""
    folder = folder or resolve(path, revision, with_code=trust_remote_code, weights=False)
    # From a directory without tokenizer files transformers builds an empty tokenizer of the model's type.
    if not _has_tokenizer(folder):
        raise InputError(f"{path}: it has no tokenizer", f"expected one of {', '.join(_TOKENIZER_FILES[:4])} in it")
    with quiet(), as_input_error(f"{path}: its tokenizer cannot be read"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load_codec(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False, templates: TemplateOptions | None = None
) -> Codec:
    """How text becomes the token ids of a model whose weights are not loaded. Raises InputError."""
    folder = resolve(path, revision, with_code=trust_remote_code, weights=False)
    tokenizer = load_tokenizer(path, folder=folder, trust_remote_code=trust_remote_code)
    return open_codec(path, folder, tokenizer, templates)


def open_codec(
    path: str, folder: str, tokenizer: PreTrainedTokenizerBase, templates: TemplateOptions | None = None
) -> Codec:
    """The codec of a tokenizer with the end tokens of the model in `folder`; its chat template is replaced on request.

    Raises InputError for the name of a template that the tokenizer does not have.
    """
    if templates and templates.template is not None:
        tokenizer.chat_template = templates.template
    ends = end_tokens(folder)
    codec = Codec(tokenizer, (_end_tokens_of_base(path, folder) if ends is None else ends) or (), templates)
    log.detail(f"{path}: {codec.describe_ends()}")
    return codec


def end_tokens(folder: str) -> list[int] | None:
    """The end tokens of a directory's generation configuration, else of its config.json; None where it has neither.

    Raises InputError for a file that is there and cannot be read: sampling would not stop where the model's does.
    """
    for name in ("generation_config.json", "config.json"):
        file = Path(folder) / name
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            ends = found.get("eos_token_id", (found.get("text_config") or {}).get("eos_token_id"))
            return [int(end) for end in ([ends] if isinstance(ends, int) else ends or [])]
        except (OSError, ValueError, TypeError, AttributeError):
            hint = "expected a JSON object whose eos_token_id is a token id or a list of them: copy the file again"
            raise InputError(f"{file}: cannot be read", hint) from None
    return None


def _end_tokens_of_base(path: str, folder: str) -> list[int] | None:
    if not is_adapter(folder):
        return None
    base = adapter_base.find(folder)
    return end_tokens(resolve_base(path, base.path, base.revision, weights=False))


def require_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase, path: str, reference_path: str
) -> None:
    """Raises InputError where two models tokenize differently, so that their log-probs cannot be compared."""
    if fingerprint(tokenizer) != fingerprint(reference):
        raise InputError(
            f"{reference_path}: its tokenizer is not that of {path}, so their log-probs do not compare",
            hint="a reference has the policy's tokenizer",
        )


def _has_tokenizer(folder: str) -> bool:
    return any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES)


def _require_eos(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{path}: its tokenizer has no end-of-sequence token", "set eos_token in tokenizer_config.json"
        )


def _check_fit(path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError for a tokenizer with ids beyond the model's embeddings."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest < 0:
        raise InputError(f"{path}: its tokenizer has an empty vocabulary", "are the tokenizer's files complete?")
    eos, pad = tokenizer.eos_token_id or 0, tokenizer.pad_token_id or 0
    for what, token in (("highest", highest), ("EOS", eos), ("pad", pad)):
        if token >= rows:
            raise InputError(
                f"{path}: its tokenizer does not fit the model: {what} token id {token}, only {rows} embeddings",
                hint="use the tokenizer the model was trained with",
            )


def context_length(model: PreTrainedModel) -> int | None:
    """The most positions the model takes, in tokens; None where its configuration sets no limit."""
    return _context(model.config)


def context_without_weights(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """`context_length` of a model of which only config.json is read. Raises InputError."""
    folder = _config_folder(path, revision)
    with quiet(), as_input_error(f"{path}: config.json cannot be read"):
        return _context(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))


def _context(config: PretrainedConfig) -> int | None:
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return None
