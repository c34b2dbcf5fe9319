"""A row file as a command reads it: the token sequences that training and sampling get, by the functions they call.

What is cut, and how long sequences are before that, comes from encoding the same rows without limits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple, TypeVar

from .. import log
from ..config.preview import Preview
from ..data.chats import Prompt
from ..data.codec import Codec
from ..data.columns import apply_columns, parse_columns
from ..data.encode import Example, Limits, encode_examples, encode_pairs
from ..data.fields import BadRow
from ..data.formats import rows_of
from ..data.readers import Rows, load_rows
from ..data.schema import shape_of
from ..data.unpaired import encode_labelled, require_both
from ..errors import InputError
from ..inference.completions import prompt_set

V = TypeVar("V")

_PAIRS = ("train-dpo", "train-rm")
_CUT = ("truncated", "dropped", "split", "equal_dropped")  # counts of what may look different without limits
_KINDS = {"preferences": "train-dpo", "text": "sft", "prompts": "sample"}  # kind -> what such rows are for


class Setting(NamedTuple):
    """What decides, besides the rows, how they are encoded.

    `config`: with `for_` decided. `limits`: those of training; for prompts `limits.prompt` alone holds. `context`: the
    most positions of the model to sample from, None without a limit. `unpaired`: rows are single completions with a
    label.
    """

    config: Preview
    codec: Codec
    limits: Limits
    context: int | None = None
    unpaired: bool = False

    @property
    def kind(self) -> str:
        """The schema of the rows."""
        if self.unpaired:
            return "unpaired"
        if self.config.for_ == "sft":
            return "preferences" if self.config.field else "text"
        return "preferences" if self.config.for_ in _PAIRS else "prompts"

    @property
    def unlimited(self) -> "Setting":
        """The same without limits."""
        return self._replace(limits=Limits(), context=None, config=replace(self.config, overlong="truncate"))


class Span(NamedTuple):
    """Consecutive tokens: of the `prompt`, an `answer` (trained on), `between` answers, or `cut` (not in the sequence).

    `ended`: whether an answer's last token is one at which sampling stops.
    """

    kind: str
    ids: list[int]
    ended: bool = False


class TokenSequence(NamedTuple):
    """A sequence that a row became. `name`: the row's field, "text", "answers" (of messages), or of single completions
    with a label "desirable" or "undesirable".

    `whole`: the same without limits, where it was cut.
    """

    name: str
    example: Example
    whole: Example | None = None

    def spans(self, codec: Codec, stops: frozenset[int]) -> list[Span]:
        """The sequence in parts, with what was cut between them."""
        ids, start, whole = self.example.ids, self.example.start, self.whole
        if whole is None:
            prompt, end = [Span("prompt", ids[:start])], []
        else:
            gone = whole.start - start
            kept = min(codec.bos_of(whole.ids), start - 1) if gone else 0
            prompt = [
                Span("prompt", ids[:kept]),
                Span("cut", whole.ids[kept : kept + gone]),
                Span("prompt", ids[kept:start]),
            ]
            end = [Span("cut", whole.ids[len(ids) + gone :])]
        return [span for span in (*prompt, *self._answers(stops), *end) if span.ids]

    def _answers(self, stops: frozenset[int]) -> Iterator[Span]:
        ids, at = self.example.ids, self.example.start
        for begin, end in [*self.example.gaps, (len(ids), len(ids))]:
            if at < begin:
                yield Span("answer", ids[at:begin], ids[begin - 1] in stops)
            yield Span("between", ids[begin:end])
            at = end


@dataclass
class Encoded:
    """A file's sequences by line, in the order of the file, and the counts of encoding; `skipped` rows by reason.

    `whole`: the same without limits (itself, where nothing was cut). `error`: why the command refuses the file, where
    it does; the sequences are then those of the valid rows.
    """

    rows: Rows
    sequences: dict[Any, list[TokenSequence]]
    counts: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    whole: "Encoded | None" = None
    error: InputError | None = None

    @property
    def unlimited(self) -> "Encoded":
        """The same without limits."""
        return self.whole or self


def purpose_of(config: Preview) -> str:
    """The command that DATA is for: what --for says, or what its first valid row can be used for.

    Raises InputError where it fits none.
    """
    if config.for_ or config.field:
        return config.for_ or "sft"
    errors: dict[str, InputError] = {}
    for skip, kind in product((False, True), _KINDS):  # valid first rows decide, broken ones do not
        try:
            with log.silenced():
                [row] = load_rows(config.data, kind, skip_bad=skip, limit=1, columns=config.columns).rows
        except InputError as error:
            errors.setdefault(kind, error)
        else:
            if kind == "prompts" and "chosen" in row:  # pairs that are invalid
                raise errors["preferences"]
            return "train-dpo" if _is_labelled(row, config.threshold) else _KINDS[kind]
    if len({error.message for error in errors.values()}) == 1:
        raise errors["text"]
    told = "; ".join(f"{kind}, {error.message.removeprefix(f'{config.data}:')}" for kind, error in errors.items())
    raise InputError(f"{config.data}: neither preferences, texts nor prompts: as {told}", "dpoctl docs files")


def are_unpaired(config: Preview) -> bool:
    """Whether train-dpo gets single completions with a label, by the first row that can be read."""
    if config.for_ != "train-dpo":
        return False
    mapped = parse_columns(config.columns)
    for _, row in rows_of(config.data):
        if not isinstance(row, dict):
            continue
        try:
            return _is_labelled(apply_columns(mapped, row), config.threshold)
        except BadRow:
            return False
    return False


def _is_labelled(row: dict, threshold: float | None) -> bool:
    if row.get("completion") is None or row.get("chosen") is not None:
        return False
    return row.get("label") is not None or (threshold is not None and row.get("score") is not None)


def read(path: str, setting: Setting, limit: int | None = None) -> Encoded:
    """The rows of a file (the first `limit`) as the command encodes them. Raises InputError where none can be used.

    Where none is left within the limits, the file is shown without sequences.
    """
    config, error = setting.config, None
    options: dict[str, Any] = {"limit": limit, "columns": config.columns}
    try:
        rows = load_rows(path, setting.kind, skip_bad=config.skip_bad_rows, **options)
    except InputError as refusal:
        error = refusal
        with log.silenced():
            rows = _or_raise(refusal, lambda: load_rows(path, setting.kind, skip_bad=True, **options))
    valid = replace(rows, skip_bad=True)
    with log.silenced():
        try:
            found = encode(rows, setting)
        except InputError as refusal:
            error = error or refusal
            try:
                found = encode(valid, setting)
            except InputError:
                found = Encoded(rows, {line: [] for line in rows.lines})
                found.whole = _or_raise(error, lambda: _encode(valid, setting.unlimited))
    if setting.unpaired and not error and any(found.sequences.values()):
        try:
            require_both(path, found.counts)
        except InputError as refusal:
            error = refusal
    found.error = error
    return found


def _or_raise(refusal: InputError, attempt: Callable[[], V]) -> V:
    """What another attempt returns; where it fails as well, `refusal` is raised."""
    try:
        return attempt()
    except InputError:
        raise refusal from None


def encode(rows: Rows, setting: Setting) -> Encoded:
    """Checked rows as the command encodes them, within the limits and, where they cut anything, without them."""
    found = _encode(rows, setting)
    if any(found.counts.get(name) for name in _CUT):
        found.whole = _encode(rows, setting.unlimited)
        if setting.config.overlong != "split":
            _add_whole(found, found.whole)
    return found


def _encode(rows: Rows, setting: Setting) -> Encoded:
    config, codec, limits = setting.config, setting.codec, setting.limits
    found = Encoded(rows, {line: [] for line in rows.lines})
    if setting.kind == "prompts":
        prompts = prompt_set(rows, codec, setting.context, limits.prompt)
        line_of = {id(row): line for row, line in zip(rows.rows, rows.lines, strict=True)}
        for row, ids in zip(prompts.rows, prompts.ids, strict=True):
            line = line_of[id(row)]
            found.sequences[line].append(TokenSequence("prompt", Example(ids, len(ids), line=line)))
        found.counts, found.skipped = prompts.counts, prompts.skipped
        return found
    if config.for_ == "sft":
        options: dict[str, Any] = {"field": config.field, "turns": config.answers, "overlong": config.overlong}
        examples, found.counts = encode_examples(rows, codec, limits, **options)
        shapes = (config.field or shape_of(row) or "text" for row in rows.rows)
        names: dict[Any, str] = dict(zip(rows.lines, shapes, strict=True))
        for example in examples:
            shape = names[example.line]
            name = "answers" if shape == "messages" else str(shape)
            found.sequences[example.line].append(TokenSequence(name, example))
    elif setting.unpaired:
        data = encode_labelled(rows, codec, limits, config.threshold)
        for (i, _), label, line in zip(data.pairs, data.labels, data.lines, strict=True):
            prompt = data.prompts[data.prompt_of[i]]
            example = Example(prompt + data.completions[i], len(prompt), line=line)
            found.sequences[line].append(TokenSequence("desirable" if label else "undesirable", example))
        found.counts = data.counts
    else:
        data = encode_pairs(rows, codec, limits)
        for pair, line in zip(data.pairs, data.lines, strict=True):
            for name, i in zip(("chosen", "rejected"), pair, strict=True):
                prompt = data.prompts[data.prompt_of[i]]
                gaps = [(len(prompt) + begin, len(prompt) + end) for begin, end in data.gaps.get(i, ())]
                example = Example(prompt + data.completions[i], len(prompt), gaps, line)
                found.sequences[line].append(TokenSequence(name, example))
        found.counts = data.counts
    found.skipped = dict(rows.skipped)
    return found


def _add_whole(found: Encoded, whole: Encoded) -> None:
    """Give the sequences that were cut the same without limits."""
    for line, sequences in found.sequences.items():
        left = list(whole.sequences.get(line, ()))
        for n, sequence in enumerate(sequences):
            at = next((i for i, other in enumerate(left) if _is_of(sequence, other)), None)
            if at is None:
                continue
            full = left[at].example
            del left[: at + 1]
            if len(full.ids) > len(sequence.example.ids):
                sequences[n] = sequence._replace(whole=full)


def _is_of(cut: TokenSequence, whole: TokenSequence) -> bool:
    """Whether `cut` is what is left of `whole`."""
    a, b = cut.example, whole.example
    answer = a.ids[a.start :]
    return cut.name == whole.name and a.start <= b.start and b.ids[b.start :][: len(answer)] == answer


def stops_of(row: dict, codec: Codec) -> frozenset[int]:
    """The tokens at which sampling stops after a row's prompt."""
    is_chat = isinstance(row.get("prompt"), list) or shape_of(row) == "messages"
    return codec.stops_of(Prompt([] if is_chat else ""))


def why_nothing(found: Encoded, line: Any, setting: Setting) -> str:
    """Why the row at a line became no sequence, as the command says it."""
    i = found.rows.lines.index(line)
    alone = replace(found.rows, rows=[found.rows.rows[i]], lines=[line], skipped={}, skip_bad=False)
    try:
        with log.silenced():
            _encode(alone, setting)
    except InputError as error:
        return error.message.removeprefix(f"{found.rows.place(i)}:").strip()
    return "nothing of it is used"
