"""From a judge's reply to its verdict, as the command's options say: from text or JSON, and with a probability."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from ..config.judge_options import JudgeOptions
from ..config.judging_verdict import VerdictOptions
from ..config.schema import flag_named
from ..errors import InputError
from .probabilities import NO_LOGPROBS, NOT_FOUND, probability_of_a
from .prompts import Criterion
from .replies import Answer, Reply
from .structured import NO_JSON, read_json
from .verdicts import Verdict, after_thought, read_verdict

_EXPLAINED = (
    "First write one sentence that compares the two candidates and says which you prefer and why. Then write one last "
    "line that holds"
)
_ALONE = "Write one line that holds"
_FIRST_NOT_FOUND = 8  # answers: one may be odd


class Read(NamedTuple):
    """`choice`: A or B as shown, tie, or None; then `reason` says why. `p`: the probability that A is better, where
    verdicts are read from probabilities."""

    choice: str | None
    reason: str = ""
    p: float | None = None


def as_asked(criterion: Criterion, options: JudgeOptions) -> Criterion:
    """The criterion as it is asked. Under --verdict logprobs without an explanation: after one that says which is
    better, the choice is certain and its probability tells nothing.

    Raises InputError for a rubric whose lines are to be read as something else than text.
    """
    if options.judge_verdict == "text" and options.judge_answer_format == "line":
        return criterion
    if criterion.lines:
        flags = " and ".join(flag_named(options, f"judge_{name}") for name in ("verdict", "answer_format"))
        message = f"--criterion {options.criterion}: the lines of a rubric are read as text, one by one"
        raise InputError(message, f"leave {flags} out, or name one criterion")
    if options.judge_verdict == "text":
        return criterion
    return replace(criterion, template=criterion.template.replace(_EXPLAINED, _ALONE))


def read_reply(reply: Reply, options: VerdictOptions) -> Read:
    """The verdict of a reply; without one a reason, of which the part before a colon is what judgements record."""
    if not isinstance(reply, Answer) or reply.reason:
        return Read(None, reply.reason)
    choice, reason = _read_text(reply.raw, options.judge_answer_format)
    if choice is None or options.judge_verdict != "logprobs":
        return Read(choice, reason)
    if choice == "tie":
        return Read("tie", p=0.5)
    p, reason = probability_of_a(after_thought(reply.raw) or "", choice, reply.tokens)
    if p is None:
        return Read(None, reason)
    return Read("tie" if p == 0.5 else "A" if p > 0.5 else "B", p=p)


def require_logprobs(replies: Iterable[Reply | None], options: VerdictOptions) -> None:
    """Raises InputError where verdicts are read from probabilities and no answer so far has any: the rest would have
    none either."""
    if options.judge_verdict != "logprobs":
        return
    found = [read_reply(reply, options) for reply in replies if reply]
    if any(read.p is not None for read in found):
        return
    said = ""
    if any(read.reason == NO_LOGPROBS for read in found):
        said = "sends no log-probabilities, which it was asked for"
    elif sum(read.reason == NOT_FOUND for read in found) >= _FIRST_NOT_FOUND:
        said = "sends log-probabilities of tokens that do not spell its answers"
    if said:
        hint = f"{flag_named(options, 'judge_verdict')} text reads what the judge writes"
        raise InputError(f"the judge's server {said}", hint)


def _read_text(answer: str, form: str) -> Verdict:
    """The verdict of what the judge wrote: JSON if it was asked for, and unless it was required a labelled line."""
    verdict = None if form == "line" else read_json(answer)
    if verdict is not None:
        return verdict
    return Verdict(None, NO_JSON) if form == "json" else read_verdict(answer)
