"""--select best and --patience: the weights of the best evaluation, an early end, resuming, the report, refusals."""

import json

import pytest
import torch
import yaml

from dpoctl.data.encode import PairData
from dpoctl.outputs.manifests import read_manifest
from dpoctl.reports.collect import collect
from dpoctl.reports.figures import drawings
from dpoctl.runtime import signals
from dpoctl.training import loop
from dpoctl.training.reward_model import _held_out_metrics, _right
from helpers.losses import caller, enter, metrics, small_models, write

COMMON = (
    "--model m --data rows.jsonl --eval-data held.jsonl --batch-size 4 --epochs 99 --max-steps 12 --eval-every 1 "
    "--log-every 1 --lr 2e-2 --warmup-steps 0 --optimizer adamw --schedule constant"
)
DPO = f"train-dpo {COMMON} --beta 0.5".replace("--lr 2e-2", "--lr 2e-4")
SFT = f"sft {COMMON} --field chosen".replace("held.jsonl", "mixed.jsonl").replace("--lr 2e-2", "--lr 5e-2")
POINTS = "--eval-prompts p.jsonl --scorer python:s.py:f --max-new-tokens 5"
RM = "train-rm --model m --data held.jsonl --validation 0.5 --batch-size 2 --epochs 99 --max-steps 12 --eval-every 1 "
RM += "--log-every 1 --lr 2e-2 --warmup-steps 0"
REWARDS = """calls = 0
def f(rows):
    global calls
    calls += 1
    return [float((0, 1, 2, 3, 9, 4, 5, 6, 7, 8, 1, 1, 1)[(calls - 1) % 13])] * len(rows)
"""  # of updates 0 to 12
GOOD, BAD = " good warm plot made me laugh", " bad long dull and short film"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_models(tmp_path_factory.mktemp("select"))


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """Some held-out rows agree with the training rows and some contradict them: their loss falls, then rises."""
    enter(folder, tmp_path, monkeypatch, [])
    prompts = ["the film", "a story", "the plot", "it is"]
    agree = [{"prompt": p, "chosen": GOOD, "rejected": BAD} for p in prompts]
    against = [{"prompt": p, "chosen": BAD, "rejected": GOOD} for p in prompts[:1]]
    write("rows.jsonl", agree)
    write("held.jsonl", [*agree[:3], *against])
    write("mixed.jsonl", [*agree[:1], *against])
    write("p.jsonl", [{"prompt": p} for p in prompts])
    (tmp_path / "s.py").write_text(REWARDS)
    return tmp_path


@pytest.fixture
def command(here, capsys):
    return caller(capsys)


def first_lowest(rows: list[dict], name: str = "eval/loss") -> int:
    return min(rows, key=lambda row: row[name])["step"]


@pytest.mark.parametrize("line", [DPO, SFT], ids=["dpo", "sft"])
def test_the_weights_of_the_lowest_held_out_loss_are_kept(command, here, line):
    """They are those of a run of so many updates: the learning rate is constant."""
    code, said = command(f"{line} --select best --out best")
    assert code == 0, said
    rows = metrics(here / "best")
    best = first_lowest(rows)
    assert 1 < best < 10 and len(rows) == 12  # the minimum is in the middle
    assert f"keeps update {best}, loss" in said
    assert command(f"{line} --max-steps {best} --out short".replace("--max-steps 12 ", ""))[0] == 0
    assert (here / "best/model.safetensors").read_bytes() == (here / "short/model.safetensors").read_bytes()
    assert command(f"{line} --out last")[0] == 0
    assert (here / "best/model.safetensors").read_bytes() != (here / "last/model.safetensors").read_bytes()
    assert (here / "best/metrics.jsonl").read_bytes() == (here / "last/metrics.jsonl").read_bytes()
    found = read_manifest(here / "best")["metrics"]
    assert found["best_step"] == best and found["best/loss"] == pytest.approx(rows[best - 1]["eval/loss"], rel=1e-5)
    assert found["eval/loss"] == rows[best - 1]["eval/loss"] and found["step"] == 12
    assert not {"best_step", "best/loss"} & set(read_manifest(here / "last")["metrics"])


