"""Rows in are rows out and rows rejected for a stated reason, on every stage that reads rows, over generated files."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.fault_stages import LENGTHS, UP, small_batches

FEW = settings(max_examples=3, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
WORDS = st.lists(st.sampled_from("the film was great and I liked it é 字".split()), min_size=1, max_size=6).map(
    " ".join
)
BROKEN = st.sampled_from(["{", "[1, 2]", '"text"', '{"prompt": "a"', "\x00"])
NOT_TEXT = st.sampled_from(["", "   ", 7, None, [], {"a": 1}, "\ud800"])


def files(row: dict, *fields: str):
    """Lines of a JSONL file: rows of `row`'s fields, rows in which one of `fields` is no text, broken lines, blank
    ones.

    Two good rows stand somewhere, so that no file is refused whole.
    """
    good = st.fixed_dictionaries({name: WORDS if value is None else value for name, value in row.items()})
    bad = st.builds(lambda r, name, value: r | {name: value}, good, st.sampled_from(fields), NOT_TEXT)
    lines = st.lists(st.one_of(good.map(json.dumps), bad.map(json.dumps), BROKEN, st.just("")), max_size=10)
    two = st.lists(good.map(json.dumps), min_size=2, max_size=2, unique=True)
    return st.tuples(lines, two).flatmap(lambda both: st.permutations(both[0] + both[1]))


def ran(lab, lines: list[str], args: list[str], out: str, **beside: str) -> tuple[int, dict, list[dict]]:
    """(rows in, the manifest's metrics, rows out) of a command on rows.jsonl."""
    folder = lab.folder()
    lines = [identified(i, line) for i, line in enumerate(lines)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    for name, text in beside.items():
        (folder / name.replace("_", ".")).write_text(text)
    outcome = lab.run(folder, [*args, "--skip-bad-rows", "--out", out], None, small_batches)
    assert outcome.code == 0, outcome.said + (folder / "rows.jsonl").read_text()
    manifest = folder / (f"{out}.manifest.json" if out.endswith(".jsonl") else f"{out}/manifest.json")
    made = [json.loads(line) for line in (folder / out).read_text().splitlines()] if out.endswith(".jsonl") else []
    return sum(bool(line.strip()) for line in lines), json.loads(manifest.read_text())["metrics"], made


def identified(i: int, line: str) -> str:
    """The line with a prompt_id, if it is a row."""
    if not line.startswith("{") or not line.endswith("}"):
        return line
    return json.dumps({"prompt_id": f"p{i}"} | json.loads(line))


def rejected(counts: dict) -> int:
    """Rows that were skipped: their reasons name a field, or say that the line could not be read."""
    return sum(n for name, n in counts.items() if name.startswith(("field '", "unreadable line")))


PROMPTS, COMPLETIONS = (
    files({"prompt": None}, "prompt"),
    files({"prompt": None, "completion": None}, "prompt", "completion"),
)
PAIRS = files({"prompt": None, "chosen": None, "rejected": None}, "prompt", "chosen", "rejected")
SCORER = ["--scorer", f"{UP}/classifier"]
ROWS = ["--max-new-tokens", "3", "--generation-batch-size", "4"]


@FEW
@given(lines=COMPLETIONS)
def test_score(lab, lines):
    n, counts, made = ran(lab, lines, ["score", "--data", "rows.jsonl", *SCORER], "scored.jsonl")
    assert n == len(made) + rejected(counts) and counts["rows"] == len(made)


@FEW
@given(lines=PROMPTS)
def test_sample(lab, lines):
    args = ["sample", "--model", f"{UP}/sft", "--prompts", "rows.jsonl", *ROWS, "--n", "2"]
    n, counts, made = ran(lab, lines, args, "samples.jsonl")
    assert 2 * (n - rejected(counts)) == len(made) == counts["completions"]


@FEW
@given(lines=PROMPTS, pairs=st.sampled_from(["all", "best-worst", "random"]))
def test_make_prefs(lab, lines, pairs):
    args = [
        *f"make-prefs --model {UP}/sft --prompts rows.jsonl".split(),
        *ROWS,
        *SCORER,
        "--completions",
        "3",
        "--pairs",
        pairs,
    ]
    n, counts, made = ran(lab, lines, args, "prefs.jsonl")
    assert n == counts["prompts"] + rejected(counts)
    lost = sum(counts[name] for name in ("ties", "below_margin", "duplicates", "not_picked"))
    assert 3 * counts["prompts"] == counts["pairs"] + lost and len(made) == counts["pairs"]


@FEW
@given(lines=files({"prompt": None, "completion": None, "reference": WORDS}, "prompt", "completion", "reference"))
def test_judge(lab, lines):
    n, counts, made = ran(lab, lines, ["judge", "rows.jsonl", "--backend", "scorer", *SCORER], "judged.jsonl")
    assert n == counts["compared"] + counts["without_counterpart"] + rejected(counts)
    assert len(made) == 2 * counts["compared"]


@FEW
@given(lines=COMPLETIONS)
def test_evaluate(lab, lines):
    n, _, made = ran(lab, lines, ["evaluate", "--completions", "rows.jsonl", *SCORER], "evaluated.jsonl")
    assert n == made[0]["n"] + sum(made[0].get("skipped", {}).values())


@FEW
@given(lines=COMPLETIONS, overlong=st.sampled_from(["truncate", "drop"]))
def test_sft(lab, lines, overlong):
    args = ["sft", "--model", f"{UP}/lm", "--data", "rows.jsonl", *LENGTHS, "--max-steps", "1", "--overlong", overlong]
    n, counts, _ = ran(lab, lines, args, "sft")
    assert n == counts["examples"] + counts["dropped"] + counts["too_short"] + rejected(counts)


@pytest.mark.parametrize("stage", ["train-dpo", "train-rm"])
@FEW
@given(lines=PAIRS)
def test_pairs(lab, lines, stage):
    lines = [*lines, *(json.dumps({"prompt": p, "chosen": " yes", "rejected": " no"}) for p in ("One", "Two"))]
    args = [stage, "--model", f"{UP}/sft", "--data", "rows.jsonl", *LENGTHS, "--max-steps", "1"]
    n, counts, _ = ran(lab, lines, args, "run")
    assert n == counts["pairs"] + counts["equal_dropped"] + counts["empty_dropped"] + rejected(counts)
    if stage == "train-rm":
        assert counts["pairs"] == counts["train_pairs"] + counts["validation_pairs"]


@FEW
@given(lines=PROMPTS)
def test_ppo(lab, lines):
    args = [
        *f"train-ppo --model {UP}/sft --prompts rows.jsonl --reward {UP}/classifier".split(),
        *LENGTHS,
        *"--max-new-tokens 3 --batch-size 2 --minibatch-size 2 --max-steps 1".split(),
    ]
    n, counts, _ = ran(lab, lines, args, "ppo")
    assert n == counts["prompts"] + rejected(counts)


TURN = "\n\nHuman: {}\n\nAssistant: {}"
DIALOGUE = st.builds(TURN.format, st.sampled_from(["a", "b", "c"]), st.sampled_from(["one", "two"]))


@FEW
@given(sides=st.lists(st.tuples(st.one_of(DIALOGUE, WORDS), st.one_of(DIALOGUE, WORDS)), max_size=12))
def test_prepare(lab, sides):
    """Dialogues: every row is a preference, or counted as malformed, of different prompts, or equal on both sides."""
    sides = [*sides, *((TURN.format(q, "one"), TURN.format(q, "two")) for q in ("x", "y"))]
    folder = lab.folder()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"chosen": c, "rejected": r}) + "\n" for c, r in sides))
    outcome = lab.run(folder, ["prepare", "hh", "--source", "rows.jsonl", "--test-prompts", "1", "--out", "hh"])
    assert outcome.code == 0, outcome.said
    manifest = json.loads((folder / "hh/manifest.json").read_text())
    made = sum(len((folder / f"hh/prefs.{split}.jsonl").read_text().splitlines()) for split in ("train", "test"))
    assert len(sides) == made + sum(manifest["metrics"].values())


def test_a_bad_line_in_the_middle_is_refused_with_its_number(lab):
    good = [json.dumps({"prompt": f"The film {i}", "completion": " was great"}) for i in range(5)]
    folder = lab.folder()
    (folder / "rows.jsonl").write_text("\n".join([*good[:3], good[3][:-9], *good[4:]]) + "\n")
    outcome = lab.run(folder, ["score", "--data", "rows.jsonl", *SCORER, "--out", "scored.jsonl"])
    assert outcome.code == 2 and "rows.jsonl:4: broken JSON" in outcome.said
    assert {p.name for p in folder.iterdir()} <= {"cache", "rows.jsonl", "said"}
