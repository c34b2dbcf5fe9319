"""Rows to what training reads: examples for sft, unique prompts and completions with pairs of indices for the rest."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..errors import InputError
from ..log import warn
from .answers import answer_of, encode_answers, place_of
from .readers import Rows
from .schema import shape_of
from .tokens import Text, bos_length, count_special, encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REASONS = ("dropped", "too_short", "equal_dropped", "empty_dropped")


@dataclass
class Example:
    """A sequence of token ids; those from index `start` (1 or more) on are trained on. `line`: where its row is."""

    ids: list[int]
    start: int
    line: int = field(default=0, compare=False)


@dataclass
class PairData:
    """Preference pairs over unique completions: what pairs have in common is stored, and forwarded, once.

    `prompts`: ids of each unique prompt, in order of first appearance. `completions`: ids of each unique (prompt,
    completion), EOS included where the text is finished; `prompt_of` is the index of each one's prompt. `pairs`:
    (chosen, rejected) as indices of completions; `lines` the source line of each and `margins` the row's `margin`, if
    it has one. `counts`: rows, pairs, truncated, equal_dropped, empty_dropped, special_text, from_ids, all in pairs.
    """

    prompts: list[list[int]] = field(default_factory=list)
    completions: list[list[int]] = field(default_factory=list)
    prompt_of: list[int] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    margins: list[float | None] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def truncate(
    prompt_ids: list[int],
    completion_ids: list[int],
    max_length: int | None,
    max_prompt_length: int | None,
    bos: int = 0,
) -> tuple[list[int], list[int], bool]:
    """(prompt, completion, whether either was truncated), together at most `max_length` tokens; None is no limit.

    The prompt is truncated from the left, after its first `bos` ids: models trained with a BOS degrade without one.
    Its length does not depend on the completion, so that completions of the same prompt still share it. The completion
    is truncated from the right, to one token at least, and loses its EOS. Raises InputError for a max_length below 2.
    """
    limit = len(prompt_ids) if max_prompt_length is None else max(max_prompt_length, 1)
    if max_length is not None:
        if max_length < 2:
            raise InputError(f"max_length {max_length}: expected 2 or more, a prompt's token and a completion's")
        limit = min(limit, max_length - 1)
    prompt = prompt_ids
    if len(prompt_ids) > limit:
        kept = min(bos, limit - 1)
        prompt = prompt_ids[:kept] + prompt_ids[len(prompt_ids) - (limit - kept) :]
    completion = completion_ids if max_length is None else completion_ids[: max_length - len(prompt)]
    return prompt, completion, len(prompt) < len(prompt_ids) or len(completion) < len(completion_ids)


# --- sft -------------------------------------------------------------------------------------------------------------


def encode_examples(
    rows: Rows,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    max_prompt_length: int | None,
    field: str | None = None,
    overlong: str = "truncate",
) -> tuple[list[Example], dict[str, int]]:
    """Examples for sft: every token of a text is trained on; of prompt and completion, or messages, the (last) answer.

    With `field` ("chosen") the rows are preferences, of which that completion is trained on (Preferred-FT). `overlong`
    says what happens to sequences longer than `max_length`: "truncate", "drop", or "split" into windows of a text that
    overlap by one token, so that each token is predicted once. Counts: rows, examples, truncated, dropped, split,
    too_short (no token to predict, or none to predict it from), special_text and from_ids, the last two in rows.
    Raises InputError for a row without the fields, an overlong answer with "split", and where no example is left.
    """
    counts = dict.fromkeys(("rows", "examples", "truncated", "dropped", "split", "too_short", "special_text"), 0)
    counts |= {"from_ids": 0, "rows": len(rows.rows)} | rows.skipped
    examples: list[list[Example]] = [[] for _ in rows.rows]

    texts = [i for i, row in enumerate(rows.rows) if field is None and shape_of(row) == "text"]
    finished = [rows.rows[i].get("finish") != "length" for i in texts]
    for i, ids in zip(texts, encode_texts(tokenizer, [rows.rows[i]["text"] for i in texts], finished), strict=True):
        examples[i] = _windows(ids, max_length, overlong, counts)

    answers = [answer_of(rows, i, field) for i in sorted(set(range(len(rows.rows))) - set(texts))]
    bos = bos_length(tokenizer)
    for answer, prompt_ids, ids in zip(answers, *encode_answers(rows, tokenizer, answers), strict=True):
        counts["from_ids"] += answer.ids is not None
        if not prompt_ids or not ids:
            counts["too_short"] += 1
            continue
        prompt, completion, truncated = truncate(prompt_ids, ids, max_length, max_prompt_length, bos)
        if truncated and overlong == "split":
            raise InputError(
                f"{place_of(rows, answer)}: {len(prompt_ids) + len(ids)} tokens are too many, and only a text without "
                "a prompt can be split",
                hint="use --overlong truncate or drop, or a larger --max-length",
            )
        if truncated and overlong == "drop":
            counts["dropped"] += 1
            continue
        counts["truncated"] += truncated
        examples[answer.row] = [Example(prompt + completion, len(prompt))]

    parts = [[rows.rows[i]["text"]] for i in texts] + [[answer.prompt, answer.completion] for answer in answers]
    _count_special(rows, tokenizer, parts, counts)
    flat = [replace(example, line=line) for line, row in zip(rows.lines, examples, strict=True) for example in row]
    counts["examples"] = len(flat)
    _refuse_none(rows, counts, "examples")
    return flat, counts


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


def encode_pairs(
    rows: Rows,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    max_prompt_length: int | None,
) -> PairData:
    """Preference rows as pairs of indices into unique completions, which point to unique prompts.

    Completions are the same where their ids and their prompts' ids are. Dropped and counted: pairs whose completions
    are equal after truncation, which have no gradient, and pairs with an empty prompt or completion.
    Raises InputError for a row without the fields, and where no pair is left.
    """
    counts = dict.fromkeys(("rows", "pairs", "truncated", "equal_dropped", "empty_dropped", "special_text"), 0)
    counts |= {"from_ids": 0, "rows": len(rows.rows)} | rows.skipped
    answers = [answer_of(rows, i, name) for i in range(len(rows.rows)) for name in ("chosen", "rejected")]
    prompt_ids, ids = encode_answers(rows, tokenizer, answers)
    bos = bos_length(tokenizer)
    unique = _UniqueCompletions(PairData(counts=counts))
    for i, row in enumerate(rows.rows):
        both = slice(2 * i, 2 * i + 2)
        counts["from_ids"] += all(answer.ids is not None for answer in answers[both])
        if not all(prompt_ids[both]) or not all(ids[both]):
            counts["empty_dropped"] += 1
            continue
        chosen, rejected = (
            truncate(prompt, completion, max_length, max_prompt_length, bos)
            for prompt, completion in zip(prompt_ids[both], ids[both], strict=True)
        )
        if chosen[:2] == rejected[:2]:
            counts["equal_dropped"] += 1
            continue
        counts["truncated"] += chosen[2] or rejected[2]
        unique.data.pairs.append((unique.index(*chosen[:2]), unique.index(*rejected[:2])))
        unique.data.lines.append(rows.lines[i])
        unique.data.margins.append(None if row.get("margin") is None else float(row["margin"]))
    _count_special(rows, tokenizer, ([row["prompt"], row["chosen"], row["rejected"]] for row in rows.rows), counts)
    counts["pairs"] = len(unique.data.pairs)
    _refuse_none(rows, counts, "pairs")
    return unique.data


class _UniqueCompletions:
    """Finds prompts and completions in `data` by their ids, and adds new ones."""

    def __init__(self, data: PairData):
        self.data = data
        self.prompt_index: dict[tuple[int, ...], int] = {}
        self.completion_index: dict[tuple[int, ...], int] = {}  # by the prompt's index, then the completion's ids

    def index(self, prompt: list[int], completion: list[int]) -> int:
        """The index of a completion of a prompt."""
        data = self.data
        p = self.prompt_index.setdefault(tuple(prompt), len(data.prompts))
        if p == len(data.prompts):
            data.prompts.append(prompt)
        c = self.completion_index.setdefault((p, *completion), len(data.completions))
        if c == len(data.completions):
            data.completions.append(completion)
            data.prompt_of.append(p)
        return c


# --- both ------------------------------------------------------------------------------------------------------------


def _count_special(
    rows: Rows, tokenizer: "PreTrainedTokenizerBase", parts: Iterable[Sequence[Text]], counts: dict[str, int]
) -> None:
    counts["special_text"] = count_special(tokenizer, parts)
    if counts["special_text"]:
        warn(
            f"{rows.path}: {counts['special_text']} rows spell a special token of the tokenizer, which is read as "
            "plain text (for chats, give lists of messages: the chat template then writes the special tokens)"
        )


def _refuse_none(rows: Rows, counts: dict[str, int], what: str) -> None:
    if not counts[what]:
        reasons = ", ".join(f"{counts[key]} {key}" for key in _REASONS if counts.get(key))
        raise InputError(f"{rows.path}: no {what} are left to train on ({reasons})", "check the rows and --max-length")
