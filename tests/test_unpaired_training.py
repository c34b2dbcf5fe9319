"""train-dpo on single completions with a label: a plain computation, micro-batches, resuming, refusals."""

import numpy as np
import pytest
import torch

from dpoctl.cli.app import run
from dpoctl.data.encode import Limits, PairData, UniqueCompletions
from dpoctl.data.unpaired import add_mismatched
from helpers.losses import Plain, assert_resumed_with_the_same_bytes, caller, enter, metrics, small_models, write

WORDS = "the film was good bad long short dull and warm plot made me laugh cry sleep".split()
BASE = (
    "train-dpo --model m --ref r --data rows.jsonl --batch-size 6 --epochs 9 --max-steps 3 --log-every 1 --lr 1e-2 "
    "--warmup-steps 0 --optimizer adamw --beta 0.5"
)
CASES = {
    "kto": "--loss kto --unpaired --lambda-rejected 1.5",
    "bco": "--loss bco",
    "apo": "--loss apo_zero_unpaired --lambda-chosen 0.7",
    "weighted": "--loss kto --unpaired --use-weights",
}


def rows_of(n: int = 10) -> list[dict]:
    """Completions of four prompts, a third of them desirable, with scores and weights."""
    g = np.random.default_rng(1)
    rows = []
    for i in range(n):
        text = " " + " ".join(g.choice(WORDS, size=2 + i % 5))
        row = {"prompt": f"{WORDS[i % 4]} film", "completion": text, "label": i % 3 == 0}
        rows.append(row | {"score": 0.9 if i % 3 == 0 else 0.1 * (i % 3), "weight": round(float(g.uniform(0.5, 2)), 2)})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_models(tmp_path_factory.mktemp("unpaired"))


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    return enter(folder, tmp_path, monkeypatch, rows_of())


@pytest.fixture
def command(here, capsys):
    return caller(capsys)


def test_the_first_loss_is_that_of_a_plain_computation(command, here):
    """KTO's z from each prompt with the completion of the next row of another prompt, which is the next row here."""
    rows = rows_of()
    policy, reference = Plain("m"), Plain("r")

    def log_ratio(prompt: str, completion: str) -> torch.Tensor:
        return (policy.tokens(prompt, completion)[0].sum() - reference.tokens(prompt, completion)[0].sum()).detach()

    c = torch.stack([log_ratio(row["prompt"], row["completion"]) for row in rows])
    following = [*rows[1:], rows[0]]
    others = [log_ratio(row["prompt"], other["completion"]) for row, other in zip(rows, following, strict=True)]
    kl, good = torch.stack(others), torch.tensor([row["label"] for row in rows])
    w = torch.tensor([row["weight"] for row in rows], dtype=torch.float64)
    w = w / w.mean()
    z, zw = kl.mean().clamp(min=0), ((w * kl).sum() / w.sum()).clamp(min=0)
    delta = (c[good].mean() + c[~good].mean()) / 2

    def kto(z, of_bad):
        return torch.where(good, torch.sigmoid(-0.5 * (c - z)), of_bad * torch.sigmoid(0.5 * (c - z)))

    softplus = torch.nn.functional.softplus
    expected = {
        "kto": kto(z, 1.5).mean(),
        "weighted": (w * kto(zw, 1.0)).mean(),
        "bco": torch.where(good, softplus(-0.5 * (c - delta)), softplus(0.5 * (c - delta))).mean(),
        "apo": torch.where(good, 0.7 * torch.sigmoid(-0.5 * c), torch.sigmoid(0.5 * c)).mean(),
    }
    for name, value in expected.items():
        code, said = command(f"{BASE} {CASES[name]} --batch-size 10 --max-steps 1 --tokens-per-batch 30 --out {name}")
        assert code == 0 and "4 desirable and 6 undesirable completions of 4 prompts" in said, said
        row = metrics(here / name)[0]
        assert row["loss"] == pytest.approx(value.item(), rel=2e-5, abs=2e-6), name
        assert row["rewards/chosen"] == pytest.approx(0.5 * c[good].mean().item(), rel=1e-4, abs=1e-5)
        assert row["rewards/rejected"] == pytest.approx(0.5 * c[~good].mean().item(), rel=1e-4, abs=1e-5)
        threshold = {"kto": z, "weighted": zw, "bco": delta, "apo": 0.0}[name]
        assert row["rewards/accuracies"] == pytest.approx(((c > threshold) == good).double().mean().item())
    assert (w * kl).sum() / w.sum() < c[8] < 0  # where the accuracy with z is not that with the mean
    assert metrics(here / "kto")[0]["kl"] == pytest.approx(kl.mean().item(), rel=1e-4, abs=1e-5)
    assert metrics(here / "weighted")[0]["kl"] == pytest.approx(((w * kl).sum() / w.sum()).item(), rel=1e-4, abs=1e-5)
    assert metrics(here / "bco")[0]["delta"] == pytest.approx(delta.item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["bco", "weighted"])
