"""Rows to what training reads: examples for sft, unique prompts and completions with pairs of indices for the rest."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..errors import InputError
from ..log import say, warn
from .answers import Answer, Encoded, answer_of, answers_of, encode_answers
from .chats import Prompt, Refusal, Text
from .codec import Codec
from .counts import in_words
from .gaps import Gaps, cut_to
from .readers import Rows
from .schema import shape_of

_REASONS = ("dropped", "too_short", "equal_dropped", "empty_dropped", "refused")


@dataclass
class Example:
    """A sequence of token ids, of which those of its answers are trained on.

    `start`: index of the first of them, 1 or more. `gaps`: [begin, end) of what lies between answers and is not
    trained on. `line`: where its row is.
    """

    ids: list[int]
    start: int
    gaps: list[tuple[int, int]] = field(default_factory=list)
    line: Any = field(default=0, compare=False)

    @property
    def trained(self) -> int:
        """How many tokens are trained on."""
        return len(self.ids) - self.start - sum(end - begin for begin, end in self.gaps)

    @property
    def mask(self) -> list[bool]:
        """Of each token from `start` on, whether it is trained on."""
        kept = [True] * (len(self.ids) - self.start)
        for begin, end in self.gaps:
            kept[begin - self.start : end - self.start] = [False] * (end - begin)
        return kept


@dataclass
class PairData:
    """Preference pairs over unique completions: what pairs have in common is stored, and forwarded, once.

    `prompts`: ids of each unique prompt, in order of first appearance. `completions`: ids of each unique (prompt,
    completion), EOS included where the text is finished; `prompt_of` is the index of each one's prompt, `gaps` what is
    not the assistant's in those of several messages. `pairs`:
    (chosen, rejected) as indices of completions; `lines` the source line of each; `margins`, `scores` (of chosen and
    rejected), `shares` (of the votes, for chosen) and `weights` what the row has of these, None where it lacks one. Of
    unpaired rows, whose pairs are (i, i), `labels` says whether each completion is desirable, and `mismatched`, where
    it is asked for, which of `completions` is the row's prompt with the completion of another. `counts`: rows, pairs,
    truncated, equal_dropped, empty_dropped, duplicates, special_text, from_ids, all in pairs.
    """

    prompts: list[list[int]] = field(default_factory=list)
    completions: list[list[int]] = field(default_factory=list)
    prompt_of: list[int] = field(default_factory=list)
    gaps: dict[int, Gaps] = field(default_factory=dict)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    margins: list[float | None] = field(default_factory=list)
    scores: list[tuple[float | None, float | None]] = field(default_factory=list)
    shares: list[float | None] = field(default_factory=list)
    weights: list[float | None] = field(default_factory=list)
    labels: list[bool] = field(default_factory=list)
    mismatched: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


class Limits(NamedTuple):
    """The most tokens of prompt and completion together, and of the prompt; None is no limit."""

    length: int | None = None
    prompt: int | None = None


def truncate(
    prompt_ids: list[int], completion_ids: list[int], limits: Limits, bos: int = 0
) -> tuple[list[int], list[int], bool]:
    """(prompt, completion, whether either was truncated) within the limits.

    The prompt is truncated from the left, after its first `bos` ids: models trained with a BOS degrade without one.
    Its length does not depend on the completion, so that completions of the same prompt still share it. The completion
    is truncated from the right, to one token at least, and loses its end token. Raises InputError for a length below 2.
    """
    limit = len(prompt_ids) if limits.prompt is None else max(limits.prompt, 1)
    if limits.length is not None:
        if limits.length < 2:
            raise InputError(f"max_length {limits.length}: expected 2 or more, a prompt's token and a completion's")
        limit = min(limit, limits.length - 1)
    prompt = prompt_ids
    if len(prompt_ids) > limit:
        kept = min(bos, limit - 1)
        prompt = prompt_ids[:kept] + prompt_ids[len(prompt_ids) - (limit - kept) :]
    completion = completion_ids if limits.length is None else completion_ids[: limits.length - len(prompt)]
    return prompt, completion, len(prompt) < len(prompt_ids) or len(completion) < len(completion_ids)


# --- sft -------------------------------------------------------------------------------------------------------------


def encode_examples(
    rows: Rows,
    codec: Codec,
    limits: Limits,
    *,
    field: str | None = None,
    turns: str = "all",
    overlong: str = "truncate",
) -> tuple[list[Example], dict[str, int]]:
    """Examples for sft: every token of a text is trained on; of prompt and completion, or messages, the answers.

    With `field` ("chosen") the rows are preferences, of which that completion is trained on (Preferred-FT). Of messages
    the `turns` are trained on: "all" answers or the "last". `overlong` says what happens to sequences longer than
    `limits.length`: "truncate", "drop", or "split" into windows of a text that overlap by one token, so that each token
    is predicted once. Counts: rows, examples, trained_tokens, truncated, dropped, split, too_short (no token to
    predict, or none to predict it from), duplicates (of an earlier example), refused (by the chat template),
    special_text, chats, and from_ids and ids_not_used, in rows. Raises InputError for a row without the fields, an
    overlong answer with "split", and where no example is left.
    """
    counts = dict.fromkeys(("rows", "examples", "truncated", "dropped", "split", "too_short", "special_text"), 0)
    counts |= {"from_ids": 0, "rows": len(rows.rows)}
    examples: list[list[Example]] = [[] for _ in rows.rows]

    texts = [i for i, row in enumerate(rows.rows) if field is None and shape_of(row) == "text"]
    finished = [rows.rows[i].get("finish") != "length" for i in texts]
    refused: dict[int, Refusal] = {}
    encoded_texts = codec.encode_texts(
        [rows.rows[i]["text"] for i in texts], finished, lambda n, error: refused.update({texts[n]: error})
    )
    for i, ids in zip(texts, encoded_texts, strict=True):
        examples[i] = [] if i in refused else _windows(ids, limits.length, overlong, counts)

    others = sorted(set(range(len(rows.rows))) - set(texts))
    answers = [answer for i in others for answer in answers_of(rows, i, field, turns)]
    encoded = encode_answers(rows, codec, answers, refused)
    counts |= encoded.counts | rows.skipped
    for turns_of in _turns(answers, encoded):
        row = turns_of.answer.row
        counts["from_ids"] += turns_of.answer.ids is not None
        example = _limited(turns_of, limits, codec.bos_of(turns_of.prompt), overlong, counts, rows.place(row))
        examples[row] += [example] if example else []

    read = [[rows.rows[i]["text"]] for i in texts] + [[a.prompt, a.completion] for a in answers if a.ids is None]
    count_special(rows, codec, read, counts)
    flat = [replace(example, line=line) for line, row in zip(rows.lines, examples, strict=True) for example in row]
    counts |= {"examples": len(flat), "trained_tokens": sum(example.trained for example in flat)}
    counts["duplicates"] = len(flat) - len({(e.start, *e.ids) for e in flat})
    counts["chats"] = sum(answer.prompt.is_chat for answer in answers)
    finish_counts(rows, counts, "examples")
    return flat, counts


@dataclass
class _Turns:
    """A prompt and what follows it: an answer, or several with what lies between them."""

    answer: Answer  # the first
    prompt: list[int]
    ids: list[int]
    gaps: list[tuple[int, int]] = field(default_factory=list)  # [begin, end) in `ids` of what lies between

    def example(self, limits: Limits, bos: int) -> Example | None:
        """The example within the limits; None without a prompt or a token to predict."""
        if not self.prompt or not self.ids:
            return None
        prompt, ids, _ = truncate(self.prompt, self.ids, limits, bos)
        ids, kept = cut_to(self.ids, self.gaps, len(ids))
        if not ids:
            return None
        return Example(prompt + ids, len(prompt), [(len(prompt) + b, len(prompt) + e) for b, e in kept])


def _limited(
    turns: _Turns, limits: Limits, bos: int, overlong: str, counts: dict[str, int], place: str
) -> Example | None:
    """The example of a sequence, counted; None where it is dropped. Raises InputError for one that is to be split."""
    example = turns.example(limits, bos)
    if example is None:
        counts["too_short"] += 1
        return None
    length = len(turns.prompt) + len(turns.ids)
    if len(example.ids) == length:
        return example
    if overlong == "split":
        raise InputError(
            f"{place}: {length} tokens are too many, and only a text without a prompt can be split",
            hint="use --overlong truncate or drop, or a larger --max-length",
        )
    counts["dropped" if overlong == "drop" else "truncated"] += 1
    return None if overlong == "drop" else example


def _turns(answers: list[Answer], encoded: Encoded) -> list[_Turns]:
    """The answers of each row in one sequence, as long as the prompt of each begins with all that comes before it.

    Where the template renders a dialogue's beginning otherwise once it goes on (some drop thoughts of earlier turns),
    an answer begins a sequence of its own, and follows the prompt that it answered.
    """
    found: list[_Turns] = []
    each = zip(answers, encoded.prompts, encoded.completions, encoded.gaps, strict=True)
    for answer, prompt, ids, gaps in each:
        if answer.row in encoded.refused:
            continue
        last = found[-1] if found and found[-1].answer.row == answer.row else None
        before = last.prompt + last.ids if last else []
        if last and prompt[: len(before)] == before:
            start = len(last.ids)
            last.ids = last.ids + prompt[len(before) :] + ids
            last.gaps.append((start, start + len(prompt) - len(before)))
        else:
            found.append(_Turns(answer, prompt, ids, list(gaps)))
    return found


def _windows(ids: list[int], max_length: int | None, overlong: str, counts: dict[str, int]) -> list[Example]:
    """A text's ids as examples in which every token but the first is predicted."""
    if len(ids) < 2:
        counts["too_short"] += 1
        return []
    if max_length is None or len(ids) <= max_length:
        return [Example(ids, 1)]
    if max_length < 2:
        raise InputError(f"max_length {max_length}: expected 2 or more, a token to predict and one to predict it from")
    if overlong == "drop":
        counts["dropped"] += 1
        return []
    if overlong == "split":
        counts["split"] += 1
        # A window begins with the last token of the window before: predicted there, context here.
        return [Example(ids[at : at + max_length], 1) for at in range(0, len(ids) - 1, max_length - 1)]
    counts["truncated"] += 1
    return [Example(ids[:max_length], 1)]


