"""What is judged: two candidates for a prompt, of two completions files, or of one and its human answers or itself."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from .. import log
from ..config.judging import Judge
from ..data.readers import Rows, load_rows
from ..data.samples import Reading, SampleFiles
from ..data.stored import carried
from ..errors import InputError
from ..inference.pairing import are_equal
from .summary import key_of


@dataclass(frozen=True)
class Comparison:
    """Two candidates for a prompt; `orders` are those in which they are judged, AB or BA.

    `b_k`: the sample number of b, where a and b are samples of one file; else it is `k`, that of a. `rows`: prompt and
    completion of a and of b as their files hold them, for scorers. `a_of`, `b_of`: in a tournament the candidates'
    names.
    """

    prompt_id: str
    k: int
    prompt: str
    a: str
    b: str
    orders: tuple[str, ...]
    temperature: float | None
    step: int | None = None  # the training step at which the candidate was sampled
    canary: bool = False
    rows: tuple[dict[str, Any], ...] = ()
    b_k: int | None = None
    a_of: str | None = None
    b_of: str | None = None

    @property
    def key(self) -> str:
        """Decides the fence. Pairs of a tournament share it, so that the answers to two files' comparisons serve it."""
        k = self.k if self.b_k is None else f"{self.k}-{self.b_k}"
        return f"{self.prompt_id} {k} {self.temperature} {self.step}" + (" canary" if self.canary else "")

    @property
    def is_chat(self) -> bool:
        """Whether a text of the comparison is a list of messages, which judges see as text."""
        return any(not isinstance(text, str) for of in self.rows for text in (of["prompt"], of["completion"]))

    def shown(self, order: str) -> tuple[str, str]:
        """The candidates as they are shown in an order."""
        return (self.a, self.b) if order == "AB" else (self.b, self.a)

    def row(self, order: str, choice: str | None, criterion: str, judge: str, raw: str) -> dict[str, Any]:
        """A judgements row; `choice` is `A` or `B` as shown, `tie`, or None for no verdict; `raw` is the answer."""
        sides: dict[str | None, str] = {"A": "a", "B": "b"} if order == "AB" else {"A": "b", "B": "a"}
        row: dict[str, Any] = {
            "prompt_id": self.prompt_id,
            "k": self.k,
            "prompt": self.prompt,
            "a": self.a,
            "b": self.b,
            "order": order,
            "verdict": (sides | {"tie": "tie", None: "invalid"})[choice],
            "criterion": criterion,
            "temperature": self.temperature,
            "judge": judge,
            "raw": raw,
        }
        if self.b_k is not None:
            row["b_k"] = self.b_k
        if self.a_of is not None:
            row |= {"a_of": self.a_of, "b_of": self.b_of}
        if self.is_chat:
            row["chat"] = True
        return row | ({"canary": True} if self.canary else {}) | ({} if self.step is None else {"step": self.step})


def load(config: Judge) -> tuple[list[Comparison], dict[str, int]]:
    """(comparisons in the order of A's file, then those of the canary; how many of A's rows are compared and are not).

    With --within the pairs of each prompt's samples. Raises InputError where nothing pairs, or where the prompts of a
    pair differ.
    """
    if config.within:
        return _within(config)
    first = load_rows(config.candidates[0], "completions", skip_bad=config.skip_bad_rows, columns=config.columns)
    counterparts = None
    if len(config.candidates) == 2:
        path = config.candidates[1]
        others = load_rows(path, "completions", skip_bad=config.skip_bad_rows, columns=config.columns)
        counterparts = counterparts_in(others)
    found: list[Comparison] = []
    without = 0
    for line, row in zip(first.lines, first.rows, strict=True):
        other = _reference(row) if counterparts is None else counterpart(counterparts, first, line, row)
        if other is None:
            without += 1
            continue
        found.append(of_rows(row, other, _orders(config, row)))
        if len(found) == config.limit:
            break
    if not found:
        against = "a `reference`" if counterparts is None else config.candidates[1]
        hint = "give a second completions file" if counterparts is None else "rows pair by prompt_id, k and temperature"
        raise InputError(f"{first.path}: none of its rows has a counterpart in {against}", hint)
    if without:
        log.warn(f"{first.path}: {without} of {len(first.rows)} rows have no counterpart and are left out")
    counts = {"compared": len(found), "without_counterpart": without}
    if config.canary is not None:
        once = {c.prompt_id: c for c in reversed(found)}
        found += [_with_canary(c, config.canary) for c in reversed(once.values())]
    return found, counts | first.skipped