def test_micro_batches_change_nothing(name, command, here):
    line = f"{BASE} {CASES[name]} --eval-data rows.jsonl"
    assert command(f"{line} --out one")[0] == 0
    assert command(f"{line} --tokens-per-batch 15 --out many")[0] == 0
    for a, b in zip(metrics(here / "one"), metrics(here / "many"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-4, abs=1e-5)
        assert all(b[key] == pytest.approx(value, rel=3e-3, abs=3e-4) for key, value in a.items()), (a, b)
    assert "eval/loss" in b and "eval/rewards/chosen" in b


@pytest.mark.parametrize("name", ["kto", "weighted", "bco"])
def test_each_held_out_file_has_the_metrics_of_a_run_that_evaluates_it_alone(name, command, here):
    """KTO's z among them: it is that of the file's rows, here with the same other completions."""
    rows = rows_of()
    rows[0] |= {"completion": rows[4]["completion"]}  # the last row's other completion is that of the first row
    write("one.jsonl", rows[:4])
    write("other.jsonl", [row | {"weight": 1.0} for row in rows[4:]])
    line = f"{BASE} {CASES[name]} --max-steps 1 --tokens-per-batch 30"
    both, alone = f"{line} --eval-data one.jsonl --eval-data other.jsonl", f"{line} --eval-data other.jsonl"
    assert command(f"{both} --out both")[0] == 0 and command(f"{alone} --out alone")[0] == 0
    found, expected = metrics(here / "both")[-1], metrics(here / "alone")[-1]
    compared = {key: value for key, value in expected.items() if key.startswith("eval/")}
    assert "eval/loss" in compared and len(compared) > 5
    for key, value in compared.items():
        assert found[key.replace("eval/", "eval/other/")] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_a_resumed_run_has_the_same_bytes(command, here, monkeypatch):
    line = f"{BASE} {CASES['bco']} --max-steps 5"
    total, n, other_total, other_n = assert_resumed_with_the_same_bytes(command, line, here, monkeypatch)[
        "running_means"
    ]
    assert n + other_n == 18  # of three updates
    assert metrics(here / "cut")[2]["delta"] == pytest.approx((total / n + other_total / other_n) / 2, rel=1e-5)


@pytest.mark.parametrize("name", ["weighted", "bco"])
def test_held_out_rows_that_are_the_batch_have_its_loss(name, command, here):
    """At such a learning rate the policy stands still."""
    line = f"{BASE} {CASES[name]} --lr 1e-12 --batch-size 10 --max-steps 1 --tokens-per-batch 30"
    assert command(f"{line} --eval-data rows.jsonl --out o")[0] == 0
    [row] = metrics(here / "o")
    assert row["eval/loss"] == pytest.approx(row["loss"], rel=1e-5)


def test_a_threshold_makes_labels_of_scores(command, here):
    rows = rows_of()
    line = f"{BASE} --loss bco --max-steps 2 --out"
    assert command(f"{line} labels")[0] == 0
    for field in ("label", "score"):
        write("rows.jsonl", [{k: v for k, v in row.items() if k != "label"} | {field: row["score"]} for row in rows])
        assert command(f"{line} {field} --threshold 0.5")[0] == 0
        assert metrics(here / field) == metrics(here / "labels")


def test_unbalanced_labels_are_told_with_the_weight_that_balances_them(command, here):
    write("rows.jsonl", [row | {"label": i == 0} for i, row in enumerate(rows_of())])
    code, said = command(f"{BASE} --loss bco --max-steps 1 --out o")
    assert code == 0 and "unbalanced (weighted 0.11 : 1); --lambda-chosen 9 would balance them" in said
    for out, options in (("p", "--lambda-chosen 9"), ("q", "--lambda-rejected 0")):
        code, said = command(f"{BASE} --loss bco --max-steps 1 {options} --out {out}")
        assert code == 0 and "unbalanced" not in said
    code, said = command(f"{BASE} --loss bco --max-steps 1 --lambda-chosen 18 --out t")
    assert code == 0 and "unbalanced (weighted 2 : 1); --lambda-rejected 2 would balance them" in said
    # held-out rows are not trained on, and weights count
    write("held.jsonl", rows_of())
    write("rows.jsonl", [row | {"weight": 9 if i == 0 else 1, "label": i == 0} for i, row in enumerate(rows_of())])
    code, said = command(f"{BASE} --loss bco --max-steps 1 --use-weights --eval-data held.jsonl --out s")
    assert code == 0 and "unbalanced" not in said


@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        ("--loss bco", {"label": None}, "rows.jsonl:2: field 'label': expected true or false, got nothing"),
        ("--loss bco", {"label": 0.5}, "rows.jsonl:2: field 'label': expected true or false, got 0.5"),
        ("--loss bco", {"label": "yes"}, "rows.jsonl:2: field 'label': expected a finite number, got \"yes\""),
        ("--loss bco --threshold 1", {}, "rows.jsonl:1: field 'label': expected a number, got true"),
        ("--loss bco --threshold nan", {}, "--threshold: expected a number, got nan"),
        ("--loss bco", {"weight": -1}, "rows.jsonl:2: field 'weight': expected a number of 0 or more"),
        ("--loss bco", {"completion": None}, "rows.jsonl:2: field 'completion': expected"),
        ("--loss kto --unpaired --wpo", {}, "--wpo compares the completions of a pair"),
        ("--loss kto --unpaired --ld-alpha 1", {}, "--ld-alpha compares the completions of a pair"),
        ("--loss sigmoid --unpaired", {}, "--unpaired has no effect with --loss sigmoid"),
        ("--loss kto --threshold 1", {}, "--threshold has no effect with --loss kto and without --unpaired"),
        ("--loss sigmoid,bco", {}, "--loss: 'bco' is not one of"),
        ("--loss kto", {}, "train-dpo --loss kto --unpaired (or --loss bco) trains on single completions"),
    ],
)
def test_rows_and_options_that_are_refused(options, changes, said, command):
    rows = rows_of(4)
    write("rows.jsonl", [rows[0], rows[1] | changes, *rows[2:]])
    code, found = command(f"{BASE} {options} --out o")
    assert code == 2 and said in found, found


