"""Who judged, and how: what a manifest of judge tells of it, for tables, and in what the judges of two files differ."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from .. import log
from ..errors import InputError
from ..outputs.manifests import STARTED_ON

# in the identity of an output of judge, but not what its judge is or is asked
_NOT_OF_THE_JUDGE = {
    *("candidates", "baseline", "add", "to", "limit", "within", "canary", "compare", "against", "answers", "form"),
    *("seed", "shard", "skip-bad-rows", "columns", "annotators", "overlap", "check", "repeats", "constructed"),
}
_FILES = ("criterion", "scorer", "model", "chat-template")  # inputs that say what the judge is
# one judge may differ in them
_MINOR = {"base-url", "batch-files", "max-tokens", "max-model-len", "dtype", "template-date", STARTED_ON}
_SHOWN_OTHERWISE = {"backend", "model", "scorer", "criterion", "order", "base-url", "batch-files"}
_ORDERS = {"both": "both orders", "random": "a random order"}


class Difference(NamedTuple):
    """An option with its values in two outputs, or with two files."""

    name: str
    text: str


class JudgedBy(NamedTuple):
    """What a table says of its judge. `details`: the other settings; `asked`: the date or dates, "" if unknown."""

    judge: str
    criterion: str
    order: str
    details: str
    asked: str

    def __str__(self) -> str:
        parts = (self.judge, f"criterion {self.criterion}", self.order, self.details)
        return ", ".join(part for part in parts if part) + (f"; asked {self.asked}" if self.asked else "")


def judged_by(manifest: dict[str, Any] | None, judges: Iterable[str], criterion: str) -> JudgedBy:
    """Who judged a file with this manifest. `judges`: the names in its rows; without one, what the options name."""
    judge = ", ".join(dict.fromkeys(name.removeprefix("human:") for name in judges))
    if manifest is None:
        return JudgedBy(judge, criterion, "", "", "")
    judge = judge or str(manifest["options"].get("scorer") or manifest["options"].get("model"))
    options, identity, cost = manifest["options"], manifest["identity"], manifest.get("cost", {})
    backend = options.get("backend")
    if backend == "human":
        judge = f"people ({judge})"
    elif identity.get("base-url"):
        judge += f" at {identity['base-url']}"
    elif backend in ("vllm", "transformers"):
        judge += f" by {backend}"
    details = [str(cost["parameters"])] if cost.get("parameters") else []
    details += _further(identity)
    order = "one order each" if backend == "human" else _ORDERS.get(str(options.get("order")), "")
    return JudgedBy(judge, criterion, order, ", ".join(details), _dates(cost))


def _further(identity: dict[str, Any]) -> list[str]:
    """Settings of the judge that are not shown elsewhere, where they are set."""
    hidden = _NOT_OF_THE_JUDGE | _SHOWN_OTHERWISE | {"max-tokens", "judge-temperature", STARTED_ON}
    defaults = (None, False, "", "auto", "joined", "refuse")
    shown = {name: value for name, value in identity.items() if name not in hidden and value not in defaults}
    return [name if value is True else f"{name} {value}" for name, value in shown.items()]


def _dates(cost: dict[str, Any]) -> str:
    """The first and the last day on which the judge was asked, also for judgements that were taken over."""
    days = sorted({str(cost[name])[:10] for name in ("first_asked", "started", "finished") if cost.get(name)})
    return " to ".join(days if len(days) < 2 else (days[0], days[-1]))


# --- judges that differ


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[Difference]:
    """In what the judges of two outputs differ, by identity and inputs of their manifests; seeds, candidates and limits
    are not theirs.

    An option that one of them does not know yet, an older version's, counts as equal.
    """
    mine, others = one["identity"], other["identity"]
    files = {name: (_hashes(one, name), _hashes(other, name)) for name in _FILES}
    left_out = _NOT_OF_THE_JUDGE | ({"criterion"} if all(files["criterion"]) else set())  # a file has any name
    names = [name for name in mine if name in others and name not in left_out]
    found = [Difference(n, f"--{n} {_value(mine[n])} and {_value(others[n])}") for n in names if mine[n] != others[n]]
    known = {difference.name for difference in found}
    for name, (here, there) in files.items():
        if here and there and here != there and name not in known:
            found.append(Difference(name, f"different files as --{name}"))
    return found or _sent(one, other)


def _sent(one: dict[str, Any], other: dict[str, Any]) -> list[Difference]:
    """The parameters that were sent, where both outputs are complete: a server may refuse one in one of them."""
    sent = [manifest.get("cost", {}).get("parameters") for manifest in (one, other)]
    return [Difference("parameters", f"parameters {sent[0]} and {sent[1]}")] if all(sent) and sent[0] != sent[1] else []


def _value(value: Any) -> str:
    return "(not given)" if value is None else str(value)


def _hashes(manifest: dict[str, Any], name: str) -> list[Any]:
    return [described.get("sha256") for described in manifest["inputs"] if described["name"] == name]


def refuse_others(path: str, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError where the judgements of `path` come from another judge; warn of minor differences."""
    found = differences(earlier, now)
    if serious := [difference.text for difference in found if difference.name not in _MINOR]:
        raise InputError(
            f"{path}: another judge decided it: {'; '.join(serious)}",
            hint="give the judge and the criterion of the tournament, or judge all candidates anew",
        )
    if found:
        log.warn(f"{path}: judged with other settings: {'; '.join(difference.text for difference in found)}")


def warn_of_others(path: str, other: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Warn where the judgements of `path`, with which others are compared, come from another judge."""
    if other is None or other.get("stage") != "judge":
        return
    if found := differences(other, now):
        log.warn(f"{path}: judged in another way: {'; '.join(d.text for d in found)} (there and here)")


def warn_of_other_question(path: str, other: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Warn where the judge of `path`, whose agreement is measured, was asked another question."""
    if other is None or other.get("stage") != "judge":
        return
    found = [d.text for d in differences(other, now) if d.name in ("criterion", "prompt-noun")]
    if found:
        log.warn(f"{path}: its judge was asked another question: {'; '.join(found)} (there and here)")
