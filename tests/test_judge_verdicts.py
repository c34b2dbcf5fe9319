"""Verdicts: what a judge's answer says, over the forms in which language models write their last line."""

import pytest

from dpoctl.judging.verdicts import CUT_THOUGHT, NO_LINE, UNCLEAR, read_verdict

LAST_LINES = [
    ("Preferred: A", "A"),
    ("Preferred: B", "B"),
    ("preferred: b", "B"),
    ("PREFERRED: B!", "B"),
    ("Preferred : A", "A"),
    ("Preferred:A", "A"),
    ("Preferred: A.", "A"),
    ("Preferred: A ✅", "A"),
    ("Preferred: Candidate A", "A"),
    ("Preferred: candidate b", "B"),
    ("Preferred: Candidate_A", "A"),
    ("Preferred: Answer A", "A"),
    ("Preferred: Response A.", "A"),
    ("Preferred: Summary B", "B"),
    ("Preferred: the continuation B", "B"),
    ("Preferred: Assistant A", "A"),
    ("Preferred: Candidate A (Answer)", "A"),
    ("Preferred: A (it is more concise)", "A"),
    ("Preferred: B (it gives a clear answer)", "B"),
    ("Preferred: A - it is shorter", "A"),
    ("Preferred: A \u2014 it does not ramble", "A"),
    ("Preferred: A, since it is shorter", "A"),
    ("Preferred: A because it is shorter", "A"),
    ("Preferred: A. It is shorter", "A"),
    ("Preferred: Option A: shorter", "A"),
    ("Preferred: A is better", "A"),
    ("Preferred: B is the better answer", "B"),
    (r"Preferred: \boxed{A}", "A"),
    (r"Preferred: $\boxed{\text{B}}$", "B"),
    (r"Preferred: \(\boxed{\textbf{A}}\)", "A"),
    (r"\boxed{Preferred: A}", "A"),
    ("**Preferred:** A", "A"),
    ("**Preferred: A**", "A"),
    ("Preferred: **B**", "B"),
    ("Preferred: **Candidate A**", "A"),
    ("Preferred: Candidate **A**", "A"),
    ("### **Preferred**: __B__", "B"),
    ("Preferred: _A_", "A"),
    ("Preferred: `A`", "A"),
    ("> Preferred: A", "A"),
    ("- Preferred: B", "B"),
    ("1. Preferred: B", "B"),
    ("Preferred: [[A]]", "A"),
    ("Preferred: (A)", "A"),
    ("Preferred: <A>", "A"),
    ("Preferred: <B>", "B"),  # not HTML's bold
    ('Preferred: "A"', "A"),
    ("Preferred: 'A'", "A"),
    ("Preferred: \u201cB\u201d.", "B"),
    ("'Preferred: A'", "A"),
    ("[Preferred: A]", "A"),
    ('{"preferred": "A"}', "A"),
    ("Preferred: <b>A</b>", "A"),
    ("<answer>Preferred: A</answer>", "A"),
    ("Preferred: A<|im_end|>", "A"),
    ("Preferred: A</s>", "A"),
    ("Preferred\uff1a\uff21", "A"),
    ("\u200bPreferred: A\u200b", "A"),
    ("Preferred candidate: B", "B"),
    ("Preferred answer: **B**", "B"),
    ("The preferred answer is B.", "B"),
    ("Final answer: Preferred: B", "B"),
    ("It is shorter. Preferred: A", "A"),
    ("It is shorter. **Preferred: A**", "A"),
    ("Preferred:\nA", "A"),
    ("**Preferred:**\n\n**Candidate B**", "B"),
    ("Preferred: A\n   \n\t\n\n", "A"),
    ("Preferred: A\n\n---\nI hope that this helps!", "A"),
    ("Preferred: A\nOn second thoughts:\nPreferred: B", "B"),
    ("Preferred: tie", "tie"),
    ("**Preferred:** Tie.", "tie"),
    ("Preferred: [[tie]]", "tie"),
    ("Preferred: a draw", "tie"),
    ("Preferred: It's a tie", "tie"),
    ("Preferred: equally good", "tie"),
    # two are named, or none, or one with a reservation
    ("Preferred: A or B", None),
    ("Preferred: A and B", None),
    ("Preferred: A/B", None),
    ("Preferred: A, B", None),
    ("Preferred: AB", None),
    ("Preferred: A > B", None),
    ("Preferred: A = B", None),
    ("Preferred: A over B", None),
    ("Preferred: A (or B)", None),
    ("Preferred: A. B is worse", None),
    ("Preferred: A (more concise than candidate b)", None),
    ("Preferred: Candidate A and Candidate B", None),
    ("Preferred: A. Preferred: B", None),
    ("Preferred: A\nor\nPreferred: B", None),
    ("Preferred: neither", None),
    ("Preferred: Neither A nor B", None),
    ("Preferred: both", None),
    ("Preferred: none", None),
    ("Preferred: N/A", None),
    ("Preferred: C", None),
    ("Preferred: not A", None),
    ("Preferred: A?", None),
    ("Preferred: A (not sure)", None),
    ("Preferred: A, but it is a tie", None),
    ("Preferred: A is not better", None),
    ("Preferred: A better candidate is the second", None),
    ("Preferred: a better answer is B", None),
    ("Preferred: A's text", None),
    ("Preferred: A+", None),
    ("Preferred: \u0410", None),  # a Cyrillic letter
    ("Preferred:", None),
    ("I prefer A", None),
    ("A", None),
    ("A is preferred by most people", None),
    ("I am the judge. Preferred: A. Stop reading.", None),
]


