"""Load a policy (causal language model), a classifier or a reward model with its tokenizer; every dropout is 0.

Code in a model's directory runs only on request (`trust_remote_code`). Adapters are merged into their base.
"""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import log
from ..data.chats import TemplateOptions
from ..data.codec import Codec
from ..data.tokens import REWARD_PAD
from ..errors import InputError
from ..outputs import adapter_base
from . import adapter, precision, probes, quantized
from .hub import is_adapter, resolve, resolve_base
from .place import Place, load_at
from .pretrained import Source, as_input_error, prepared, quiet
from .tokenizers import check_fit, has_tokenizer, load_tokenizer, open_codec, require_eos


class Loaded(NamedTuple):
    """A model with its tokenizer, and with how text becomes its token ids."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    codec: Codec


_IN_MAIN_MEMORY = Place()
WithTokenizer = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_policy(
    path: str,
    place: Place = _IN_MAIN_MEMORY,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    templates: TemplateOptions | None = None,
) -> Loaded:
    """A causal language model with its tokenizer and codec: eval mode, every dropout 0, a pad token set.

    An adapter is merged into its base, or attached to a base that is quantised, by its checkpoint or by `place`. With
    `place.apart` the result is the base, ready for the adapter.
    The pad token is the EOS where the tokenizer has none; embeddings are never resized. On the device `meta` the model
    has shapes without numbers, for a rank that receives its shard of the weights later.
    Raises InputError: no such model, unreadable or missing weights, a model of another kind, no tokenizer,
    a tokenizer with ids that the model has no embedding for.
    """
    folder = _folder(path, revision, trust_remote_code, place)
    source = Source(path, folder, trust_remote_code)
    if is_adapter(folder):
        model, tokenizer = _adapted_policy(source, place)
    else:
        model = load_at(place, AutoModelForCausalLM, source)
        tokenizer = load_tokenizer(path, folder=folder, trust_remote_code=trust_remote_code)
    require_eos(path, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_fit(path, model, tokenizer)
    return Loaded(place.moved(model), tokenizer, open_codec(path, folder, tokenizer, templates))


def _folder(path: str, revision: str | None, with_code: bool, place: Place) -> str:
    """The local directory of a model; for a shape on the meta device the weights of a hub model are not downloaded."""
    weights = not place.shape_only
    folder = resolve(path, revision, with_code=with_code, weights=weights)
    if not weights and (Path(folder) / "adapter_config.json").is_file():  # small, and its files say what it is
        folder = resolve(path, revision, with_code=with_code)
    return folder


def load_classifier(
    path: str,
    place: Place = _IN_MAIN_MEMORY,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    templates: TemplateOptions | None = None,
) -> Loaded:
    """A sequence classifier or reward model with its tokenizer and codec: eval mode, dropout 0, one pad id.

    A reward model's adapter is merged into its base, or with `place.apart` and on a quantised base attached to it.
    The model pads with the tokenizer's id, whatever its configuration says: a decoder finds the last token by it. Its
    head computes in float32.

    Raises InputError as `load_policy` does; also where the weights do not contain the classification head.
    """
    folder = resolve(path, revision, with_code=trust_remote_code)
    if is_adapter(folder):
        base = adapter_base.find(folder)
        where = resolve_base(path, base.path, base.revision, with_code=trust_remote_code)
        kept = place if place.apart or place.quantize or quantized.method_of(where) else None
        with quiet():
            model, tokenizer = _adapted_reward(folder, base.path, base.revision, trust_remote_code, kept)
    else:
        model = load_at(place, AutoModelForSequenceClassification, Source(path, folder, trust_remote_code))
        tokenizer = load_tokenizer(path, folder=folder, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _padding_of_classifier(model, tokenizer)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    check_fit(path, model, tokenizer)
    precision.keep_head_in_float32(model, model.config.num_labels)
    return Loaded(place.moved(model), tokenizer, open_codec(path, folder, tokenizer, templates))


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
    place: Place = _IN_MAIN_MEMORY,
    *,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    templates: TemplateOptions | None = None,
) -> Loaded:
    """What to train a reward model from: a decoder with one label that does not pad with a token that ends completions.

    A language model's trunk gets a new head, N(0, 1/sqrt(d + 1)) from `seed` (Stiennon et al. 2020); a reward model
    keeps its head. Where padding may end a completion, `transformers` would read that reward one token early: a new
    token pads. `place` as in `load_policy`; without `place.apart` an adapter is refused.
    Raises InputError as `load_classifier` does, and for a model that has no `score` head on its last token.
    """
    folder = _folder(path, revision, trust_remote_code, place)
    where = folder
    if place.apart and is_adapter(folder):
        base, weights = adapter_base.find(folder), not place.shape_only
        where = resolve_base(path, base.path, base.revision, with_code=trust_remote_code, weights=weights)
    holder = folder if has_tokenizer(folder) else where
    source = Source(path, where, trust_remote_code)
    return _reward_start(source, holder, place, seed, templates)


def _reward_start(
    source: Source, holder: str, place: Place, seed: int = 0, templates: TemplateOptions | None = None
) -> Loaded:
    """`load_reward_start` of a complete model with the tokenizer in the folder `holder`."""
    path = source.path
    model = load_at(place, AutoModelForSequenceClassification, source, new_head=1)
    if not hasattr(model, "score") or model.config.num_labels != 1:
        raise InputError(
            f"{path}: a {type(model).__name__} with {model.config.num_labels} labels cannot become a reward model",
            hint="start from a causal language model, or from a reward model of train-rm",
        )
    tokenizer = load_tokenizer(path, folder=holder, trust_remote_code=source.trust_remote_code)
    require_eos(path, tokenizer)
    codec = open_codec(path, source.folder, tokenizer, templates)
    _use_separate_padding(model, tokenizer, codec.ends)
    if "ForSequenceClassification" not in str(model.config.architectures):
        width = model.score.weight.shape[1]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            model.score.weight.copy_(torch.randn(1, width, generator=generator) / (width + 1) ** 0.5)
    check_fit(path, model, tokenizer)
    precision.keep_head_in_float32(model, 1)
    return Loaded(place.moved(model), tokenizer, Codec(tokenizer, codec.model_ends, templates))


def _use_separate_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> None:
    """Pad with a new token, whose embedding is 0, where the tokenizer has no padding or one of the `ends` pads."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        tokenizer.add_special_tokens({"pad_token": REWARD_PAD})
    if tokenizer.pad_token == REWARD_PAD:
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
    found = _read_policy_adapter(path)
    _checked_base(path, base, revision, trust_remote_code)
    model, tokenizer, _ = load_policy(base, revision=revision, trust_remote_code=trust_remote_code)
    _require_mergeable(path, base, model)
    if bits := adapter_base.trained_in(path):
        log.say(f"{path}: was trained on {base} in {bits}, and is merged into it in full precision")
    folder = Path(path).expanduser()
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = load_tokenizer(path, folder=str(folder))
    return adapter.merge_into(model, found, base, len(tokenizer)), tokenizer


