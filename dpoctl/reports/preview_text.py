"""What preview shows: sequences token by token, and the facts of a file.

In colour, tokens are told apart by two shades of the colour of their part. Elsewhere plain marks
show the parts: |prompt|, [answer], {cut}.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..data.codec import Codec
from ..data.pieces import pieces
from .preview_facts import Facts
from .preview_rows import Span, TokenSequence

_SHADES = {  # part -> two styles, which alternate from token to token; readable on dark and light terminals
    "prompt": ("grey93 on grey23", "grey93 on grey35"),
    "between": ("grey93 on grey23", "grey93 on grey35"),
    "answer": ("white on dark_green", "white on green4"),
    "cut": ("grey85 on dark_red strike", "grey85 on red3 strike"),
}
_END = "bold black on yellow3"
_SPECIAL = "bold"  # added to the shade of a special token
_MARKS = {"prompt": ("|", "|"), "between": ("|", "|"), "answer": ("[", "]"), "cut": ("{", "}")}
_COUNTS = (  # count, what it is shown as, the rest in words
    ("truncated", "truncated", "rows"),
    ("split", "split", "rows, into windows"),
    ("dropped", "dropped", "rows are too long"),
    ("too_short", "too short", "rows, which have no token to predict"),
    ("equal_dropped", "equal pairs", "rows are dropped: chosen and rejected are the same tokens"),
    ("empty_dropped", "empty", "rows are dropped: the prompt or a completion has no token"),
    ("special_text", "special strings", "rows spell a special token, which is read as plain text"),
    ("from_ids", "stored ids", "rows use the token ids that they carry"),
    ("ids_not_used", "ids not used", "rows carry token ids of other texts, and are tokenised"),
    ("duplicates", "duplicates", "rows are the same tokens as an earlier row"),
)
_NO_TEXT = "◌"
_SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_CUT_SHOWN = 8  # tokens shown of a part that was cut
_BAR = 32
_MAX_WIDTH = 110
_PIPE_WIDTH = 150  # where stdout is no terminal, so that no line wraps
_INDENT = 4


class Look(NamedTuple):
    """How tokens are shown."""

    codec: Codec
    trained: str  # what a command does with answers, in a word
    with_ids: bool = False
    coloured: bool = True


class Shown(NamedTuple):
    """A part of a sequence with the text of each of its tokens."""

    span: Span
    texts: list[str]


def console_of() -> tuple[Console, bool]:
    """(a console on stdout, whether it shows colours)."""
    console = Console(highlight=False)
    console.width = min(console.width, _MAX_WIDTH) if console.is_terminal else _PIPE_WIDTH
    return console, bool(console.is_terminal and console.color_system and not console.no_color)


# --- sequences


def show_row(console: Console, title: str, parts: Sequence[tuple[str, Sequence[Shown]]], look: Look) -> None:
    """Print a row: its title, then each part's label above its tokens."""
    console.print(Text(title, style="bold"), soft_wrap=True)
    for name, shown in parts:
        for label, tokens in _labelled(name, shown, look):
            console.print(Text(f"  {label}", style="dim" if look.coloured else ""), soft_wrap=True)
            tokens.rstrip()
            if look.coloured:
                console.print(Padding(tokens, (0, 0, 0, _INDENT), expand=False))
            else:
                indent = " " * _INDENT
                console.print(Text(indent + tokens.plain.replace("\n", f"\n{indent}")), soft_wrap=True)
    console.print()


def parts_of(sequences: Sequence[TokenSequence], codec: Codec, stops: frozenset[int]) -> list[tuple[str, list[Shown]]]:
    """(name, spans) of the parts of a row; the prompt that a pair shares stands once, before both completions."""
    shown = [with_text(sequence.spans(codec, stops), codec) for sequence in sequences]
    names = [sequence.name for sequence in sequences]
    if len(names) > 1 and len(set(names)) == 1:  # windows, or answers that follow different renderings of a dialogue
        names = [f"{name}, sequence {n} of {len(names)}" for n, name in enumerate(names, 1)]
    heads = [[each[n] for n in range(len(each)) if _is_prompt(each, n)] for each in shown]
    if len(heads) != 2 or heads[0] != heads[1] or "," in names[0]:
        return list(zip(names, shown, strict=True))
    size = len(heads[0])
    return [("prompt", heads[0]), *((name, each[size:]) for name, each in zip(names, shown, strict=True))]


