"""Labelled lines in a judge's answer: `Preferred (accuracy): A`, `Score: 7`."""

import re
import unicodedata
from collections.abc import Callable

_WRAPPERS = re.compile(
    r"\\(?:boxed|fbox|text|textbf|textit|mathbf|mathrm|emph|bm)\b\s*"
    r"|(?-i:</?b>)|</?(?:strong|i|em|u|code|p|span|mark|answer|verdict|choice|final|final_answer)\b[^>]*>|<br\s*/?>"
    r"|<\|[^|>]*\|>|</s>|<eos>|<end_of_turn>|<｜[^｜]*｜>",  # noqa: RUF001 (DeepSeek's special tokens have these bars)
    re.IGNORECASE,
)


def lines_of(text: str) -> list[str]:
    """The lines that hold something, without invisible characters, HTML, LaTeX commands and the special tokens of chat
    templates. `<b>` is HTML, `<B>` a candidate."""
    plain = (unicodedata.normalize("NFKC", _WRAPPERS.sub("", line)) for line in text.splitlines())
    return [line for of in plain if (line := "".join(c for c in of if unicodedata.category(c) != "Cf").strip())]


def labelled_value(text: str, word: str, label: str, is_value: Callable[[str], bool]) -> str | None:
    """What follows the last label of a text: `WORD (LABEL): value`, or `WORD: value` for the label "".

    `word` is a regular expression. Markup and numbering around the label are ignored, `LABEL - WORD: value` is read
    too. `LABEL: value` without the word counts where `is_value(value)`: such a line may be a sentence about the
    criterion. An empty value is that of the next line. None where no line has the label.
    """
    lines = lines_of(text)
    pattern = _pattern(word, label)
    value: str | None = None
    for i, line in enumerate(lines):
        match = pattern.match(line)
        if not match:
            continue
        found = match["value"]
        if not re.search(r"\w", found) and i + 1 < len(lines) and not re.search(r"[:=]", lines[i + 1]):
            found = lines[i + 1]
        if match["word"] or match["after"] or is_value(found):
            value = found
    return value


def _pattern(word: str, label: str) -> re.Pattern[str]:
    before = r"^[\W_]*(?:\d+[.)]\W*)?(?:(?:my|the|final|overall)\s+)*"
    if not label:
        return re.compile(rf"{before}(?P<word>{word})(?P<after>)[\s*_\"'`)\]}}]*(?:[:=]|\bis\b:?)(?P<value>.*)$", re.I)
    name = r"[\s_-]+".join(map(re.escape, re.split(r"[\s_-]+", label)))
    between = r"[\W_]*(?:(?:for|on|by|in)\b[\W_]*)?"
    named = rf"(?<![^\W_]){name}(?![^\W_])"
    after = rf"(?P<after>[\W_]*?(?:{word}))?[\s*_\"'`)\]}}]*[:=](?P<value>.*)$"
    return re.compile(rf"{before}(?P<word>(?:{word}){between})?{named}{after}", re.I)
