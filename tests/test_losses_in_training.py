"""train-dpo with losses that read scores, weights, other pairs of the batch or a reference that moves.

Numbers are compared with a plain float64 computation on the same ids; micro-batches and resuming change nothing.
"""

import hashlib
import json
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpoctl.cli.app import run
from dpoctl.outputs.files import seal
from dpoctl.outputs.manifests import read_manifest
from dpoctl.training import loop
from dpoctl.training.batch_statistics import places
from helpers.chain import COLD, ROOT, lines_in, wait_until
from helpers.losses import Plain, assert_resumed_with_the_same_bytes, caller, enter, metrics, small_models, write
from helpers.ranks import start_ranks, torchrun
from helpers.tiny_models import tiny_model

WORDS = "the film was good bad long short dull and warm plot made me laugh cry sleep it is a story".split()
BASE = (
    "train-dpo --model m --ref r --data rows.jsonl --batch-size 6 --epochs 9 --max-steps 3 --log-every 1 --lr 1e-2 "
    "--warmup-steps 0 --optimizer adamw --beta 0.5"
)
SCORED = "--score-type log-odds"
CASES = {  # options that change how losses are made of pairs, and losses that read more than a pair's log-probs
    "distill": f"--loss distill {SCORED}",
    "soft": f"--soft-labels 0.7 --label-smoothing 0.1 {SCORED}",
    "soft-exo": f"--loss exo_pair --soft-labels 0.7 --label-smoothing 0.05 {SCORED}",
    "bco": "--loss bco_pair",
    "aot": "--loss aot --label-smoothing 0.1",
    "aot-unpaired": "--loss aot_unpaired",
    "sum": "--loss sigmoid:0.8,bco_pair:0.2,sft:1",
    "js": "--f-divergence js",
    "alpha": "--f-divergence alpha --f-alpha 0.3 --loss ipo",
    "wpo": "--wpo --loss sigmoid,sft",
    "ld": "--ld-alpha 0.3 --loss rpo",
    "weights": "--use-weights --loss kto",
    "weighted-sum": "--use-weights --loss bco_pair,sft --wpo --ld-alpha 0.5",
    "moving": "--sync-ref-every 2 --sync-ref-mix 0.4 --ld-alpha 0.5",
}


def rows_of(n_prompts: int = 5) -> list[dict]:
    """Three pairs of each prompt over three completions of different lengths, with scores and weights."""
    g = np.random.default_rng(0)
    rows = []
    for p in range(n_prompts):
        texts = [" " + " ".join(g.choice(WORDS, size=2 + 3 * k + p % 2)) for k in range(3)]
        scores = g.normal(0, 2, 3).round(3).tolist()
        for i, j in ((0, 1), (0, 2), (1, 2)):
            w, l = (i, j) if scores[i] > scores[j] else (j, i)  # noqa: E741
            row = {"prompt": f"{WORDS[p]} film", "chosen": texts[w], "rejected": texts[l], "chosen_score": scores[w]}
            rows.append(row | {"rejected_score": scores[l], "weight": float(g.uniform(0.2, 3)).__round__(3)})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_models(tmp_path_factory.mktemp("losses"))


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    return enter(folder, tmp_path, monkeypatch, rows_of())


@pytest.fixture
def command(here, capsys):
    return caller(capsys)


# --- the numbers -----------------------------------------------------------------------------------------------------


