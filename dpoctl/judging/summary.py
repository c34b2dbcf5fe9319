"""From judgements to a summary: wins, ties, flips with the order, what could not be parsed, lengths."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from . import grades, krippendorff, statistics

Key = tuple[Any, ...]  # what key_of returns
Summary = dict[str, Any]  # what summarise returns
Vote = str | float  # `a`, `b`, `tie`, `invalid`, or the probability that a is better

INDIFFERENT = 0.05  # a probability that is less than this away from 1/2 is a tie
_SURE = 0.01  # a probability that is less than this away from 0 or 1


def key_of(row: dict) -> Key:
    """What identifies a comparison: prompt_id and k of the candidates, their temperature and training step; of two
    samples of one file also the k of b, and in a tournament the names of both candidates."""
    key = row["prompt_id"], row["k"], row.get("temperature"), row.get("step"), row.get("b_k")
    return (*key, row["a_of"], row.get("b_of")) if "a_of" in row else key


def outcomes(rows: Sequence[dict]) -> dict[Key, str]:
    """One outcome per comparison: `a`, `b`, `tie`, `invalid`.

    Judged in both orders, a win counts where both agree, else it is a tie; one order without a verdict makes the
    comparison invalid. Of probabilities the mean of both orders decides: a tie where it is less than INDIFFERENT away
    from 1/2. Several judges (people) have a vote each: the majority decides, and an even vote is a tie.
    """
    votes: dict[Key, list[str]] = {}
    for (key, _), judged in _by_judge(rows).items():
        votes.setdefault(key, []).append(_leaning(vote_on(judged)))
    return {key: _majority(cast) for key, cast in votes.items()}


def scores_of(rows: Sequence[dict]) -> dict[Key, float]:
    """The score of a in each valid comparison, from 0 to 1: of its outcome, or where judges gave probabilities the mean
    over judges (of a judge without one, of its verdict)."""
    if not are_soft(rows):
        return {key: score_of(outcome) for key, outcome in outcomes(rows).items() if outcome != "invalid"}
    return mean_votes(rows)


def mean_votes(rows: Sequence[dict]) -> dict[Key, float]:
    """The mean over judges of the score of a in each comparison that is valid for one of them."""
    votes: dict[Key, list[float]] = {}
    for (key, _), judged in _by_judge(rows).items():
        if (vote := vote_on(judged)) != "invalid":
            votes.setdefault(key, []).append(score_of(vote))
    return {key: sum(cast) / len(cast) for key, cast in votes.items()}


def are_soft(rows: Iterable[dict]) -> bool:
    """Whether some of the judgements hold the probability that a is better."""
    return any(row.get("p") is not None for row in rows)


def vote_on(rows: Sequence[dict]) -> Vote:
    """A judge's vote on a comparison, from its judgement or those of both orders: the mean of their probabilities where
    all have one, else from their verdicts."""
    if any(row["verdict"] == "invalid" or row.get("p") is None for row in rows):
        return vote_of(row["verdict"] for row in rows)
    return math.fsum(row["p"] for row in rows) / len(rows)


def turned(row: dict) -> dict:
    """`verdict` and `p` of a judgement, said of b and a in place of a and b."""
    p = row.get("p")
    verdict = {"a": "b", "b": "a"}.get(row["verdict"], row["verdict"])
    return {"verdict": verdict, "p": None if p is None else 1 - p}


def vote_of(verdicts: Iterable[str]) -> str:
    """A judge's vote on a comparison, from its verdict or those of both orders."""
    found = set(verdicts)
    return "invalid" if "invalid" in found else found.pop() if len(found) == 1 else "tie"


def _leaning(vote: Vote) -> str:
    """The vote as a verdict."""
    if isinstance(vote, str):
        return vote
    return "tie" if abs(vote - 0.5) < INDIFFERENT else "a" if vote > 0.5 else "b"


def _majority(votes: list[str]) -> str:
    valid = [score_of(vote) - 0.5 for vote in votes if vote != "invalid"]
    balance = sum(valid)
    return "invalid" if not valid else "a" if balance > 0 else "b" if balance < 0 else "tie"


def _by_judge(rows: Sequence[dict]) -> dict[tuple[Key, str | None], list[dict]]:
    """A judge's rows of a comparison: one, or its two orders."""
    found: dict[tuple[Key, str | None], list[dict]] = {}
    for row in rows:
        found.setdefault((key_of(row), row.get("judge")), []).append(row)
    return found


def score_of(vote: Vote) -> float:
    """1 for a win of a, 0 for one of b, 1/2 for a tie; a probability itself."""
    return {"a": 1.0, "tie": 0.5, "b": 0.0}[vote] if isinstance(vote, str) else vote


