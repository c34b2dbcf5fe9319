"""From what a judge wrote to its verdict: the thought is cut off, and the last labelled line counts.

Nothing is guessed: a line that names both candidates, none, or one with a reservation is no verdict. The same holds for
an answer whose thought has no end.
"""

import re
from typing import NamedTuple

from .labels import lines_of

CUT_THOUGHT = "unfinished thought"
NO_LINE = "no line with a verdict"
UNCLEAR = "unclear verdict"


class Verdict(NamedTuple):
    """`choice`: A or B as shown, tie, or None; then `reason` says why there is none."""

    choice: str | None
    reason: str = ""


def read_verdict(answer: str) -> Verdict:
    """The verdict of an answer, by the last line `Preferred: ...` after its thought."""
    text = after_thought(answer)
    if text is None:
        return Verdict(None, CUT_THOUGHT)
    lines = lines_of(text)
    labelled = [i for i, line in enumerate(lines) if _LABEL.match(line)]
    if not labelled:
        return _after_sentence(lines[-1] if lines else "")
    last = labelled[-1]
    if last and re.fullmatch(r"\W*or\W*", lines[last - 1], re.IGNORECASE):  # the request's two forms, repeated
        return Verdict(None, UNCLEAR)
    value = _value(lines[last])
    if not re.search(r"\w", value) and last + 1 < len(lines):  # the choice stands on the next line
        value = lines[last + 1]
    choice = choice_in(value)
    return Verdict(choice, "" if choice else UNCLEAR)


# --- thoughts --------------------------------------------------------------------------------------------------------

_THOUGHT = "think|thinking|thought|thoughts|reasoning|reflection|seed:think"
_TAG = re.compile(
    rf"(?P<open><(?:{_THOUGHT})>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>)"
    rf"|(?P<close></(?:{_THOUGHT})>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>)",
    re.IGNORECASE,
)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]*<\|message\|>")  # gpt-oss: analysis, commentary, final


def after_thought(answer: str) -> str | None:
    """What follows the thought; the answer itself where it has none; None where the thought has no end.

    A thought may lack its opening tag, which templates write. Tags inside a line are quotations of a candidate unless
    they stand at the answer's beginning or close what a line opened.
    """
    channels = list(_CHANNEL.finditer(answer))
    if channels:
        return answer[channels[-1].end() :] if channels[-1].group(1).lower() == "final" else None
    depth = end = 0
    quoted: int | None = None
    for tag in _TAG.finditer(answer):
        if tag["open"]:
            before = answer[: tag.start()].rpartition("\n")[2]
            if before.strip() and tag.start() != end:
                quoted = tag.end()
            else:
                depth += 1
        elif quoted is not None and "\n" not in answer[quoted : tag.start()]:
            quoted = None
        else:
            depth, end = max(0, depth - 1), tag.end()
    return None if depth else answer[end:]


# --- the labelled line -----------------------------------------------------------------------------------------------

_NOUN = (
    "candidate|answer|response|option|choice|summary|completion|continuation|output|text|reply|model|assistant|version|"
    "message|conversation|dialogue|review|article|story|translation"
)
_LABEL = re.compile(
    r"^[\W_]*(?:\d+[.)]\W*)?"
    r"(?:(?:(?:my|the)\s+)?(?:final\s+)?(?:answer|verdict|decision|choice|judge?ment)\W*[:\-\u2013\u2014]\W*)?"
    rf"(?:(?:my|the)\s+)?preferred(?:[\s*_]+(?:{_NOUN}|one))?"
    r"[\s*_\"'`)\]}]*(?:[:=]|\bis\b:?)",
    re.IGNORECASE,
)
_MARKS = r"[\s\"'`*_~$\\(){}\[\]<>|\u2018-\u201f\u00ab\u00bb]"  # quotation, brackets, Markdown, LaTeX
_NAMED = re.compile(
    rf"^{_MARKS}*(?:the\s+)?(?:(?:{_NOUN})(?:{_MARKS}|[:#\-])*)?(?P<choice>[AB])(?![^\W_]|['\u2019]\w)(?P<rest>.*)$",
    re.IGNORECASE,
)
_END = re.compile(rf"^(?:{_MARKS}|[.!,;:]|[\u2600-\u27bf\U0001f300-\U0001faff\ufe0f])*$")
_BETTER = (
    r"(?:is|was)\s+(?:(?:the|clearly|slightly|much|far|somewhat|marginally)\s+)*"
    r"(?:better|best|stronger|superior|preferred|preferable|winner|more)\b"
)
_EXPLAINED = re.compile(
    rf"^[\"'`*_~$\\)}}\]>\u2018-\u201f\u00bb]*"
    rf"(?:\s*[(\[]|\s*[,;:.]\s|\s+[\-\u2013\u2014]\s|\s*[\u2013\u2014]|\s+(?:because|since|as|due|for)\s|\s+{_BETTER})",
    re.IGNORECASE,
)
_RESERVATION = re.compile(
    r"\b(?:or|tie|tied|draw|both|either|neither|nor|equal|equally|unsure|uncertain|unclear|undecided|no preference|"
    r"not (?:sure|certain|clear|preferred|better))\b|\?",
    re.IGNORECASE,
)
_TIE = re.compile(
    rf"^(?:{_MARKS})*(?:(?:it'?s|it is|this is)\s+)?(?:an?\s+)?"
    rf"(?:tie|tied|draw|equal|equally good|both (?:are )?equal(?:ly good)?)"
    rf"(?:{_MARKS}|[.!,;:])*$",
    re.IGNORECASE,
)


def _value(line: str) -> str:
    label = _LABEL.match(line)
    return line[label.end() :].strip() if label else ""


def _after_sentence(line: str) -> Verdict:
    """The verdict of a last line that begins with a sentence: "A is shorter. Preferred: A"."""
    sentences = re.split(r"(?<=[.!?;])[\s*_]+(?=[\W_]*preferred)", line, flags=re.IGNORECASE)
    if len(sentences) == 1 or not _LABEL.match(sentences[-1]):
        return Verdict(None, NO_LINE)
    named = _NAMED.match(_value(sentences[-1]))
    if len(sentences) > 2 or not named or not _END.match(named["rest"]):
        return Verdict(None, UNCLEAR)
    return Verdict(named["choice"].upper())


def choice_in(value: str) -> str | None:
    """A, B, tie, or None: where the value names both, none, or one with a reservation."""
    if _TIE.match(value):
        return "tie"
    named = _NAMED.match(value)
    if not named:
        return None
    choice, rest = named["choice"].upper(), named["rest"]
    if _END.match(rest):
        return choice
    other = "B" if choice == "A" else "A"
    # a lower-case letter alone may be the article: "a better answer"
    names_other = re.search(rf"\b{other}\b", rest) or re.search(rf"\b(?:{_NOUN})\s+{other}\b", rest, re.IGNORECASE)
    if not _EXPLAINED.match(rest) or names_other or _RESERVATION.search(rest):
        return None
    return choice