def discounted(w: torch.Tensor, l: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: E741
    n = min(len(w), len(l))
    return w[:n].sum() + alpha * w[n:].sum(), l[:n].sum() + alpha * l[n:].sum()


def expected_losses(rows: list[dict]) -> dict[str, torch.Tensor]:
    """The loss of the untouched policy on all of `rows`, by case."""
    policy, reference = Plain("m"), Plain("r")
    beta, s = 0.5, torch.nn.functional.logsigmoid
    found: dict[str, list] = {name: [] for name in ("c", "r", "lc", "lr", "gap", "wpo", "nll", "n", "v", "u", "weight")}
    for row in rows:
        (w, w2), (l, l2) = (policy.tokens(row["prompt"], row[s]) for s in ("chosen", "rejected"))  # noqa: E741
        (rw, _), (rl, _) = (reference.tokens(row["prompt"], row[side]) for side in ("chosen", "rejected"))
        found["c"].append(w.sum() - rw.sum())
        found["r"].append(l.sum() - rl.sum())
        found["u"].append(w.sum() - l.sum())
        found["v"].append(rw.sum() - rl.sum())
        for name, mine, theirs in zip(("lc", "lr"), discounted(w, l, 0.3), discounted(rw, rl, 0.3), strict=True):
            found[name].append(mine - theirs)
        found["gap"].append(torch.tensor(row["chosen_score"] - row["rejected_score"], dtype=torch.float64))
        found["wpo"].append(torch.exp((w - w2).mean() + (l - l2).mean()))
        found["nll"].append(-w.sum())
        found["n"].append(torch.tensor(float(len(w)), dtype=torch.float64))
        found["weight"].append(torch.tensor(row["weight"], dtype=torch.float64))
    x = {name: torch.stack(values).detach() for name, values in found.items()}
    d, c, r = beta * (x["c"] - x["r"]), x["c"], x["r"]
    delta = beta * (c.mean() + r.mean()) / 2
    q = torch.sigmoid(x["gap"] / 0.7)
    soft, hard = q * 0.9 + (1 - q) * 0.1, q * 0.95 + (1 - q) * 0.05
    sft = x["nll"].sum() / x["n"].sum()
    won = torch.sigmoid(d)
    weight = x["weight"] / x["weight"].mean()
    z = ((weight * (c + r)).sum() / (2 * weight.sum())).clamp(min=0)
    bco = -s(beta * c - delta) - s(delta - beta * r)
    sorted_d = beta * (x["u"].sort().values - x["v"].sort().values)
    sides = beta * (c.sort().values - r.sort().values)
    kto = torch.sigmoid(-beta * (c - z)) + torch.sigmoid(-beta * (z - r))
    js = beta * (torch.log(2 * c.exp() / (1 + c.exp())) - torch.log(2 * r.exp() / (1 + r.exp())))
    alpha = ((1 - c.exp() ** -0.3) - (1 - r.exp() ** -0.3)) / 0.3
    return {
        "distill": ((d - x["gap"]) ** 2).mean(),
        "soft": (-soft * s(d) - (1 - soft) * s(-d)).mean(),
        "soft-exo": (won * (won / hard).log() + (1 - won) * ((1 - won) / (1 - hard)).log()).mean(),
        "bco": bco.mean(),
        "aot": (-0.9 * s(sorted_d) - 0.1 * s(-sorted_d)).mean(),
        "aot-unpaired": -s(sides).mean(),
        "sum": 0.8 * -s(d).mean() + 0.2 * bco.mean() + sft,
        "js": -s(js).mean(),
        "alpha": ((alpha - 1) ** 2).mean(),
        "wpo": (x["wpo"] * (-s(d) + x["nll"] / x["n"].mean())).mean(),
        "ld": (-s(beta * (x["lc"] - x["lr"])) + x["nll"] / x["n"]).mean(),
        "weights": (weight * kto).mean(),
    }


def test_the_first_loss_is_that_of_a_plain_computation(command, here):
    """One batch of all rows, of which the loss is logged before anything is learnt, in several micro-batches."""
    expected = expected_losses(rows_of())
    assert expected.keys() >= {"distill", "soft", "bco", "aot", "aot-unpaired", "sum", "wpo", "ld", "weights"}
    cases = CASES | {"ld-moving": f"{CASES['ld']} --sync-ref-every 9"}
    for name, value in (expected | {"ld-moving": expected["ld"]}).items():
        line = f"{BASE} {cases[name]} --batch-size 15 --max-steps 1 --tokens-per-batch 40"
        code, said = command(f"{line} --out {name}")
        assert code == 0, said
        # float32 log-probs near -100
        assert metrics(here / name)[0]["loss"] == pytest.approx(value.item(), rel=2e-5, abs=2e-6), name


@pytest.mark.parametrize("name", ["aot-unpaired", "weighted-sum", "moving"])
def test_micro_batches_change_nothing(name, command, here):
    """Three updates, and a held-out loss: a batch in one forward pass or in several."""
    for out, tokens in (("one", 8192), ("many", 30)):
        line = f"{BASE} {CASES[name]} --tokens-per-batch {tokens} --eval-data rows.jsonl --out {out}"
        code, said = command(line)
        assert code == 0, said
    one, many = metrics(here / "one"), metrics(here / "many")
    assert len(one) == 3 and "eval/loss" in one[-1]
    for a, b in zip(one, many, strict=True):
        assert all(b[key] == pytest.approx(value, rel=2e-3, abs=2e-4) for key, value in a.items()), (a, b)
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["bco", "aot-unpaired", "weighted-sum"])
def test_held_out_rows_that_are_the_batch_have_its_loss(name, command, here):
    """Their statistics are of the same kind; at such a learning rate the policy stands still."""
    line = f"{BASE} {CASES[name]} --lr 1e-12 --batch-size 15 --max-steps 1 --tokens-per-batch 40"
    assert command(f"{line} --eval-data rows.jsonl --out o")[0] == 0
    [row] = metrics(here / "o")
    assert row["eval/loss"] == pytest.approx(row["loss"], rel=1e-5)


