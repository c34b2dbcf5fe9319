"""Load tokenizers, and how text becomes token ids with them, without a model's weights."""

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .. import log
from ..data.chats import TemplateOptions
from ..data.codec import Codec
from ..data.tokens import fingerprint
from ..errors import InputError
from ..outputs import adapter_base
from .hub import is_adapter, resolve, resolve_base
from .pretrained import as_input_error, quiet

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "spm.model"),
    *("sentencepiece.bpe.model", "tiktoken.model", "tekken.json", "tokenizer_config.json"),
)


def load_tokenizer(
    path: str, *, folder: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id; `folder` names its files where they are known. Raises InputError."""
    folder = folder or resolve(path, revision, with_code=trust_remote_code, weights=False)
    # From a directory without tokenizer files transformers builds an empty tokenizer of the model's type.
    if not has_tokenizer(folder):
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
            every = [int(end) for end in ([ends] if isinstance(ends, int) else ends or [])]
            return [end for end in every if end >= 0]  # -1 stands for none in some configurations
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


def has_tokenizer(folder: str) -> bool:
    """Whether a directory holds a tokenizer's files."""
    return any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES)


def require_eos(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError for a tokenizer without an end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{path}: its tokenizer has no end-of-sequence token", "set eos_token in tokenizer_config.json"
        )


def check_fit(path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
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
