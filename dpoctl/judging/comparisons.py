"""What is judged: two candidates for a prompt, from two completions files or from one and its human answers."""

import random
from dataclasses import dataclass, replace

from .. import log
from ..data.schema import load_rows
from ..errors import InputError
from .summary import key_of


@dataclass(frozen=True)
class Comparison:
    """Two candidates for a prompt; `orders` are those to ask in, AB or BA."""

    prompt_id: str
    k: int
    prompt: str
    a: str
    b: str
    orders: tuple[str, ...]
    temperature: float | None
    step: int | None = None  # the training step that the candidate was sampled at
    canary: bool = False

    @property
    def key(self) -> str:
        return f"{self.prompt_id} {self.k} {self.temperature} {self.step}" + (" canary" if self.canary else "")

    def shown(self, order: str) -> tuple[str, str]:
        """The candidates as they stand in an order."""
        return (self.a, self.b) if order == "AB" else (self.b, self.a)

    def row(self, config, order: str, choice: str | None, judge: str, raw: str) -> dict:
        """A judgements row (DESIGN: judgements); `choice` is `A` or `B` as shown, `tie`, or None for no verdict."""
        sides = {"A": "a", "B": "b"} if order == "AB" else {"A": "b", "B": "a"}
        row = {"prompt_id": self.prompt_id, "k": self.k, "prompt": self.prompt, "a": self.a, "b": self.b, "order": order,
               "verdict": (sides | {"tie": "tie", None: "invalid"})[choice], "criterion": config.criterion,
               "temperature": self.temperature, "judge": judge, "raw": raw}  # fmt: skip
        return row | ({"canary": True} if self.canary else {}) | ({} if self.step is None else {"step": self.step})


def load(config) -> tuple[list[Comparison], dict[str, int]]:
    """(comparisons of `judge`'s candidates in A's order, then those of the canary; how many of A's rows are and are not).

    Raises InputError where nothing pairs, or a pair's prompts differ.
    """
    first = load_rows(config.candidates[0], "completions", skip_bad=config.skip_bad_rows)
    found, counts = [], {"compared": 0, "without_counterpart": 0}
    others = _counterparts(config) if len(config.candidates) == 2 else None
    for line, row in zip(first.lines, first.rows, strict=True):
        if others is None:
            text = row.get("reference")
        else:
            match = others.get(key_of(row)) or others.get((row["prompt_id"], row["k"]))
            text = match and match["completion"]
            if match and match["prompt"] != row["prompt"]:
                raise InputError(
                    f"{first.path}:{line}: prompt: not that of {config.candidates[1]} for prompt_id {row['prompt_id']}",
                    hint="both files must be of the same prompts",
                )
        if text is None:
            counts["without_counterpart"] += 1
            continue
        prompt, a, b = (_text(x) for x in (row["prompt"], row["completion"], text))
        when = row.get("temperature"), row.get("step")
        found.append(Comparison(row["prompt_id"], row["k"], prompt, a, b, _orders(config, row), *when))
        if len(found) == config.limit:
            break
    if not found:
        against = "a `reference`" if others is None else config.candidates[1]
        hint = "give a second completions file" if others is None else "rows pair by prompt_id, k and temperature"
        raise InputError(f"{first.path}: none of its rows has a counterpart in {against}", hint)
    counts["compared"] = len(found)
    if without := counts["without_counterpart"]:
        log.warn(f"{first.path}: {without} of {len(first.rows)} rows have no counterpart and are left out")
    if config.canary is not None:
        once = {c.prompt_id: c for c in reversed(found)}
        found += [replace(c, a=config.canary, canary=True) for c in reversed(once.values())]
    return found, counts | first.skipped


def _counterparts(config) -> dict[tuple, dict]:
    """B's rows by prompt_id, k, temperature and step; by prompt_id and k alone where that names one row."""
    rows = load_rows(config.candidates[1], "completions", skip_bad=config.skip_bad_rows).rows
    short = {(r["prompt_id"], r["k"]): r for r in rows}
    return {key_of(r): r for r in rows} | (short if len(short) == len(rows) else {})


def _orders(config, row: dict) -> tuple[str, ...]:
    if config.order == "both" and config.backend != "human":
        return ("AB", "BA")
    return (random.Random(f"order {config.seed} {row['prompt_id']} {row['k']}").choice(("AB", "BA")),)


def _text(value) -> str:
    return value if isinstance(value, str) else "\n".join(f"{m['role']}: {m['content']}" for m in value)