@pytest.mark.slow
def test_two_ranks_change_nothing(command, here):
    """Running means, ranks in the batch and references that move are those of all ranks' pairs."""
    world = SimpleNamespace(folder=here, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    rated = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 3 > 0} for i, r in enumerate(rows_of())]
    write("rated.jsonl", rated)
    names = {"sum": "ddp", "aot-unpaired": "ddp", "weighted-sum": "fsdp", "moving": "fsdp", "kto": "fsdp", "bco": "ddp"}
    options = CASES | {"kto": "--loss kto --unpaired", "bco": "--loss bco"}
    lines = {
        name: f"{BASE} {options[name]} --batch-size 4 --tokens-per-batch 40 --eval-data rows.jsonl" for name in names
    }
    for name in ("kto", "bco"):
        lines[name] = lines[name].replace("rows.jsonl", "rated.jsonl")
    torchrun(world, *(f"{lines[name]} --parallel {kind} --out two-{name}".split() for name, kind in names.items()))
    for name in names:
        assert command(f"{lines[name]} --out one-{name}")[0] == 0
        for a, b in zip(metrics(here / f"one-{name}"), metrics(here / f"two-{name}"), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=2e-4, abs=1e-5), name
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-3), name
        assert b["eval/loss"] == pytest.approx(a["eval/loss"], rel=1e-3), name