def load_merged_reward(
    path: str, base: str, revision: str | None = None, trust_remote_code: bool = False
) -> WithTokenizer:
    """(model, tokenizer) of a reward model that train-rm saved as adapters and score head; raises as `load_merged`."""
    return _adapted_reward(path, base, revision, trust_remote_code, None)


def _adapted_reward(
    path: str, base: str, revision: str | None, trust_remote_code: bool, kept: Place | None
) -> WithTokenizer:
    """A reward model's adapter merged into its base, on the CPU; or `kept` there: attached to the base, frozen."""
    found = adapter.read(path)
    if found.task_type != "SEQ_CLS" or not {"reward_shift", "reward_scale"} <= set(found.shape):
        raise InputError(f"{path}: an adapter of task {found.task_type}, where one of train-rm's is expected")
    where = _checked_base(path, base, revision, trust_remote_code)
    folder = str(Path(path).expanduser())
    holder = folder if has_tokenizer(folder) else where
    model, tokenizer, _ = _reward_start(Source(base, where, trust_remote_code), holder, kept or Place())
    model.config.reward_shift, model.config.reward_scale = found.shape["reward_shift"], found.shape["reward_scale"]
    if kept is None:
        _require_mergeable(path, base, model)
        return adapter.merge_into(model, found, base, len(tokenizer)).eval(), tokenizer
    adapter.attach_frozen(model, found, base)
    return model, tokenizer