# --- preference pairs ------------------------------------------------------------------------------------------------


def encode_pairs(rows: Rows, codec: Codec, limits: Limits) -> PairData:
    """Preference rows as pairs of indices into unique completions, which point to unique prompts.

    Completions are the same where their ids and their prompts' ids are. Dropped and counted: pairs whose completions
    are equal after truncation, which have no gradient, and pairs with an empty prompt or completion.
    Raises InputError for a row without the fields, and where no pair is left.
    """
    counts = dict.fromkeys(("rows", "pairs", "truncated", "equal_dropped", "empty_dropped", "special_text"), 0)
    counts |= {"from_ids": 0, "rows": len(rows.rows)}
    answers = [answer_of(rows, i, name) for i in range(len(rows.rows)) for name in ("chosen", "rejected")]
    encoded = encode_answers(rows, codec, answers)
    counts |= encoded.counts | rows.skipped
    counts["chats"] = sum(answer.prompt.is_chat for answer in answers) // 2
    unique = UniqueCompletions(PairData(counts=counts))
    for i, row in enumerate(rows.rows):
        if i in encoded.refused:
            continue
        both = slice(2 * i, 2 * i + 2)
        counts["from_ids"] += all(answer.ids is not None for answer in answers[both])
        chosen, rejected = (within(encoded, n, limits, codec) for n in (2 * i, 2 * i + 1))
        if not chosen or not rejected:
            counts["empty_dropped"] += 1
            continue
        if chosen[:2] == rejected[:2]:
            counts["equal_dropped"] += 1
            continue
        counts["truncated"] += chosen.cut or rejected.cut
        unique.data.pairs.append((unique.index(*chosen[:3]), unique.index(*rejected[:3])))
        unique.data.lines.append(rows.lines[i])
        unique.data.margins.append(_number(row, "margin"))
        unique.data.scores.append((_number(row, "chosen_score"), _number(row, "rejected_score")))
        unique.data.shares.append(_number(row, "chosen_share"))
        unique.data.weights.append(_number(row, "weight"))
    read = [[a.prompt, a.completion, b.completion] for a, b in _pairs_of(answers) if a.ids is None or b.ids is None]
    count_special(rows, codec, read, counts)
    counts["pairs"] = len(unique.data.pairs)
    counts["duplicates"] = counts["pairs"] - len(set(unique.data.pairs))
    finish_counts(rows, counts, "pairs")
    return unique.data