def test_one_kind_and_one_prompt_are_refused(command, here):
    write("rows.jsonl", [row | {"label": True} for row in rows_of(4)])
    code, said = command(f"{BASE} --loss bco --out o")
    assert code == 2 and "every completion is desirable" in said
    write("rows.jsonl", [row | {"prompt": "A film"} for row in rows_of(4)])
    code, said = command(f"{BASE} --loss kto --unpaired --out o")
    assert code == 2 and "rows.jsonl: KTO's KL" in said and "there is one prompt" in said
    code, said = command(f"{BASE} --loss kto --unpaired --dry-run --out o")
    assert code == 2 and "there is one prompt" in said
    write("rows.jsonl", [{"prompt": "A", "chosen": " b", "rejected": " c"}])
    code, said = command(f"{BASE} --loss bco --out o")
    assert code == 2 and "these are pairs: leave --unpaired out, or choose a loss of pairs" in said


def test_a_plan_reads_the_same_rows(command, here, capsys):
    assert run(f"{BASE} --loss bco --dry-run --out o".split()) == 0
    shown = capsys.readouterr().out
    assert "examples" in shown and "pairs" not in shown


def test_mismatched_completions_are_of_other_prompts():
    """The next row of another prompt, cyclically; completions are cut to the length that is left."""
    unique = UniqueCompletions(PairData())
    data = unique.data
    for prompt, completion in (([1], [3]), ([1], [4]), ([2], [5]), ([1], [6, 7])):
        data.pairs.append((unique.index(prompt, completion),) * 2)
    add_mismatched(unique, Limits(2, 1))
    texts = [(data.prompts[data.prompt_of[i]], data.completions[i]) for i in data.mismatched]
    assert texts == [([1], [5]), ([1], [5]), ([2], [6]), ([1], [5])]