def with_text(spans: Sequence[Span], codec: Codec) -> list[Shown]:
    """Consecutive spans with the text of each of their tokens."""
    texts = iter(pieces(codec.tokenizer, [id for span in spans for id in span.ids]))
    return [Shown(span, [next(texts) for _ in span.ids]) for span in spans]


def _is_prompt(shown: Sequence[Shown], n: int) -> bool:
    """Whether a part is the prompt's, or was cut from it: then the rest of the prompt comes after it."""
    kind = shown[n].span.kind
    return kind == "prompt" or (kind == "cut" and any(later.span.kind == "prompt" for later in shown[n:]))


def _labelled(name: str, shown: Sequence[Shown], look: Look) -> list[tuple[str, Text]]:
    """(label, tokens) of each stretch: the prompt, each answer, what lies between answers, what was cut at the end."""
    found: list[tuple[str, Text]] = []
    prompt = [each for n, each in enumerate(shown) if _is_prompt(shown, n)]
    if prompt:
        tokens = Text()
        for each in prompt:
            tokens.append_text(_tokens(each, look))
        kept, cut = (sum(len(each.texts) for each in prompt if each.span.kind == kind) for kind in ("prompt", "cut"))
        title = "prompt" + name[name.index(",") :] if "," in name else "not predicted" if name == "text" else "prompt"
        found.append((f"{title}: {_count(kept)}{f', {cut} cut' if cut else ''}", tokens))
    answers = sum(each.span.kind == "answer" for each in shown)
    number = 0
    for n, each in enumerate(shown[len(prompt) :], len(prompt) + 1):
        number += each.span.kind == "answer"
        title = name if answers < 2 else f"answer {number} of {answers}"
        found.append((_label(title, each.span, n < len(shown), look), _tokens(each, look)))
    return found


def _label(title: str, span: Span, more: bool, look: Look) -> str:
    if span.kind != "answer":
        return f"{span.kind}: {_count(len(span.ids))}"
    name = look.codec.tokenizer.convert_ids_to_tokens(span.ids[-1])
    ends = (
        f"ends with {name!r} ({span.ids[-1]})" if span.ended else f"no end token{', since it is cut' if more else ''}"
    )
    return f"{title}: {_count(len(span.ids))} {look.trained}, {ends}"


def _count(n: int) -> str:
    return f"{n} token{'' if n == 1 else 's'}"


def _tokens(part: Shown, look: Look) -> Text:
    """The tokens of a part as they are shown."""
    span, texts = part
    special = look.codec.tokenizer.added_tokens_decoder
    opening, closing = _MARKS[span.kind]
    shown = len(span.ids) if span.kind != "cut" else min(len(span.ids), _CUT_SHOWN)
    tokens, starts = Text(), True
    for n in range(shown):
        id, text, line_break = span.ids[n], visible(texts[n]), ""
        if text.endswith("\n"):
            text, line_break = text[:-1], "\n"
        text = (text or _NO_TEXT) + (_id(id, look) if look.with_ids else "")
        style = _SHADES[span.kind][n % 2] + (f" {_SPECIAL}" if id in special else "")
        if span.ended and n == len(span.ids) - 1:
            style = _END
        if look.coloured:
            tokens.append(text, style)
        else:  # between equal marks one is enough
            tokens.append(f"{opening if starts or opening != closing else ''}{text}{closing}")
        tokens.append(line_break)
        starts = bool(line_break)
    if shown < len(span.ids):
        tokens.append(f" and {len(span.ids) - shown} more ")
    return tokens


def _id(id: int, look: Look) -> str:
    return str(id).translate(_SUBSCRIPT) if look.coloured else f" {id}"