@pytest.mark.parametrize(("line", "choice"), LAST_LINES)
def test_the_forms_of_a_last_line(line, choice):
    for before in ("", "One is shorter, the other clearer.\n\n"):
        for end in ("", "\n", "\r\n \r\n"):
            assert read_verdict(before + line + end).choice == choice


def test_a_side_means_the_same_under_both_letters():
    """No form favours a letter: exchanging A and B in a line exchanges the verdict."""
    exchange = str.maketrans("AB", "BA")
    for line, choice in LAST_LINES:
        if "A" in line and choice in ("A", "B") and "ANSWER" not in line.upper() and "ASSISTANT" not in line.upper():
            assert read_verdict(line.translate(exchange)).choice == choice.translate(exchange), line


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("<think>\nA is longer.\nPreferred: A\n</think>\n\nPreferred: B", "B"),
        ("A is longer.\nPreferred: A\n</think>\nPreferred: B", "B"),  # opened by the template
        ("<thinking>A?</thinking><answer>Preferred: B</answer>", "B"),
        ("[THINK]Preferred: A[/THINK]Preferred: B", "B"),
        ("<|channel|>analysis<|message|>Preferred: A<|end|><|channel|>final<|message|>Preferred: B", "B"),
        ("<think>\nA has a <think> block.\n</think>\nPreferred: B", "B"),
        ("A begins with <think> for no reason.\nPreferred: B", "B"),
        ("<think></think>Preferred: B", "B"),
    ],
)
def test_a_finished_thought_is_cut_off(answer, choice):
    assert read_verdict(answer).choice == choice


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("<think>\nA is longer.\nPreferred: A", CUT_THOUGHT),
        ("<think>\nIt writes <think>x</think> itself.\nPreferred: A\n", CUT_THOUGHT),
        ("<think>one</think>\n<think>two\nPreferred: A", CUT_THOUGHT),
        ("[THINK]\nPreferred: A", CUT_THOUGHT),
        ("<|channel|>analysis<|message|>Preferred: A", CUT_THOUGHT),
        ("A is longer.\nPreferred: A\n</think>\n", NO_LINE),
        ("", NO_LINE),
        ("A is better.", NO_LINE),
        ("Preferred: A or B", UNCLEAR),
    ],
)
def test_no_verdict_has_a_reason(answer, reason):
    assert read_verdict(answer) == (None, reason)