def test_patience_ends_the_run_with_the_same_weights(command, here):
    assert command(f"{DPO} --select best --out whole")[0] == 0
    code, said = command(f"{DPO} --select best --patience 2 --out early")
    rows = metrics(here / "early")
    assert code == 0 and len(rows) == first_lowest(rows) + 2 < 12
    assert "ends early, 2 evaluations without a better loss" in said
    assert f"{len(rows)} updates of 4" in said
    assert (here / "early/model.safetensors").read_bytes() == (here / "whole/model.safetensors").read_bytes()
    assert read_manifest(here / "early")["metrics"]["step"] == len(rows)


def test_accuracy_selects_the_first_highest(command, here):
    assert command(f"{DPO} --select best --select-by accuracy --out by")[0] == 0
    rows = metrics(here / "by")
    best = max(rows, key=lambda row: row["eval/rewards/accuracies"])
    found = read_manifest(here / "by")["metrics"]
    assert found["best_step"] == best["step"] != first_lowest(rows)
    assert found["best/rewards/accuracies"] == best["eval/rewards/accuracies"]


def points(folder) -> list[dict]:
    """The points of the frontier after the first update."""
    return [row for row in map(json.loads, (folder / "eval.jsonl").read_text().splitlines()) if row["step"]]


def test_the_highest_reward_within_a_kl_is_kept(command, here):
    """Each with the weights of a run of so many updates; no --eval-data is needed."""
    line = f"{DPO} {POINTS}".replace("--eval-data held.jsonl ", "").replace("--lr 2e-4", "--lr 5e-3")
    code, said = command(f"{line} --select best --select-by reward --out free")
    assert code == 0, said
    every = points(here / "free")
    best = max(every, key=lambda row: row["reward"])
    found = read_manifest(here / "free")["metrics"]
    assert found["best_step"] == best["step"] == 4 and found["best/reward"] == 9.0
    assert found["best/kl"] == pytest.approx(best["kl_exact"])
    limit = sorted(row["kl_exact"] for row in every if row["kl_exact"] < best["kl_exact"])[-1]
    within = max((row for row in every if row["kl_exact"] <= limit), key=lambda row: row["reward"])
    assert within["step"] != best["step"]
    code, said = command(f"{line} --select best --select-by reward --select-kl {limit + 1e-9} --out near")
    assert code == 0 and f"keeps update {within['step']}, reward {within['reward']:.4f} at KL" in said
    assert (here / "near/eval.jsonl").read_text().replace("near", "free") == (here / "free/eval.jsonl").read_text()
    short = line.replace("--max-steps 12", f"--max-steps {within['step']}")
    assert command(f"{short} --out short")[0] == 0
    assert (here / "near/model.safetensors").read_bytes() == (here / "short/model.safetensors").read_bytes()
    plane = next(d for d in drawings(collect(["near"])) if d and d.name == "frontier").figure.axes[0]
    [star] = [found for found in plane.lines if found.get_label() == "the update that is kept"]
    assert list(star.get_xdata()) == [pytest.approx(within["kl"])]


def test_where_no_point_is_within_the_kl_the_last_weights_are_kept(command, here):
    line = f"{DPO} {POINTS} --max-steps 3".replace("--max-steps 12 ", "").replace("--lr 2e-4", "--lr 5e-2")
    code, said = command(f"{line} --select best --select-by reward --select-kl 1e-6 --patience 1 --out far")
    assert code == 0 and "no evaluation had a KL of at most 1e-06: the last weights are kept" in said
    assert command(f"{line} --out last")[0] == 0
    assert (here / "far/model.safetensors").read_bytes() == (here / "last/model.safetensors").read_bytes()
    assert "best_step" not in read_manifest(here / "far")["metrics"] and len(points(here / "far")) == 3


def test_a_reward_model_has_patience(command, here):
    assert command(f"{RM} --out whole")[0] == 0
    code, said = command(f"{RM} --patience 2 --out early")
    rows = metrics(here / "early")
    best = max(rows, key=lambda row: row["eval/accuracy"])["step"]
    assert code == 0 and len(rows) == best + 2 < 12 == len(metrics(here / "whole"))
    assert f"keeps update {best}, accuracy" in said and "ends early, 2 evaluations without a better accuracy" in said
    assert (here / "early/model.safetensors").read_bytes() == (here / "whole/model.safetensors").read_bytes()
    code, said = command(f"{RM} --patience 2 --select last --out no")
    assert code == 2 and "--patience has no effect with --select last" in said


