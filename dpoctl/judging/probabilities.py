"""The probability of A against B where a judge writes its choice, from the log-probabilities that its server returns.

The token is found from the answer's text, not from the tokens alone: servers differ in whether the tokens of a thought
and special tokens are among them, and in whether spaces are.
"""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

NO_LOGPROBS = "no log-probabilities"
NOT_FOUND = "the verdict's token was not found"
IMPROBABLE = "A and B are improbable"

LEAST_MASS = 0.1  # of A and B together: below it the judge was about to write something else
LARGEST_ERROR = 0.02  # of p, where one candidate is not among the most probable tokens

Token = str | list[Any]  # its text, or [text, {text of each probable token: log-probability}]

_LETTER = r"(?P<letter>[AB])(?![^\W_]|['\u2019]\w)"
_NOUNS = (
    "is|the|candidate|answer|response|option|choice|summary|completion|continuation|output|text|reply|model|assistant|"
    "version|message|conversation|dialogue|review|article|story|translation|one|boxed|textbf|textit|mathbf|mathrm|b|"
    "strong|em"
)
_LINE = re.compile(  # <b> is HTML's bold, <B> a candidate
    rf"preferred(?:[\W_]|\b(?:{_NOUNS})(?![^\W_]))*?(?<![^\W_])(?!(?<=[</])(?-i:b)>){_LETTER}", re.IGNORECASE
)
_FIELD = re.compile(rf'(?<!\\)"preferred"\s*:\s*"\s*(?:candidate\s+)?{_LETTER}', re.IGNORECASE)
_ALONE = re.compile(r"[\W_]*([AB])[\W_]*", re.IGNORECASE)
_SPECIAL = re.compile(r"(?:<[^<>]*>|\[/?[A-Z_]+\])*")
_RAW = str.maketrans({"\u0120": " ", "\u2581": " ", "\u010a": "\n"})  # byte-level BPE's and SentencePiece's marks


def tokens_of(logprobs: Any) -> list[Token] | None:
    """The tokens of `choices[0].logprobs`; the alternatives of those alone that may be a choice.

    None where there are none, or in no form that is known: what the judge wrote can be read without them.
    """
    try:
        return [_token(entry) for entry in logprobs["content"]] or None
    except (TypeError, KeyError, AttributeError, ValueError):
        return None


def _token(entry: Mapping[str, Any]) -> Token:
    text, listed = _text(entry), entry.get("top_logprobs")
    if _side(text) is None or not listed:
        return text
    probable = [(_text(other), float(other["logprob"])) for other in listed]
    written = text, float(entry["logprob"])  # not every server lists it
    if not any(name == text and math.isclose(value, written[1], abs_tol=1e-4) for name, value in probable):
        probable.append(written)
    of: dict[str, float] = {}
    for name, value in probable:  # two tokens may look alike without the marks of a vocabulary
        of[name] = _sum(of.get(name), value)
    return [text, of]


def _sum(one: float | None, other: float) -> float:
    """The log-probability of one token or the other."""
    return other if one is None else math.log(max(math.exp(one) + math.exp(other), sys.float_info.min))


def probability_of_a(answer: str, choice: str, tokens: Sequence[Token] | None) -> tuple[float | None, str]:
    """(probability of A against B, or None; the reason why there is none) of an answer that was read as `choice`.

    `answer`: what follows the thought. All spellings of a letter count: " A", "A", "**A", "a". What the probability is
    conditional on is what the judge wrote before.
    """
    if tokens is None:
        return None, NO_LOGPROBS
    index = _index(answer, choice, [token if isinstance(token, str) else token[0] for token in tokens])
    if index is None:
        return None, NOT_FOUND
    token = tokens[index]
    if not isinstance(token, str):
        return _share_of_a(token[1])
    return None, NO_LOGPROBS if _side(token) else NOT_FOUND


def _share_of_a(alternatives: Mapping[str, float]) -> tuple[float | None, str]:
    mass = {"A": 0.0, "B": 0.0}
    listed = {text: math.exp(min(value, 0.0)) for text, value in alternatives.items() if not math.isnan(value)}
    for text, probability in listed.items():
        if side := _side(text):
            mass[side] += probability
    both = mass["A"] + mass["B"]
    # a token that is not listed has at most the probability of the last one, and of what the listed ones leave
    unlisted = max(0.0, min(*listed.values(), 1 - sum(listed.values()))) if len(listed) > 1 else 1 - both
    largest_error = 0.0 if mass["A"] and mass["B"] else unlisted / (both + unlisted) if both else 1.0
    if both < LEAST_MASS or largest_error > LARGEST_ERROR:
        return None, IMPROBABLE
    return mass["A"] / both, ""


def _index(answer: str, choice: str, texts: Sequence[str]) -> int | None:
    """The token that holds the letter of the choice. The answer's end from its label on must end the tokens, but for
    special ones: that tells it from the same words in a thought."""
    label = list((_FIELD if _FIELD.search(answer) else _LINE).finditer(answer))
    if not label or label[-1]["letter"].upper() != choice:
        return None
    start, letter = label[-1].start(), label[-1].start("letter")
    end, at = _squashed(answer[start:]), len(_squashed(answer[start:letter]))
    owners = [i for i, text in enumerate(texts) for _ in _squashed(text)]
    whole = "".join(map(_squashed, texts))
    place = whole.rfind(end)
    if place < 0 or not _SPECIAL.fullmatch(whole, place + len(end)):
        return None
    return owners[place + at]


def _squashed(text: str) -> str:
    """The text without white space, which some servers leave out, and without characters that several tokens spell."""
    return "".join(character for character in text if character.isascii() and not character.isspace())


def _side(text: str) -> str | None:
    """A or B where a token is a spelling of that letter and nothing else."""
    alone = _ALONE.fullmatch(text)
    return alone[1].upper() if alone else None


def _text(entry: Mapping[str, Any]) -> str:
    """A token's text: its bytes where the server gives them, else the token, with marks of vocabularies as spaces."""
    given = entry.get("bytes")
    text = bytes(given).decode("utf-8", "replace") if given else entry["token"]
    if not isinstance(text, str):
        raise TypeError("logprobs: a token is not a text")
    return text.translate(_RAW).encode("utf-8", "replace").decode()