@pytest.mark.slow
def test_a_sharded_reference_that_moves_is_resumed_by_one_process(command, here):
    """Checkpoints hold each rank's rows of it."""
    world = SimpleNamespace(folder=here, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    line = f"{BASE} {CASES['moving']} --lr 1e-3 --epochs 999 --max-steps 60 --save-every 3 --tokens-per-batch 40 --out"
    ranks = start_ranks(world, *f"{line} two --parallel fsdp".split(), command=COLD)
    wait_until(lambda: lines_in(here / "two/metrics.jsonl") >= 5, *ranks)
    ranks[0].send_signal(signal.SIGTERM)
    assert [rank.wait(timeout=120) for rank in ranks] == [75, 75]
    [checkpoint] = list((here / "two/checkpoints").glob("step-*"))[-1:]
    assert len(list(checkpoint.glob("further-*.safetensors"))) == 2
    assert command(f"{line} two")[0] == 0 and command(f"{line} one")[0] == 0
    one, two = ([row["loss"] for row in metrics(here / out)] for out in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("name", ["sum", "moving"])
def test_a_resumed_run_has_the_same_bytes(name, command, here, monkeypatch):
    """What is carried from update to update is in the checkpoint: the running mean, the reference that moves."""
    line = f"{BASE} {CASES[name]} --max-steps 5 --eval-data rows.jsonl"
    state = assert_resumed_with_the_same_bytes(command, line, here, monkeypatch)
    assert ("running_mean" in state) == (name == "sum")
    if name == "sum":  # [the sum of c and r, their number] over all three updates
        both = sum(row["rewards/chosen"] + row["rewards/rejected"] for row in metrics(here / "cut")[:3])
        assert state["running_mean"] == [pytest.approx(6 * both / 0.5, rel=1e-4), 36]


def test_a_batch_across_two_epochs_holds_a_pair_twice(command, here):
    """Both have a rank: the loss of sorted values is that of the batch with the row written twice."""
    assert places([4, 7, 4], [7, 4, 9, 4]) == [1, 0, 3]
    rows = rows_of(1)
    write("rows.jsonl", rows)
    write("twice.jsonl", [*rows, *rows])
    options = "--loss aot_unpaired --label-smoothing 0.2 --batch-size 6 --max-steps 1"
    assert command(f"{BASE} {options} --out epochs")[0] == 0
    assert command(f"{BASE} {options} --data twice.jsonl --out rows".replace("--data rows.jsonl", ""))[0] == 0
    one, other = metrics(here / "epochs")[0], metrics(here / "rows")[0]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_a_row_of_weight_two_is_the_row_twice(command, here):
    rows = rows_of(2)
    write("rows.jsonl", [row | {"weight": 2.0 if i == 1 else 1.0} for i, row in enumerate(rows)])
    write("twice.jsonl", [*rows, rows[1]])
    for loss in ("sigmoid", "bco_pair,sft", "kto"):
        once = f"{BASE} --loss {loss} --max-steps 2 --batch-size"
        assert command(f"{once} 6 --use-weights --out weighted --overwrite")[0] == 0
        assert command(f"{once} 7 --out twice --overwrite --data twice.jsonl".replace("--data rows.jsonl", ""))[0] == 0
        for a, b in zip(metrics(here / "weighted"), metrics(here / "twice"), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), loss
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), loss


def test_weights_are_refused_where_they_cannot_be_used(command, here):
    rows = rows_of(2)
    without = {name: value for name, value in rows[3].items() if name != "weight"}
    write("rows.jsonl", [*rows[:3], without])
    code, said = command(f"{BASE} --use-weights --out o")
    assert code == 2 and "rows.jsonl:4: field 'weight': expected a number (--use-weights), got nothing" in said
    write("rows.jsonl", [row | {"weight": 0} for row in rows])
    code, said = command(f"{BASE} --use-weights --out o")
    assert code == 2 and "every 'weight' is 0" in said
    write("rows.jsonl", [*rows[:3], rows[3] | {"weight": -1}])
    code, said = command(f"{BASE} --use-weights --out o")
    assert code == 2 and "rows.jsonl:4: field 'weight': expected a number of 0 or more, got -1" in said
    write("rows.jsonl", rows)
    code, said = command(f"{BASE} --max-steps 1 --out o")
    assert code == 0 and "'weight' is not used; --use-weights" in said
    code, said = command(f"{BASE} --loss aot --use-weights --out p")
    assert code == 2 and "--use-weights has no effect with --loss aot" in said


# --- scores ----------------------------------------------------------------------------------------------------------


def manifest_of(name: str, **changes) -> None:
    """A manifest of make-prefs beside a file of rows."""
    content = open(name, "rb").read()
    outputs = [{"path": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "rows": 1}]
    made = {"stage": "make-prefs", "outputs": outputs, "inputs": [], "metrics": {}, "options": {}} | changes
    with open(f"{name}.manifest.json", "w") as f:
        json.dump(seal(made), f)


def test_rows_without_scores_are_refused(command, here):
    rows = rows_of(2)
    write("rows.jsonl", [*rows[:4], rows[4] | {"rejected_score": None}])
    for options in ("--loss distill", "--soft-labels 1", "--loss sft,distill:0.5"):
        code, said = command(f"{BASE} {options} --score-type reward --out o")
        assert code == 2 and "rows.jsonl:5: field 'rejected_score': expected a number (--" in said, said


def test_probabilities_are_trained_on_where_the_user_says_so(command, here):
    line = f"{BASE} --loss distill --max-steps 1"
    for out, metrics_of, options in (("o", {"score_type": "prob"}, {}), ("old", {}, {"scorer": "s@prob"})):
        manifest_of("rows.jsonl", metrics=metrics_of, options=options)
        code, said = command(f"{line} --out {out}")
        assert code == 2 and "rows.jsonl: its scores are probabilities, whose differences are at most 1" in said
        assert "hint: --score-type prob trains on them; make-prefs --scorer MODEL@log-odds" in said
        code, said = command(f"{line} --score-type logit --out {out} --overwrite")
        assert code == 2 and "--score-type logit: by its manifest rows.jsonl has scores of type prob" in said
        assert command(f"{line} --score-type prob --out {out} --overwrite")[0] == 0
    # what no manifest tells is read off the scores, where they are between 0 and 1
    (here / "rows.jsonl.manifest.json").unlink()
    code, said = command(f"{line} --out p")
    assert code == 0 and "scores: of unknown scale" in said
    rows = [row | {"chosen_score": 0.9, "rejected_score": 0.2} for row in rows_of(2)]
    write("rows.jsonl", rows)
    code, said = command(f"{line} --out q")
    assert code == 2 and "every score is between 0 and 1, and no manifest says what they are" in said
    assert command(f"{line} --score-type reward --out q")[0] == 0


def test_files_of_different_scales_are_refused(command, here):
    write("other.jsonl", rows_of(1))
    manifest_of("rows.jsonl", metrics={"score_type": "logit"})
    manifest_of("other.jsonl", metrics={"score_type": "log-odds"})
    code, said = command(f"{BASE} --soft-labels 1 --eval-data other.jsonl --out o")
    assert code == 2 and "scores of different scales: rows.jsonl: logit, other.jsonl: log-odds" in said
    code, said = command(f"{BASE} --soft-labels 1 --max-steps 1 --out o")
    assert code == 0 and "scores: logit" in said and "soft labels: 0." in said
    manifest = read_manifest(here / "o")
    assert manifest["identity"]["soft-labels"] == 1 and "score-type" in manifest["identity"]


def test_a_dry_run_refuses_what_a_run_refuses(command, here):
    manifest_of("rows.jsonl", metrics={"score_type": "prob"})
    code, said = command(f"{BASE} --loss distill --dry-run --out o")
    assert code == 2 and "its scores are probabilities" in said
    write("rows.jsonl", [{name: value for name, value in row.items() if "score" not in name} for row in rows_of(1)])
    (here / "rows.jsonl.manifest.json").unlink()
    code, said = command(f"{BASE} --soft-labels 2 --dry-run --out o")
    assert code == 2 and "rows.jsonl:1: field 'chosen_score': expected a number (--soft-labels)" in said


def test_scores_against_the_labels_are_told(command, here):
    rows = rows_of(1)
    write("rows.jsonl", [*rows, rows[0] | {"chosen_score": -9.0}])
    code, said = command(f"{BASE} --loss distill --max-steps 1 --out o")
    assert code == 0 and "in 1 of 4 pairs the chosen completion has the lower score" in said


# --- a reference that moves ------------------------------------------------------------------------------------------


def test_a_reference_that_is_replaced_by_the_policy(command, here):
    """After each move the policy is its own reference: the loss is log 2, and then less."""
    line = BASE.replace("--ref r", "--ref m").replace("--lr 1e-2", "--lr 1e-3")
    code, said = command(f"{line} --sync-ref-every 2 --sync-ref-mix 1 --batch-size 15 --max-steps 6 --out o")
    assert code == 0, said
    losses = [row["loss"] for row in metrics(here / "o")]
    assert all(loss == pytest.approx(math.log(2), abs=1e-6) for loss in losses[::2])
    assert all(loss < math.log(2) - 1e-3 for loss in losses[1::2])


def test_a_mixture_is_taken_of_the_weights(command, here):
    """The reference in the checkpoint, after one move, is 0.4 of the policy and 0.6 of what it was."""
    line = f"{BASE} --sync-ref-every 1 --sync-ref-mix 0.4 --max-steps 1 --lr 0.1 --keep-checkpoints 1 --out o"
    monkey = pytest.MonkeyPatch()
    monkey.setattr(loop.cleanup, "prune", lambda *args, **kwargs: None)
    monkey.setattr(loop, "_save_and_stop", lambda trainer, step: trainer.save(step))
    try:
        assert command(line)[0] == 0
    finally:
        monkey.undo()
    found = load_file(here / "o/checkpoints/step-00000001/further.safetensors")
    policy, before = (dict(AutoModelForCausalLM.from_pretrained(name).named_parameters()) for name in ("o", "r"))
    assert found.keys() == policy.keys()
    for name, mixed in found.items():
        torch.testing.assert_close(mixed, 0.4 * policy[name] + 0.6 * before[name], rtol=1e-5, atol=1e-6)


def test_a_reference_that_moves_is_refused_where_it_cannot(command, here):
    code, said = command(f"{BASE} --sync-ref-every 2 --lora 2 --out o")
    assert code == 2 and "--lora trains adapters alone" in said
    code, said = command(f"{BASE} --sync-ref-every 2 --cache-dir c --out o")
    assert code == 2 and "--cache-dir has no effect with --sync-ref-every" in said
    code, said = command(f"{BASE} --sync-ref-mix 1 --out o")
    assert code == 2 and "--sync-ref-mix has no effect without --sync-ref-every" in said
    tokenizer = AutoTokenizer.from_pretrained("m")
    tiny_model("gpt2", vocab=len(tokenizer), context=64, width=8, heads=2).save_pretrained("narrow")
    tokenizer.save_pretrained("narrow")
    code, said = command(f"{BASE} --sync-ref-every 2 --out o".replace("--ref r", "--ref narrow"))
    assert code == 2 and "narrow: its weights are not of the policy's shapes" in said


def test_a_plan_holds_the_reference_that_moves(command, here, capsys):
    assert run(f"{BASE} --sync-ref-every 2 --dry-run --out o".split()) == 0
    assert "moving reference" in capsys.readouterr().out


# --- several terms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--loss sigmoid:0", "--loss: 'sigmoid:0': expected NAME or NAME:WEIGHT, with a weight above 0"),
        ("--loss sigmoid,dpo", "--loss: 'dpo' is not one of sigmoid"),
        ("--loss sigmoid,kto --f-divergence js", "--f-divergence js: kto is defined for the reverse KL alone"),
        ("--loss sigmoid,simpo --ld-alpha 0", "--ld-alpha: simpo does not compare sums of token log-probs"),
        ("--loss exo_pair --label-smoothing 0", "exo_pair needs labels that are not certain"),
        ("--loss hinge --soft-labels 1", "--soft-labels has no effect with --loss hinge"),
        ("--loss aot,sft --wpo", "--wpo has no effect with --loss aot,sft"),
        ("--loss sft --ref r", "--ref has no effect with --loss sft"),
        ("--f-alpha 1", "--f-alpha has no effect with --f-divergence reverse-kl"),
        ("--score-type prob", "--score-type has no effect with --loss sigmoid and without --soft-labels"),
        ("--loss sigmoid,bco_pair --alpha 1", "--alpha has no effect with --loss sigmoid,bco_pair"),
    ],
)
def test_what_a_loss_does_not_take_is_refused(options, said, command):
    code, found = command(f"train-dpo --model m --data rows.jsonl --out o {options}")
    assert code == 2 and said in found, found
