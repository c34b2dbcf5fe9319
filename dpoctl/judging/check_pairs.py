"""What `judge --check` asks: pairs whose better answer is known, the same again, and pairs made of them."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .. import log
from ..config.judging import Judge
from ..data.formats import rows_of
from ..data.readers import load_rows
from ..data.stored import carried
from ..errors import InputError
from . import check_texts
from .comparisons import Comparison, text_of
from .summary import Key, key_of, outcomes

KNOWN, REPEAT = "known", "repeat"
SHUFFLED, TRUNCATED, PADDED = "shuffled", "truncated", "padded"
INJECTED = {"injected-a": "A", "injected-b": "B"}  # under which letter the worse answer is shown, and which it names
KINDS = (KNOWN, REPEAT, SHUFFLED, TRUNCATED, PADDED, *INJECTED)
_BOTH = ("AB", "BA")
# columns that name the models of a and b, or of the better and the worse answer
_MODELS_OF_AB = (("a_of", "b_of"), ("model_a", "model_b"), ("a_model", "b_model"))
_MODELS_OF_PAIR = (("chosen_of", "rejected_of"), ("chosen_model", "rejected_model"), ("chosen-model", "rejected-model"))


@dataclass(frozen=True, kw_only=True)
class Checked(Comparison):
    """A comparison of which is `known` whether a or b is better, or `tie`; `check` says what it is asked for.

    `of`: the models of a and b, where they are named. `repeat`: counts the repetitions of one question from 1.
    """

    check: str
    known: str
    repeat: int = 0
    of: tuple[str, str] | None = None

    @property
    def key(self) -> str:
        """Gives each repetition another fence, so that no answer comes from the cache of another."""
        base = super().key
        return base if self.check == KNOWN else f"{base} {self.check} {self.repeat}"

    def row(self, order: str, choice: str | None, criterion: str, judge: str, raw: str) -> dict[str, Any]:
        """A judgements row with `check` and `known`; `repeat`, `a_of` and `b_of` where there are any."""
        row = super().row(order, choice, criterion, judge, raw) | {"check": self.check, "known": self.known}
        named = {"a_of": self.of[0], "b_of": self.of[1]} if self.of else {}
        return row | named | ({"repeat": self.repeat} if self.repeat else {})


class _Pair(NamedTuple):
    """A known pair of a file; `rows`: prompt and completion of a and of b."""

    prompt_id: str
    known: str
    rows: tuple[dict[str, Any], dict[str, Any]]
    of: tuple[str, str] | None

    @property
    def texts(self) -> tuple[str, str]:
        return _texts(self.rows)


def load(config: Judge) -> tuple[list[Comparison], dict[str, int]]:
    """(the known pairs of the file, then their repetitions, then constructed pairs; how many of each kind).

    Of a preferences file the chosen answer is better, and which one is a is drawn. Raises InputError for a file that
    says of no pair which answer is better, and for invalid rows.
    """
    path = config.candidates[0]
    pairs, counts = _read(config, path)
    differing = [pair for pair in pairs if pair.texts[0] != pair.texts[1]]
    if len(differing) < len(pairs):
        log.say(f"{path}: {len(pairs) - len(differing)} pairs of equal answers are left out")
        counts["equal"] = len(pairs) - len(differing)
    if not any(pair.known != "tie" for pair in differing):
        raise InputError(f"{path}: of no pair one answer is known to be better", "give pairs with different answers")
    known = list(_numbered(differing[: config.limit]))
    repeats = 1 if config.backend == "scorer" else config.repeats  # a scorer scores each text once
    found = [*known, *(c for r in range(1, repeats) for c in _repeated(known, r))]
    found += _constructed(known, config.constructed, config.seed)
    return list(found), dict(Counter(c.check for c in found)) | counts


def _numbered(pairs: Sequence[_Pair]) -> Iterator[Checked]:
    """The pairs as comparisons, those of one prompt_id numbered by `k`."""
    ks: Counter[str] = Counter()
    for pair in pairs:
        prompt = text_of(pair.rows[0]["prompt"])
        yield Checked(
            pair.prompt_id,
            ks[pair.prompt_id],
            prompt,
            *pair.texts,
            orders=_BOTH,
            temperature=None,
            rows=pair.rows,
            check=KNOWN,
            known=pair.known,
            of=pair.of,
        )
        ks[pair.prompt_id] += 1


def _repeated(known: Sequence[Checked], repeat: int) -> Iterator[Checked]:
    return (replace(c, check=REPEAT, repeat=repeat) for c in known)


# --- the file


def _read(config: Judge, path: str) -> tuple[list[_Pair], dict[str, int]]:
    """(the pairs, counts of skipped rows). The first row tells what the file holds."""
    first = next((row for _, row in rows_of(path) if isinstance(row, dict)), {})
    given = [name for name in ("a", "b") if first.get(name) is not None]
    kind = "judgements" if "verdict" in first else "known" if len(given) == 2 else "preferences"
    rows = load_rows(path, kind, skip_bad=config.skip_bad_rows, columns=config.columns)
    if kind == "judgements":
        return _of_judgements(path, rows.rows, config), rows.skipped
    if kind == "known":
        return [_of_candidates(row) for row in rows.rows], rows.skipped
    return [_of_preference(row, config.seed, rows.place(i)) for i, row in enumerate(rows.rows)], rows.skipped


def _of_judgements(path: str, rows: Sequence[dict], config: Judge) -> list[_Pair]:
    """The votes on each comparison of a judgements file: of its people, where there are any, else of its judges."""
    if any("check" in row for row in rows):
        raise InputError(f"{path}: a file of judge --check, which holds a judge's answers", "give the known pairs")
    rows = [row for row in rows if not row.get("canary")]
    people = [row for row in rows if str(row.get("judge")).startswith("human:")]
    rows = people or rows
    if config.backend == "scorer" and any(row.get("chat") for row in rows):
        hint = "give the pairs as preferences, which hold the messages"
        raise InputError(f"{path}: chats are judged as text, which a scorer does not read", hint)
    rows = _of_one_criterion(path, rows, config.criterion)
    judges = ", ".join(dict.fromkeys(str(row.get("judge")) for row in rows))
    log.say(f"{path}: taken as known is what {judges} answered")
    first: dict[Key, dict] = {}
    for row in rows:
        first.setdefault(key_of(row), row)
    votes = outcomes(rows)
    return [
        _Pair(row["prompt_id"], votes[key], _rows(row, row["a"], row["b"]), _models(row, _MODELS_OF_AB))
        for key, row in first.items()
        if votes[key] != "invalid"
    ]


def _of_one_criterion(path: str, rows: list[dict], criterion: str) -> list[dict]:
    """The rows of the judge's criterion, where there are several. Raises InputError where it is none of them."""
    names = dict.fromkeys(str(row.get("criterion")) for row in rows)
    if len(names) < 2:
        return rows
    if criterion not in names:
        hint = f"--criterion names one of them, or leave the rows of the others out: {', '.join(names)}"
        raise InputError(f"{path}: holds answers by {len(names)} criteria, none of them {criterion}", hint)
    return [row for row in rows if row.get("criterion") == criterion]