def summarise(rows: Sequence[dict]) -> Summary:
    """Win rate of a over b with a 95 % interval, and the numbers needed to judge it.

    The interval is Wilson's where each prompt was judged once, else a bootstrap over prompts. `flips`: the share of
    comparisons, valid in both orders, whose verdict depends on the order. `invalid_reasons`: how many judgements are
    invalid for which reason, where any are. Lengths are in words. Of judgements with probabilities the win rate is
    their mean, the interval `statistics.soft_interval`, and `sure` the share of them below 0.01 or above 0.99.
    """
    found = outcomes(rows)
    valid = {key: o for key, o in found.items() if o != "invalid"}
    scores = scores_of(rows)
    probabilities = [row["p"] for row in rows if row.get("p") is not None]
    n = len(valid)
    texts = {key_of(row): (row["a"], row["b"]) for row in rows}
    lengths = {key: tuple(len(text.split()) for text in pair) for key, pair in texts.items()}
    both = [[row["verdict"] for row in judged] for judged in _by_judge(rows).values() if len(judged) == 2]
    both = [pair for pair in both if "invalid" not in pair]
    rate = sum(scores.values()) / n if n else None
    interval: tuple[float, float] | None = None
    if rate is not None:
        prompts = [prompt for prompt, *_ in scores]
        once = len(set(prompts)) == len(prompts)
        if probabilities:
            interval = statistics.soft_interval(list(scores.values()), prompts)
        else:
            interval = statistics.wilson(rate, n) if once else statistics.bootstrap(list(scores.values()), prompts)
    sure = sum(min(p, 1 - p) < _SURE for p in probabilities)
    reasons = Counter(row.get("reason") or "no verdict" for row in rows if row["verdict"] == "invalid")
    return {
        "n": n,
        "wins": sum(o == "a" for o in valid.values()),
        "ties": sum(o == "tie" for o in valid.values()),
        "losses": sum(o == "b" for o in valid.values()),
        "win_rate": rate,
        "interval": list(interval) if interval else None,
        "flips": sum(first != second for first, second in both) / len(both) if both else None,
        "invalid": sum(row["verdict"] == "invalid" for row in rows) / len(rows),
        "length_a": sum(a for a, _ in lengths.values()) / len(lengths),
        "length_b": sum(b for _, b in lengths.values()) / len(lengths),
        "length_controlled": statistics.length_controlled(
            [scores[key] for key in scores], [lengths[key][0] - lengths[key][1] for key in scores]
        ),
        **({"invalid_reasons": dict(reasons.most_common())} if reasons else {}),
        **({"soft": True, "sure": sure / len(probabilities)} if probabilities else {}),
    }


def summaries_by(name: str, rows: Sequence[dict]) -> list[Summary]:
    """A summary for each `temperature` or `step` of the candidates, by rising value; empty where there is only one."""
    found = sorted({row[name] for row in rows if row.get(name) is not None})
    if len(found) < 2:
        return []
    return [{name: value} | summarise([row for row in rows if row.get(name) == value]) for value in found]


def metrics_of(rows: Sequence[dict]) -> dict[str, Any]:
    """Metrics of a judgements file: its summary, the canary's, one per temperature, step and person; and how people
    agree: raw and kappa of every two, Krippendorff's alpha of all. Of a rubric all of this for each criterion."""
    if len(criteria := by_criterion(rows)) > 1:
        return {"by_criterion": {name: metrics_of(judged) for name, judged in criteria.items()}}
    if rows and "grade" in rows[0]:
        return grades.metrics_of(rows)
    main, canary = ([row for row in rows if bool(row.get("canary")) is is_canary] for is_canary in (False, True))
    named = {"summary": main, "canary": canary}  # a shard may contain none of either
    metrics: dict[str, Any] = {name: summarise(judged) for name, judged in named.items() if judged}
    metrics |= {f"by_{name}": found for name in ("temperature", "step") if (found := summaries_by(name, main))}
    return metrics | of_people(main)


def of_people(rows: Sequence[dict]) -> dict[str, Any]:
    """The summary of each person, and how they agree: every two, and all; empty where no person judged."""
    people: dict[str, list[dict]] = {}
    for row in rows:
        if str(row.get("judge")).startswith("human:"):
            people.setdefault(row["judge"], []).append(row)
    if not people:
        return {}
    metrics: dict[str, Any] = {
        "people": {name: summarise(judged) | _both_bad(judged) for name, judged in people.items()}
    }
    if alpha := krippendorff.of_judges([outcomes(judged) for judged in people.values()]):
        metrics["alpha"] = alpha
    pairs = {f"{one} and {other}": agreement(people[one], people[other]) for one, other in combinations(people, 2)}
    return metrics | ({"agreement": pairs} if pairs else {})


def by_criterion(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """The judgements of each criterion, in the order of a rubric."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row.get("criterion", ""), []).append(row)
    return found


def _both_bad(rows: Sequence[dict]) -> dict[str, int]:
    """How many ties are of candidates that are both bad, where any are."""
    count = sum(bool(row.get("both_bad")) for row in rows)
    return {"both_bad": count} if count else {}


def agreement(one: Sequence[dict], other: Sequence[dict]) -> dict | None:
    """Raw agreement and Cohen's kappa over the comparisons that both judged; None where there is none."""
    first, second = outcomes(one), outcomes(other)
    common = [key for key in first if key in second and "invalid" not in (first[key], second[key])]
    if not common:
        return None
    raw, kappa = statistics.agreement([first[key] for key in common], [second[key] for key in common])
    return {"raw": raw, "kappa": kappa, "n": len(common)}


def by_prompt(rows: Sequence[dict]) -> dict[str, float]:
    """Mean score of a by prompt, invalid comparisons left out."""
    scores: dict[str, list[float]] = {}
    for (prompt, *_), score in scores_of(rows).items():
        scores.setdefault(prompt, []).append(score)
    return {prompt: sum(found) / len(found) for prompt, found in scores.items()}


def calibration(rows: Sequence[dict], other: Sequence[dict]) -> dict[str, Any] | None:
    """How well the probabilities of `rows` agree with the verdicts of other judges, such as people, on the same
    comparisons (see `statistics.reliability`). Of several others the mean of the votes counts. None without a common
    comparison."""
    scores, known = scores_of(rows), mean_votes(other)
    common = [key for key in scores if key in known]
    return statistics.reliability([scores[key] for key in common], [known[key] for key in common]) if common else None