def _within(config: Judge) -> tuple[list[Comparison], dict[str, int]]:
    """(the pairs of each prompt's samples, how many there are)."""
    files = SampleFiles(config.candidates, Reading(config.skip_bad_rows, config.columns))
    files.require_pairs()
    orders = ("AB", "BA") if config.order == "both" and config.backend != "human" else ()
    found: list[Comparison] = []
    equal = 0
    for rows in files.groups(slice(0, len(files.ids))):
        pairs = [(a, b) for a, b in combinations(rows, 2) if not look_equal(a, b)]
        equal += len(rows) * (len(rows) - 1) // 2 - len(pairs)
        found += of_samples(pairs, orders, config.seed)
    if not found:
        raise InputError(f"{config.candidates[0]}: all samples of each prompt are equal", "there is nothing to compare")
    if equal:
        log.say(f"{config.candidates[0]}: {equal} pairs of equal samples are left out")
    found = found[: config.limit]
    return found, {"compared": len(found), "equal": equal} | dict(files.skipped)


def of_samples(pairs: Sequence[tuple[dict, dict]], orders: Sequence[str], seed: int) -> Iterator[Comparison]:
    """The comparisons of pairs of samples of a prompt; without `orders` each in a random one."""
    for a, b in pairs:
        same = {name: a.get(name) if a.get(name) == b.get(name) else None for name in ("temperature", "step")}
        texts = text_of(a["prompt"]), text_of(a["completion"], answer=True), text_of(b["completion"], answer=True)
        shown = tuple(orders) or drawn_order(seed, a["prompt_id"], f"{a['k']}-{b['k']}")
        yield Comparison(
            a["prompt_id"], a["k"], *texts, shown, same["temperature"], same["step"], rows=(a, b), b_k=b["k"]
        )


def look_equal(a: dict, b: dict) -> bool:
    """Whether a judge cannot tell two samples apart: it sees their texts alone."""
    one, other = (text_of(row["completion"], answer=True) for row in (a, b))
    return are_equal(a, b) or one == other


def of_rows(row: dict, other: dict, orders: tuple[str, ...]) -> Comparison:
    """The comparison of A's row with B's."""
    prompt, a, b = text_of(row["prompt"]), *(text_of(x["completion"], answer=True) for x in (row, other))
    when = row.get("temperature"), row.get("step")
    return Comparison(row["prompt_id"], row["k"], prompt, a, b, orders, *when, rows=(row, other))


@dataclass(frozen=True)
class Counterparts:
    """B's rows by prompt_id, k, temperature and step; by prompt_id and k alone where that is unique."""

    path: str
    by_key: dict[tuple, dict]


def counterparts_in(others: Rows) -> Counterparts:
    """The rows of B to be found by those of A."""
    rows = others.rows
    short: dict[tuple, dict] = {(r["prompt_id"], r["k"]): r for r in rows}
    full: dict[tuple, dict] = {key_of(r): r for r in rows}
    return Counterparts(others.path, full | (short if len(short) == len(rows) else {}))


def _reference(row: dict) -> dict | None:
    """A row's human answer as a completion row; None where it has none."""
    answer = row.get("reference")
    return None if answer is None else _answered_by(row, answer)


def _answered_by(row: dict, text: str | list) -> dict:
    """A row with another completion, which has no token ids and ends where its text does."""
    return {name: value for name, value in carried(row).items() if name != "finish"} | {"completion": text}


def counterpart(others: Counterparts, first: Rows, line: int, row: dict) -> dict | None:
    """The row that B has for A's row at `line`. Raises InputError where their prompts differ."""
    match = others.by_key.get(key_of(row)) or others.by_key.get((row["prompt_id"], row["k"]))
    if match is None:
        return None
    if match["prompt"] != row["prompt"]:
        raise InputError(
            f"{first.path}:{line}: prompt: differs from that of {others.path} for prompt_id {row['prompt_id']}",
            hint="both files must be completions of the same prompts",
        )
    return match


def _orders(config: Judge, row: dict) -> tuple[str, ...]:
    if config.order == "both" and config.backend != "human":
        return ("AB", "BA")
    return drawn_order(config.seed, row["prompt_id"], row["k"])


def drawn_order(seed: int, prompt_id: str, k: int | str) -> tuple[str]:
    """The random order of one comparison."""
    return (random.Random(f"order {seed} {prompt_id} {k}").choice(("AB", "BA")),)


def _with_canary(c: Comparison, text: str) -> Comparison:
    one, other = c.rows
    return replace(c, a=text, canary=True, rows=(_answered_by(one, text), other))


def text_of(value: str | list[dict], answer: bool = False) -> str:
    """Text or messages as a judge reads them: a line `role: text` for each message.

    Of an `answer` that is one message, its text alone: the role would tell it from an answer that is given as text.
    """
    if isinstance(value, str):
        return value
    if answer and len(value) == 1:
        return _message_text(value[0])
    return "\n".join(f"{m['role']}: {_message_text(m)}" for m in value)


def _message_text(message: dict) -> str:
    """Content, whether text or parts or null, and the calls of tools as JSON."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join(part for part in (content, *calls) if part)