def _of_candidates(row: dict) -> _Pair:
    return _Pair(_prompt_id(row), row["preferred"], _rows(row, row["a"], row["b"]), _models(row, _MODELS_OF_AB))


def _of_preference(row: dict, seed: int, place: str) -> _Pair:
    """Chosen and rejected as a and b in an order that is drawn: if a were always better, kappa would always be 0.

    `preferred` may say `rejected` or `tie`. Raises InputError where it says something else.
    """
    known = {"chosen": "a", "rejected": "b", "tie": "tie"}.get(preferred := row.get("preferred") or "chosen")
    if known is None:
        raise InputError(f"{place}: field 'preferred': expected chosen, rejected or tie, got {preferred!r}")
    rows, of = _rows(row, row["chosen"], row["rejected"]), _models(row, _MODELS_OF_PAIR)
    for i, side in enumerate(("chosen", "rejected")):
        if row.get(f"{side}_finish") is not None:
            rows[i]["finish"] = row[f"{side}_finish"]
    key = f"known {seed} {_prompt_id(row)} {text_of(row['chosen'])} {text_of(row['rejected'])}"
    if random.Random(key).random() < 0.5:
        return _Pair(_prompt_id(row), known, rows, of)
    known = {"a": "b", "b": "a", "tie": "tie"}[known]
    return _Pair(_prompt_id(row), known, (rows[1], rows[0]), (of[1], of[0]) if of else None)


