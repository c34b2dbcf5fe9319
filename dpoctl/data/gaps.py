"""Completions of several messages: what lies between the assistant's, such as the results of its tool calls.

These tokens are read, not said: they are forwarded with the rest, and no loss or log-prob counts them.
"""

from collections.abc import Sequence

Gaps = Sequence[tuple[int, int]]  # [begin, end) of the tokens that are not the assistant's, in order


class Gapped(tuple[Sequence[int], int]):
    """A sequence `(ids, start)`; of the tokens `ids[start:]` those in `gaps`, counted from `start`, are not its own."""

    gaps: Gaps

    def __new__(cls, ids: Sequence[int], start: int, gaps: Gaps) -> "Gapped":
        """The sequence, equal to the tuple without gaps."""
        made = super().__new__(cls, (ids, start))
        made.gaps = gaps
        return made


def sequence_of(prompt: list[int], completion: list[int], gaps: Gaps = ()) -> tuple[Sequence[int], int]:
    """`(ids, start)` of a prompt with a completion."""
    ids, start = prompt + completion, len(prompt)
    return Gapped(ids, start, gaps) if gaps else (ids, start)


def gaps_of(sequence: tuple[Sequence[int], int]) -> Gaps:
    """The gaps of a sequence, by far the most of which have none."""
    return sequence.gaps if isinstance(sequence, Gapped) else ()


def kept(length: int, gaps: Gaps) -> list[int]:
    """Which of a completion's `length` tokens are its own, by their places."""
    places: list[int] = []
    at = 0
    for begin, end in gaps:
        places += range(at, begin)
        at = end
    return places + list(range(at, length))


def size(sequence: tuple[Sequence[int], int]) -> int:
    """How many tokens of a sequence are its response's own."""
    ids, start = sequence
    return len(ids) - start - sum(end - begin for begin, end in gaps_of(sequence))


def first_tokens(sequence: tuple[Sequence[int], int], count: int) -> tuple[Sequence[int], int]:
    """The sequence up to the `count`-th token of its response's own."""
    ids, start = sequence
    gaps = gaps_of(sequence)
    end = kept(len(ids) - start, gaps)[count - 1] + 1
    before = [gap for gap in gaps if gap[0] < end]
    cut = list(ids[: start + end])
    return Gapped(cut, start, before) if before else (cut, start)


def cut_to(completion: list[int], gaps: Gaps, length: int) -> tuple[list[int], Gaps]:
    """The first tokens of a completion and their gaps; one that would end in a gap ends before it."""
    ids = completion[:length]
    inside = [(begin, end) for begin, end in gaps if begin < len(ids)]
    if inside and inside[-1][1] >= len(ids):
        ids = ids[: inside.pop()[0]]
    return ids, inside