def _number(row: dict, name: str) -> float | None:
    return None if row.get(name) is None else float(row[name])


def _pairs_of(answers: list[Answer]) -> list[tuple[Answer, Answer]]:
    """(chosen, rejected) of each row."""
    return list(zip(answers[::2], answers[1::2], strict=True))


class Within(NamedTuple):
    """Prompt and completion within the limits, and whether either was cut."""

    prompt: list[int]
    completion: list[int]
    gaps: Gaps
    cut: bool


def within(encoded: Encoded, n: int, limits: Limits, codec: Codec) -> Within | None:
    """The n-th answer within the limits; None where its prompt or completion is empty."""
    prompt, completion, gaps = encoded.prompts[n], encoded.completions[n], encoded.gaps[n]
    if not prompt or not completion:
        return None
    prompt, ids, cut = truncate(prompt, completion, limits, codec.bos_of(prompt))
    if gaps:
        ids, gaps = cut_to(completion, gaps, len(ids))
    return Within(prompt, ids, gaps, cut) if ids else None


class UniqueCompletions:
    """Finds prompts and completions in `data` by their ids, and adds new ones."""

    def __init__(self, data: PairData):
        self.data = data
        self.prompt_index: dict[tuple[int, ...], int] = {}
        self.completion_index: dict[tuple[int, ...], int] = {}  # by the prompt's index, then the completion's ids

    def index(self, prompt: list[int], completion: list[int], gaps: Gaps = ()) -> int:
        """The index of a completion of a prompt."""
        data = self.data
        p = self.prompt_index.setdefault(tuple(prompt), len(data.prompts))
        if p == len(data.prompts):
            data.prompts.append(prompt)
        c = self.completion_index.setdefault((p, *completion), len(data.completions))
        if c == len(data.completions):
            data.completions.append(completion)
            data.prompt_of.append(p)
            if gaps:
                data.gaps[c] = gaps
        return c


# --- both ------------------------------------------------------------------------------------------------------------


def count_special(rows: Rows, codec: Codec, parts: Iterable[Sequence[Prompt | Text]], counts: dict[str, int]) -> None:
    """Count and warn of the rows whose texts spell a special token, among `parts`: those that are tokenised."""
    counts["special_text"] = codec.count_special(parts)
    if counts["special_text"]:
        warn(
            f"{rows.path}: {counts['special_text']} rows spell a special token of the tokenizer, which is read as "
            "plain text (for chats, give lists of messages: the chat template then writes the special tokens)"
        )


def finish_counts(rows: Rows, counts: dict[str, int], what: str) -> None:
    """Say the counts. Raises InputError where nothing is left to train on."""
    if not counts[what]:
        reasons = ", ".join(f"{counts[key]} {key}" for key in _REASONS if counts.get(key))
        raise InputError(f"{rows.path}: no {what} are left to train on ({reasons})", "check the rows and --max-length")
    if told := in_words(counts):
        say(f"{rows.path}: {told}")