def visible(text: str) -> str:
    """Text as it can be printed: a sign before a line break and for a tab, escapes for what is invisible."""
    signs = {"\n": "⏎\n", "\t": "⇥"}
    return "".join(signs.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def legend(look: Look) -> Text:
    """How parts are marked, in one line."""
    names = [("prompt", "prompt"), ("answer", look.trained), ("cut", "cut")]
    if not look.coloured:
        marks = [f"{_MARKS[kind][0]}{name}{_MARKS[kind][1]}" for kind, name in names]
        return Text(
            " ".join([*marks, "token by token, ⏎ line break,", f"{_NO_TEXT} a token that ends within a character"])
        )
    shown = Text()
    for kind, name in names:
        half = (len(name) + 2) // 2
        shown.append(f" {name} "[:half], _SHADES[kind][0]).append(f" {name} "[half:], _SHADES[kind][1]).append(" ")
    shown.append(" end token ", _END)
    return shown.append(f"  ⏎ line break  {_NO_TEXT} a token that ends within a character", "dim")


# --- the file


def show_facts(console: Console, title: str, facts: Facts, coloured: bool) -> None:
    """Print the facts of a file: a table of what was counted, and histograms."""
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(facts):
        table.add_row(f"  {name}", escape(value))
    console.print(table)
    for name, found in facts["lengths"].items():
        _show_lengths(console, name, found, facts["limits"].get(name), coloured)


def _lines(facts: Facts) -> list[tuple[str, str]]:
    """(what, in words) of each fact that has something to tell."""
    counts, rows = facts["counts"], facts["rows"]
    lines = [("rows", "; ".join(f"{n}: {shape}" for shape, n in facts["shapes"].items()))]
    for name in ("used", "ignored"):
        columns = facts["columns"][name]
        told = ", ".join(column if n == rows else f"{column} (in {n})" for column, n in columns.items())
        lines.append((f"columns {name}", told or "none"))
    lines += [("skipped", f"{n}: {reason}") for reason, n in facts["skipped"].items()]
    lines += [(title, f"{_share(counts[name], rows)} {words}") for name, title, words in _COUNTS if counts.get(name)]
    if facts["repeated"]:
        lines.append(("repeated", f"{facts['repeated']} more rows repeat a prompt, and are left out"))
    if facts.get("contradictions"):
        lines.append(
            ("contradictions", f"{_share(facts['contradictions'], rows)} pairs are in it the other way round too")
        )
    if facts.get("scored"):
        told = f"{facts['scored']} pairs: {facts['ties']} ties, {facts['misordered']} with the higher score rejected"
        lines.append(("scores", told))
    if labels := facts.get("labels"):
        kinds = (f"{of['completions']} {kind} ({of['tokens']} tokens trained on)" for kind, of in labels.items())
        lines.append(("labels", ", ".join(kinds)))
    lines.append(("prompts", f"{facts['prompts']} different"))
    for path, found in facts["repeated_prompts"].items():
        told = f"{_share(found['repeated'], found['rows'])} rows have a prompt of {facts['file']}"
        lines.append((path, told))
    lines.append(("ends", facts["ends"]))
    if facts.get("without_end"):
        lines.append(
            ("no end token", f"{_share(facts['without_end'], facts['answers'])} answers: cut, or `finish` is length")
        )
    return lines


def _share(n: int, total: int) -> str:
    return f"{n} of {total} ({n / max(total, 1):.1%})"


def _show_lengths(console: Console, name: str, found: Facts, limit: int | None, coloured: bool) -> None:
    title = {"prompt": "prompt", "total": "whole sequence"}[name]
    flag = {"prompt": "--max-prompt-length", "total": "--max-length"}[name]
    over = "" if limit is None else f", {found['over']} over {flag} {limit}"
    spread = f"{found['min']} to {found['max']}, median {found['median']:g}, 95% within {found['p95']}"
    console.print(f"\n[bold]{title}[/bold] in tokens: {spread}{over}", soft_wrap=True)
    if found["min"] == found["max"]:
        return
    bins = [(f"{low}-{high}" if low < high else str(low), low, high, n) for low, high, n in found["histogram"]]
    most, width = max(n for *_, n in bins), max(len(label) for label, *_ in bins)
    for label, low, high, n in bins:
        style = "green" if limit is None or high <= limit else "yellow" if low <= limit else "red"
        bar = ("█" if coloured else "#") * -(-n * _BAR // most)
        console.print(Text(f"  {label:>{width}} ").append(bar, style).append(f" {n}" if n else ""), soft_wrap=True)