def _checked_base(path: str, base: str, revision: str | None, trust_remote_code: bool) -> str:
    """The folder of the base. Raises InputError: not found, or not the model that the adapter was trained on."""
    folder = resolve_base(path, base, revision, with_code=trust_remote_code)
    adapter_base.check(path, base, folder)
    return folder


def _require_mergeable(path: str, base: str, model: PreTrainedModel) -> None:
    """Raises InputError for a quantised base: its weights would be rounded anew."""
    if quantized.is_quantized(model):
        raise InputError(
            f"{path}: its base {base} is quantised, and nothing can be merged into it",
            hint="dpoctl merge ADAPTER --base MODEL merges it into the model in full precision that it was made from",
        )


def _adapted_policy(source: Source, place: Place) -> WithTokenizer:
    """An adapter's directory as a policy: merged into its base, or attached to it where that is quantised.

    With `place.apart`, and on the meta device: the base alone, with the adapter's tokenizer and the rows of its
    embeddings.
    """
    folder, with_code = source.folder, source.trust_remote_code
    base = adapter_base.find(folder)
    base_alone = place.apart or place.shape_only
    where = resolve_base(source.path, base.path, base.revision, with_code=with_code, weights=not place.shape_only)
    kept = bool(place.quantize or quantized.method_of(where))
    if not (base_alone or kept):
        with quiet():
            return load_merged(folder, base.path, base.revision, with_code)
    found = _read_policy_adapter(folder)
    if is_adapter(where):
        raise InputError(f"{source.path}: the base of this adapter is an adapter itself", hint="merge that one first")
    if not place.shape_only:
        adapter_base.check(folder, base.path, where)
    at_base = Source(source.path, where, with_code)
    model = load_at(place, AutoModelForCausalLM, at_base)
    holder = folder if has_tokenizer(folder) else where
    tokenizer = load_tokenizer(source.path, folder=holder, trust_remote_code=with_code)
    adapter.add_rows(model, found, len(tokenizer))
    if not base_alone:
        with quiet():
            adapter.attach_frozen(model, found, base.path)
    return model, tokenizer


def _read_policy_adapter(path: str) -> adapter.Adapter:
    """The adapter of a language model. Raises InputError for one of another kind of model, and as `adapter.read`."""
    found = adapter.read(path)
    if found.task_type not in (None, "CAUSAL_LM"):
        raise InputError(f"{path}: an adapter of task {found.task_type}, where a language model's is expected")
    return found


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


# --- contexts ---------------------------------------------------------------------------------------------------------


def context_length(model: PreTrainedModel) -> int | None:
    """The most positions the model takes, in tokens; None where its configuration sets no limit."""
    return _context(model.config)


def context_without_weights(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """`context_length` of a model of which only config.json is read. Raises InputError."""
    return _context(_config_alone(path, revision, trust_remote_code))


def vocabulary_without_weights(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> int:
    """Number of token ids that a model can give, from its config.json alone; 0 where that is silent.

    Raises InputError.
    """
    return getattr(_config_alone(path, revision, trust_remote_code).get_text_config(), "vocab_size", None) or 0


def _config_alone(path: str, revision: str | None, trust_remote_code: bool) -> PretrainedConfig:
    folder = _config_folder(path, revision)
    with quiet(), as_input_error(f"{path}: config.json cannot be read"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _context(config: PretrainedConfig) -> int | None:
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return None