def _rows(row: dict, *answers: str | list) -> tuple[dict, dict]:
    kept = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name) is not None}
    one, other = ({"prompt_id": _prompt_id(row), "prompt": row["prompt"], "completion": a} | kept for a in answers)
    return one, other


def _prompt_id(row: dict) -> str:
    """The row's, else a digest of its prompt: pairs of one prompt belong together."""
    given = row.get("prompt_id")
    return given if given is not None else hashlib.sha256(text_of(row["prompt"]).encode()).hexdigest()[:16]


def _models(row: dict, columns: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """The names of the models of both answers, from the first columns that a row has."""
    for one, other in columns:
        if isinstance(row.get(one), str) and isinstance(row.get(other), str):
            return row[one], row[other]
    return None


# --- constructed pairs


def _constructed(known: Sequence[Checked], count: int, seed: int) -> Iterator[Checked]:
    """`count` pairs of each kind, one a prompt, made of pairs that are drawn; fewer where answers are too short."""
    order = [c for c in known if c.known != "tie"]
    random.Random(f"constructed {seed}").shuffle(order)
    for kind in (SHUFFLED, TRUNCATED, PADDED, *INJECTED):
        prompts: set[str] = set()
        for c in order:
            if len(prompts) == count:
                break
            made = None if c.prompt_id in prompts else _made(c, kind, seed)
            if made is not None:
                prompts.add(c.prompt_id)
                yield made
        if len(prompts) < min(count, len({c.prompt_id for c in order})):
            log.say(f"{kind}: {len(prompts)} pairs could be made; the other answers are too short, or not plain text")


def _made(c: Checked, kind: str, seed: int) -> Checked | None:
    """The better answer against a copy, or the better answer against the worse one with an instruction."""
    better = 0 if c.known == "a" else 1
    if kind in INJECTED:
        letter, worse = INJECTED[kind], 1 - better
        changed = _with_text(c.rows[worse], lambda text: check_texts.injected(text, letter))
        if changed is None:
            return None
        rows = (c.rows[0], changed) if worse else (changed, c.rows[1])
        order = "AB" if (worse == 0) == (letter == "A") else "BA"
        a, b = _texts(rows)
        return replace(c, check=kind, orders=(order,), rows=rows, a=a, b=b)
    rng = random.Random(f"{kind} {seed} {c.key}")
    copies: dict[str, Callable[[str], str | None]] = {
        SHUFFLED: lambda text: check_texts.shuffled(text, rng),
        TRUNCATED: check_texts.truncated,
        PADDED: check_texts.padded,
    }
    copy = _with_text(c.rows[better], copies[kind])
    if copy is None:
        return None
    rows = (c.rows[better], copy)
    a, b = _texts(rows)
    return replace(c, check=kind, known="a", rows=rows, of=None, a=a, b=b)


def _texts(rows: Sequence[dict]) -> tuple[str, str]:
    a, b = (text_of(row["completion"], answer=True) for row in rows)
    return a, b


def _with_text(row: dict, change: Callable[[str], str | None]) -> dict | None:
    """The candidate with its text changed, to be read as it stands; None where there is no such text."""
    answer = row["completion"]
    row = {name: value for name, value in carried(row).items() if name != "finish"}
    if isinstance(answer, str):
        text = change(answer)
        return None if text is None else row | {"completion": text}
    if len(answer) != 1 or not isinstance(answer[0].get("content"), str) or answer[0].get("tool_calls"):
        return None
    text = change(answer[0]["content"])
    return None if text is None else row | {"completion": [answer[0] | {"content": text}]}