def test_equal_rewards_count_half():
    margin = torch.tensor([1.0, 0.0, -1.0, 0.0])
    assert _right(margin).tolist() == [1.0, 0.5, 0.0, 0.5]
    data = PairData(pairs=[(0, 1), (2, 3)], margins=[0.05, None])
    found, details = _held_out_metrics(data, {0: 1.0, 1: 1.0, 2: 2.0, 3: 1.0})
    assert found["accuracy"] == 0.75 and details["accuracy_by_margin"] == [[0.0, 0.1, 0.5, 1]]


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_stopped_after_its_best_update_keeps_it(command, here, monkeypatch, after):
    """Stopped while it waits for a better evaluation, and at the update where its patience ends."""
    line = f"{DPO} --select best --patience 2"
    assert command(f"{line} --out whole")[0] == 0
    stop = first_lowest(metrics(here / "whole")) + after
    update = loop.Trainer.update

    def stopped(self, step, meter):
        found = update(self, step, meter)
        monkeypatch.setattr(signals.stop, "signal", "SIGTERM" if step + 1 == stop else "")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(loop.Trainer, "update", stopped)
        assert command(f"{line} --out cut")[0] == 75
    monkeypatch.setattr(signals.stop, "signal", "")
    state = json.loads((here / f"cut/checkpoints/step-{stop:08d}/state.json").read_text())
    assert state["best"]["waited"] == after
    assert command(f"{line} --out cut")[0] == 0
    for file in ("model.safetensors", "metrics.jsonl"):
        assert (here / "whole" / file).read_bytes() == (here / "cut" / file).read_bytes(), file
    whole, cut = (read_manifest(here / name)["metrics"] for name in ("whole", "cut"))
    assert whole == cut


def test_the_report_marks_the_update_that_is_kept(command, here):
    assert command(f"{DPO} --select best --out best")[0] == 0
    figure = next(d for d in drawings(collect(["best"])) if d and d.name == "loss").figure
    stars = [line for line in figure.axes[0].lines if line.get_marker() == "*"]
    best = first_lowest(metrics(here / "best"))
    assert [list(star.get_xdata()) for star in stars] == [[best]]
    assert stars[0].get_label() == f"best: keeps update {best}"


def test_the_point_of_a_run_is_that_of_the_kept_update(command, here):
    assert command(f"{DPO} --select best --out best")[0] == 0
    rows = [{"step": s, "model": "best", "method": "dpo", "reward": s / 9, "kl": 1.0 * s, "n": 4} for s in range(13)]
    write("best/eval.jsonl", rows)
    (run,) = collect(["best"]).runs
    assert run.final_point["step"] == first_lowest(metrics(here / "best")) < run.points[-1]["step"]


def test_refusals(command, here):
    bare = DPO.replace("--eval-data held.jsonl --eval-every 1 ", "").replace("--eval-data held.jsonl ", "")
    bare = bare.replace("--eval-every 1 ", "")
    for line, message in (
        (f"{bare} --select best", "--select has no effect without --eval-data"),
        (f"{DPO} --patience 2", "--patience has no effect with --select last"),
        (f"{DPO} --select-by accuracy", "--select-by has no effect with --select last"),
        (f"{DPO} --select best --select-by reward", "--select-by reward needs --eval-prompts"),
        (f"{DPO} --select best --select-kl 2", "--select-kl has no effect with --select-by loss"),
        (f"{bare} {POINTS} --eval-every 1 --select best", "--select-by loss needs --eval-data"),
        (
            f"{DPO} {POINTS} --select best --select-by reward --select-kl 2 --top-k 5",
            "--select-kl: samples at temperature 0, or with --top-p or --top-k, have no KL",
        ),
        (
            f"{DPO} --select best --select-by accuracy --loss bco",
            "--select-by accuracy ranks the completions of a pair",
        ),
    ):
        code, said = command(f"{line} --out no")
        assert code == 2 and message in said, said
    assert not (here / "no").exists()


def test_the_default_keeps_the_last_weights(command, here):
    assert command(f"{DPO} --out last")[0] == 0
    assert yaml.safe_load((here / "last/config.yaml").read_text())["select"] == "last"
    assert read_manifest(here / "last")["metrics"]["step"] == 12
