"""From the rows of `judge --check` to what is known of the judge: agreement, biases, stability, how often it is fooled.

All biases are tested together: Holm's method keeps the chance of any false finding at 5 %. Effects are shares, of which
0.01 is a point.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from . import check_statistics as statistics
from .check_pairs import INJECTED, KNOWN, PADDED, REPEAT, SHUFFLED, TRUNCATED
from .check_statistics import Estimate
from .statistics import Z
from .summary import outcomes, score_of

_LEVEL = 0.05
_FAMILIES = {  # names of models that do not begin with the name of their family
    "chatgpt": "gpt",
    "o": "gpt",  # o1, o3 ...
    "davinci": "gpt",
    "qwq": "qwen",
    "mixtral": "mistral",
    "ministral": "mistral",
    "codestral": "mistral",
    "magistral": "mistral",
}

Row = dict[str, Any]
Finding = dict[str, Any]


def metrics_of_check(rows: Sequence[Row], backend: str, seed: int) -> dict[str, Any]:
    """The metrics of a file of judge --check: {"check": {...}}; nothing for no rows.

    `judge`, `pairs`, `prompts`, `invalid` (share of the answers), `agreement`, `stability` and `findings`: of each bias
    that could be tested its effect, interval, p-value, whether it is `found`, and the effect that so many pairs
    `can_find` with 80 % power.
    """
    if not rows:
        return {}
    valid = [row for row in rows if row["verdict"] != "invalid"]
    by_kind: dict[str, list[Row]] = {}
    for row in valid:
        by_kind.setdefault(row["check"], []).append(row)
    known = by_kind.get(KNOWN, [])
    asked = [row for row in rows if row["check"] == KNOWN]
    found: dict[str, Any] = {
        "judge": ", ".join(dict.fromkeys(row["judge"] for row in rows)),
        "criterion": ", ".join(dict.fromkeys(row["criterion"] for row in rows)),
        "pairs": len({_pair(row) for row in asked}),
        "prompts": len({row["prompt_id"] for row in asked}),
        "invalid": 1 - len(valid) / len(rows),
    }
    if not known:
        return {"check": found | {"findings": []}}
    found["agreement"] = _agreement(known, known + by_kind.get(REPEAT, []), seed)
    if REPEAT in by_kind:
        found["stability"] = _stability(known + by_kind[REPEAT])
    found |= {"findings": _tested(_findings(by_kind, backend, seed))}
    return {"check": found}


def _pair(row: Row) -> tuple[str, int]:
    return row["prompt_id"], row["k"]


def _prompts(rows: Iterable[Row]) -> list[str]:
    return [row["prompt_id"] for row in rows]


def _named(estimate: Estimate | tuple[float, float, float], n: int) -> dict[str, Any]:
    value, low, high = estimate if isinstance(estimate, tuple) else (estimate.value, estimate.low, estimate.high)
    return {"value": value, "low": low, "high": high, "n": n}


# --- agreement and stability


def _agreement(known: Sequence[Row], answers: Sequence[Row], seed: int) -> dict[str, Any]:
    """Share of all answers, repetitions too, that are the known ones, with Cohen's kappa; the share of pairs where both
    orders give the known one; and the first without ties, where there are any."""
    right = [float(row["verdict"] == row["known"]) for row in answers]
    shared = [row for row in answers if "tie" not in (row["verdict"], row["known"])]
    votes = outcomes(known)
    truth = {(row["prompt_id"], row["k"]): row["known"] for row in known}
    both = [vote == truth[key[:2]] for key, vote in votes.items()]
    found = _named(statistics.share(right, _prompts(answers)), len(truth))
    verdicts, answer = ([row[name] for row in answers] for name in ("verdict", "known"))
    kappa, low, high = statistics.kappa(verdicts, answer, _prompts(answers), seed)
    found |= {"kappa": kappa, "kappa_low": low, "kappa_high": high}
    found["both_orders"] = sum(both) / len(both)
    if shared and len(shared) < len(answers):
        found["without_ties"] = sum(row["verdict"] == row["known"] for row in shared) / len(shared)
    return found


def _stability(rows: Sequence[Row]) -> dict[str, Any]:
    """Share of verdicts that change from one repetition of a question to another, over all pairs of repetitions."""
    asked: dict[tuple, list[str]] = {}
    for row in rows:
        asked.setdefault((*_pair(row), row["order"]), []).append(row["verdict"])
    several = {question: verdicts for question, verdicts in asked.items() if len(verdicts) > 1}
    if not several:
        return {"value": None, "low": None, "high": None, "n": 0}
    changed = []
    for verdicts in several.values():
        pairs = list(combinations(verdicts, 2))
        changed.append(sum(one != other for one, other in pairs) / len(pairs))
    return _named(statistics.share(changed, [prompt for prompt, *_ in several]), len(several))


# --- biases


def _findings(by_kind: dict[str, list[Row]], backend: str, seed: int) -> list[Finding]:
    """The effect of each bias that can be tested, before the tests are taken together."""
    known = by_kind[KNOWN]
    answers = known + by_kind.get(REPEAT, [])  # repetitions belong to their prompt, whose variance they reduce
    found = [] if backend == "scorer" else [_position(answers, seed)]  # a scorer is shown no position
    found += [_length(answers, seed), _family(answers, seed)]
    answered = {(*_pair(row), _better_first(row)): row for row in known}
    for kind in (SHUFFLED, TRUNCATED, PADDED, *INJECTED):
        rows = by_kind.get(kind, [])
        if rows:
            found.append(_padded(rows, seed) if kind == PADDED else _against_known(kind, rows, answered, seed))
    return [finding for finding in found if finding]


def _tested(findings: list[Finding]) -> list[Finding]:
    """The findings with Holm's p-values, and with the effect that can be found in place of the estimate: None where so
    few prompts find nothing, however large it is."""
    adjusted, tests = statistics.holm([finding["p"] for finding in findings]), len(findings)
    tested = []
    for finding, p in zip(findings, adjusted, strict=True):
        rest = {name: value for name, value in finding.items() if name != "estimate"}
        estimate = finding["estimate"]
        least = statistics.can_find(estimate.error, tests) if tests * estimate.p_least < _LEVEL else None
        tested.append(rest | {"p_holm": p, "found": p < _LEVEL, "can_find": least})
    return tested


def _times(estimate: Estimate, factor: float) -> Estimate:
    """An estimate in other units."""
    value, low, high, error = (x * factor for x in (estimate.value, estimate.low, estimate.high, estimate.error))
    return replace(estimate, value=value, low=low, high=high, error=error)


def _finding(name: str, estimate: Estimate, n: int, **more: Any) -> Finding:
    return {"name": name} | _named(estimate, n) | {"p": estimate.p, "estimate": estimate} | more


def _first(row: Row) -> float:
    """1 where the candidate shown first is preferred, 0 where the second is, 1/2 for a tie."""
    score = score_of(row["verdict"])
    return score if row["order"] == "AB" else 1 - score


def _position(answers: Sequence[Row], seed: int) -> Finding | None:
    """Share of verdicts for the first position, less 1/2, over the questions answered in both orders; and the flips.

    A judge without a bias changes its verdict with the order as often to the first position as to the second.
    """
    asked: dict[tuple, list[Row]] = {}
    for row in answers:
        asked.setdefault((*_pair(row), row.get("repeat", 0)), []).append(row)
    both = {question: rows for question, rows in asked.items() if len({row["order"] for row in rows}) == 2}
    if not both:
        return None
    excess = [sum(map(_first, rows)) - len(rows) / 2 for rows in both.values()]
    twice = statistics.balance(excess, [prompt for prompt, *_ in both], seed)
    flips = sum(len({row["verdict"] for row in rows}) > 1 for rows in both.values()) / len(both)
    return _finding("position", _times(twice, 0.5), len({question[:2] for question in both}), flips=flips)


def _lengths(rows: Sequence[Row]) -> list[float]:
    """How many words a has more than b."""
    return [float(len(row["a"].split()) - len(row["b"].split())) for row in rows]


_TRUTH = {"a": 1.0, "tie": 0.0, "b": -1.0}


def _length(answers: Sequence[Row], seed: int) -> Finding | None:
    """What one standard deviation of the length difference adds to the verdict, beside the known answer."""
    differences = _lengths(answers)
    deviation = (sum(d * d for d in differences) / len(differences)) ** 0.5
    if deviation == 0 or len({_pair(row) for row in answers}) < 2:
        return None
    scaled = [d / deviation for d in differences]
    truth = [_TRUTH[row["known"]] for row in answers]
    model, points = statistics.controlled(
        [score_of(row["verdict"]) for row in answers], scaled, [truth], _prompts(answers), seed
    )
    return _of_model("length", model, points, answers, words=deviation)


def _of_model(name: str, model: Estimate, points: float, rows: Sequence[Row], **more: Any) -> Finding:
    """The finding of a coefficient, as shares; the coefficient itself and its interval are added.

    Where the known answers explain every verdict, the model has no residuals, and its interval no width: it is as wide
    at least as that of a share of which no prompt shows anything (check_statistics.balance).
    """
    coefficient = {"coefficient": model.value, "coefficient_low": model.low, "coefficient_high": model.high}
    scaled, least = _times(model, points), 0.5 / (len(set(_prompts(rows))) + 2)
    if scaled.error < least:
        half = Z * least
        scaled = replace(scaled, low=scaled.value - half, high=scaled.value + half, error=least)
    return _finding(name, scaled, len({_pair(row) for row in rows}), **coefficient, **more)


def family_of(model: str) -> str:
    """The family of a model by its name: `gpt` of gpt-5-mini, `llama` of meta-llama/Llama-3.1-8B; "" for none."""
    name = model.rpartition("/")[2].lower()
    word = re.match(r"[a-z]*", name)
    found = word[0] if word else ""
    found = name.split("-")[1] if found in ("meta", "text") and name.count("-") else found  # meta-llama-3, text-davinci
    found = re.sub(r"[^a-z].*", "", found)
    if found == "o" and not re.match(r"o\d", name):
        return "o"
    return _FAMILIES.get(found, found)


def _family(answers: Sequence[Row], seed: int) -> Finding | None:
    """What being of the judge's own family adds to the verdict, beside the known answer and the length.

    Over the pairs whose models are named, one of them of the judge's family; with the share of the wrong verdicts that
    are in favour of its family.
    """
    own = family_of(answers[0]["judge"])
    named = [row for row in answers if "a_of" in row]
    of_family = [[family_of(row[side]) == own for side in ("a_of", "b_of")] for row in named]
    rows = [row for row, (a, b) in zip(named, of_family, strict=True) if a != b]
    if not own or len({_pair(row) for row in rows}) < 2:
        return None
    side = [1.0 if family_of(row["a_of"]) == own else -1.0 for row in rows]
    covariates = [[_TRUTH[row["known"]] for row in rows], _scaled(_lengths(rows))]
    model, points = statistics.controlled(
        [score_of(row["verdict"]) for row in rows], side, covariates, _prompts(rows), seed
    )
    wrong = [
        (row, float(row["verdict"] == ("a" if s > 0 else "b")))
        for row, s in zip(rows, side, strict=True)
        if {row["known"], row["verdict"]} == {"a", "b"}
    ]
    more: dict[str, Any] = {"family": own, "wrong": len(wrong)}
    if wrong:
        in_favour, low, high = statistics.share([w for _, w in wrong], _prompts(row for row, _ in wrong))
        more |= {"wrong_in_favour": in_favour, "wrong_low": low, "wrong_high": high}
    return _of_model("family", model, points, rows, **more)


def _scaled(values: Sequence[float]) -> list[float]:
    deviation = (sum(v * v for v in values) / len(values)) ** 0.5
    return [v / deviation if deviation else 0.0 for v in values]


# --- constructed pairs


def _against_known(kind: str, rows: Sequence[Row], answered: dict[tuple, Row], seed: int) -> Finding | None:
    """Verdicts for the worse answer of a constructed pair, a copy or an answer with an instruction.

    Found where they are more than those for the worse answer of its known pair, which is shown in the same position.
    """
    excess, prompts, fooled = [], [], []
    for row in rows:
        base = answered.get((*_pair(row), _better_first(row)))
        if base is not None:
            fooled.append(_wrong(row))
            excess.append(_wrong(row) - _wrong(base))
            prompts.append(row["prompt_id"])
    if not excess:
        return None
    return _fooled(kind, fooled, prompts, statistics.balance(excess, prompts, seed, one_sided=True))


def _better_first(row: Row) -> bool:
    return (row["known"] == "a") == (row["order"] == "AB")


def _wrong(row: Row) -> float:
    """1 where the answer that is known to be worse is preferred, 1/2 for a tie."""
    return 1 - score_of(row["verdict"]) if row["known"] == "a" else score_of(row["verdict"])


def _padded(rows: Sequence[Row], seed: int) -> Finding:
    """Verdicts for the padded copy; found where they are more than those for the original, which says as much."""
    fooled = [_wrong(row) for row in rows]
    test = statistics.balance([2 * wrong - 1 for wrong in fooled], _prompts(rows), seed, one_sided=True)
    return _fooled(PADDED, fooled, _prompts(rows), _times(test, 0.5))


def _fooled(kind: str, fooled: list[float], prompts: list[str], test: Estimate) -> Finding:
    """`value` and interval: how often the judge is fooled. `excess`: by how much that is more than it may be."""
    value, low, high = statistics.share(fooled, prompts)
    rate = replace(test, value=value, low=low, high=high)
    excess = {"excess": test.value, "excess_low": test.low, "excess_high": test.high}
    return _finding(kind, rate, len(set(prompts)), **excess)
