"""Rows of single completions with a label, as training on unpaired feedback reads them."""

from ..errors import InputError
from .answers import answer_of, encode_answers
from .codec import Codec
from .encode import Limits, PairData, count_special, finish_counts, within
from .encode import UniqueCompletions as Unique
from .gaps import cut_to
from .readers import Rows


def encode_unpaired(
    rows: Rows, codec: Codec, limits: Limits, threshold: float | None = None, *, mismatches: bool = False
) -> PairData:
    """The rows as `encode_labelled` gives them, with completions of other prompts where `mismatches` are asked for.

    Raises InputError as that does, where all rows have one label, and for mismatches where there is one prompt.
    """
    unique = _encode(rows, codec, limits, threshold)
    data = unique.data
    require_both(rows.path, data.counts)
    if mismatches and len(data.prompts) < 2:
        what = "KTO's KL is estimated with completions of other prompts, and there is one prompt"
        raise InputError(f"{rows.path}: {what}", "add rows of other prompts, or choose --loss bco")
    if mismatches:
        add_mismatched(unique, limits)
    return data


def encode_labelled(rows: Rows, codec: Codec, limits: Limits, threshold: float | None = None) -> PairData:
    """Rows of prompt, completion and label as pairs (i, i) over unique completions; `labels` says which are desirable.

    With `threshold` a completion is desirable whose `label`, or else `score`, is at least that. Dropped and counted:
    rows with an empty prompt or completion. Raises InputError, naming file, line and field, for a row without a label
    that says so, and where no row is left.
    """
    return _encode(rows, codec, limits, threshold).data


def require_both(path: str, counts: dict[str, int]) -> None:
    """Raises InputError where the counts of `encode_labelled` say that all completions have one label."""
    if counts["desirable"] in (0, counts["examples"]):
        kind = "desirable" if counts["desirable"] else "undesirable"
        raise InputError(f"{path}: every completion is {kind}", "unpaired feedback needs both kinds")


def _encode(rows: Rows, codec: Codec, limits: Limits, threshold: float | None) -> Unique:
    counts = dict.fromkeys(("rows", "examples", "truncated", "empty_dropped", "special_text"), 0)
    counts |= {"from_ids": 0, "rows": len(rows.rows)}
    labels = [_label(rows, i, threshold) for i in range(len(rows.rows))]
    answers = [answer_of(rows, i, "completion") for i in range(len(rows.rows))]
    encoded = encode_answers(rows, codec, answers)
    counts |= encoded.counts | rows.skipped
    counts["chats"] = sum(answer.prompt.is_chat for answer in answers)
    unique = Unique(PairData(counts=counts))
    data = unique.data
    for i, row in enumerate(rows.rows):
        if i in encoded.refused:
            continue
        counts["from_ids"] += answers[i].ids is not None
        found = within(encoded, i, limits, codec)
        if not found:
            counts["empty_dropped"] += 1
            continue
        counts["truncated"] += found.cut
        index = unique.index(*found[:3])
        data.pairs.append((index, index))
        data.labels.append(labels[i])
        data.lines.append(rows.lines[i])
        data.margins.append(None)
        data.scores.append((None, None))
        data.weights.append(None if row.get("weight") is None else float(row["weight"]))
    count_special(rows, codec, [[a.prompt, a.completion] for a in answers if a.ids is None], counts)
    counts["examples"] = len(data.pairs)
    counts["duplicates"] = len(data.pairs) - len({i for i, _ in data.pairs})
    counts["desirable"] = sum(data.labels)
    finish_counts(rows, counts, "examples")
    return unique


def add_mismatched(unique: Unique, limits: Limits) -> None:
    """Add for every row its prompt with the completion of the next row of another prompt, in the order of the file.

    `unique.data` holds two prompts or more.
    """
    data = unique.data
    n = len(data.pairs)
    following, left = n - 1, [0] * n
    for i in reversed(range(2 * n)):  # the next row, cyclically, whose prompt is another
        prompt, after = data.prompt_of[data.pairs[i % n][0]], (i + 1) % n
        same = data.prompt_of[data.pairs[after][0]] == prompt
        following = left[after] if same else after
        left[i % n] = following
    for i, other in enumerate(left):
        ids = data.prompts[data.prompt_of[data.pairs[i][0]]]
        index = data.pairs[other][0]
        completion, gaps = data.completions[index], data.gaps.get(index, ())
        if limits.length is not None:
            completion, gaps = cut_to(completion, gaps, max(1, limits.length - len(ids)))
        data.mismatched.append(unique.index(ids, completion, gaps))


def _label(rows: Rows, i: int, threshold: float | None) -> bool:
    row = rows.rows[i]
    value = row.get("label")
    if threshold is not None and value is None:
        value = row.get("score")
    place = f"{rows.place(i)}: field 'label'"
    if value is None:
        raise InputError(f"{place}: expected true or false, got nothing", "--columns label=COLUMN names the column")
    if threshold is not None:
        if isinstance(value, bool):
            raise InputError(f"{place}: expected a number, got {str(value).lower()}", "leave --threshold out")
        return float(value) >= threshold
    if not isinstance(value, bool) and value not in (0, 1):
        hint = "--threshold X calls completions desirable whose label is at least X"
        raise InputError(f"{place}: expected true or false, got {value}", hint)
    return bool(value)
