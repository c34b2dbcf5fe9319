"""Some trials of `make torture`, and faults outside its table: signals, locks, numbers, pickles, damaged inputs."""

import json
import os
import random
import re
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from helpers.chain import wait_until
from helpers.fault_stages import STAGES, UP, small_batches
from helpers.faults import Fault, contents, differences
from helpers.torture import damage, measure, torture

SHARE = {
    "prepare": "deaths no_room corruptions",
    "sft": "deaths kills no_room",
    "make-prefs": "deaths signals corruptions",
    "make-prefs-kept": "deaths signals",
    "prefs-given": "deaths",
    "prefs-judge": "deaths corruptions",
    "prefs-votes": "no_room",
    "prefs-unpaired": "no_room",
    "train-dpo": "deaths corruptions",
    "dpo-unpaired": "deaths",
    "dpo-votes": "kills",
    "train-rm": "deaths corruptions",
    "train-ppo": "deaths signals",
    "train-ilql": "kills",
    "sample": "deaths corruptions",
    "sample-server": "deaths no_room",
    "score": "no_room size_limit",
    "judge": "deaths kills",
    "evaluate": "deaths not_allowed",
    "report": "deaths",
}


@pytest.mark.parametrize("name", STAGES)
def test_one_trial_of_each_fault(lab, name):
    """One trial of each fault named, by a fixed seed: the command rerun ends in the undisturbed run's bytes."""
    stage = measure(lab, name)
    plain(stage.folder)
    for fault in SHARE[name].split():
        trials, wrong = torture(stage, fault, 0, 0, workers=1, most=1)
        assert not wrong, "\n".join(wrong)
        assert trials == 1, f"{fault} has no trial"


def test_a_killed_run_resumes_from_its_last_checkpoint(lab):
    stage = measure(lab, "sft")
    saved = [
        i for i, call in enumerate(stage.calls, 1) if call.startswith("replace") and call.endswith("step-00000002.tmp")
    ]
    assert saved
    folder = lab.folder()
    assert lab.run(folder, STAGES["sft"], Fault("kill", saved[0] + 5)).code == 137
    outcome = lab.run(folder, STAGES["sft"])
    assert outcome.code == 0 and "resuming after update 2" in outcome.said
    assert not differences(contents(folder), stage.undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_second_signal_ends_at_once(lab, number):
    """The first only sets a flag; the second has the default effect of the signal."""
    folder = lab.folder()
    slow = folder / "slow.py"
    slow.write_text(
        "import time\ndef f(rows):\n    open('begun', 'w').close()\n    time.sleep(120)\n    return [0.0] * len(rows)\n"
    )
    args = ["score", "--data", f"{UP}/samples.jsonl", "--scorer", "python:slow.py:f", "--out", "scored.jsonl"]
    process = lab.start(folder, args)
    wait_until((folder / "begun").exists)
    os.kill(process.pid, number)
    time.sleep(0.3)
    assert process.exitcode is None
    os.kill(process.pid, number)
    assert lab.end(process, folder).code == -number


def test_a_signal_stops_after_the_current_batch_or_update(lab):
    """Exit code 75; complete batches and updates are kept."""
    folder = lab.folder()
    (folder / "counting.py").write_text(
        "import os, signal\nfrom pathlib import Path\ndef f(rows):\n    with open('n', 'a') as n:\n"
        "        n.write('x')\n    if Path('n').read_text() == 'xx':\n        os.kill(os.getpid(), "
        "signal.SIGUSR1)\n    return [0.5] * len(rows)\n"
    )
    score = ["score", "--data", f"{UP}/samples.jsonl", "--scorer", "python:counting.py:f", "--out", "scored.jsonl"]
    ppo = [*STAGES["train-ppo"]]
    ppo[ppo.index("--reward") + 1] = "python:counting.py:f"
    for args, done in ((score, "6 rows"), (ppo, "update 1")):  # PPO scores its first rollouts before update 1
        (folder / "n").unlink(missing_ok=True)
        outcome = lab.run(folder, args, None, small_batches)
        assert outcome.code == 75 and f"stopped by SIGUSR1 after {done}" in outcome.said, outcome.said
        outcome = lab.run(folder, args, None, small_batches)
        assert outcome.code == 0 and f"resuming after {done}" in outcome.said, outcome.said


def test_a_second_process_on_the_same_output_is_refused(lab):
    folder = lab.folder()
    held = [*STAGES["make-prefs"]]
    held[held.index("--scorer") + 1] = "python:slow.py:f"
    (folder / "slow.py").write_text("import time\ndef f(rows):\n    open('begun', 'w').close()\n    time.sleep(120)\n")
    process = lab.start(folder, held)
    wait_until((folder / "begun").exists)
    same = lab.run(folder, held)
    other = [*STAGES["make-prefs"][:-1], "other.jsonl"]  # another output with the same second file
    second = lab.run(folder, other)
    process.kill()
    lab.end(process, folder)
    assert same.code == 75 and "prefs.jsonl: another dpoctl process is " in same.said
    assert second.code == 75 and "samples.jsonl: another dpoctl process is writing it" in second.said
    assert lab.run(folder, other).code == 0  # a lock ends with its process


def test_of_two_processes_that_start_together_one_writes_the_output(lab):
    folder = lab.folder()
    processes = [lab.start(folder, STAGES["sample"]) for _ in range(2)]
    codes = sorted(lab.end(p, folder).code for p in processes)
    said = (folder / "said").read_text()
    # the second finds the first running, or, where it came too late, its complete output
    assert codes in ([0, 75], [0, 0])
    assert {75: "another dpoctl process is ", 0: "nothing to do"}[codes[1]] in said
    assert not differences(contents(folder), measure(lab, "sample").undisturbed)


def test_an_unwritable_temporary_directory_and_cache_change_no_bytes(lab):
    expected = measure(lab, "train-dpo").undisturbed
    folder = lab.folder()
    (folder / "cache").write_text("a file, where the cache's directory would be")
    outcome = lab.run(folder, STAGES["train-dpo"], None, without_temporary_directory)
    assert outcome.code == 0, outcome.said
    assert not {n for n in differences(contents(folder), expected) if n != "cache"}


def without_temporary_directory() -> None:
    import tempfile

    for name in ("TMPDIR", "TEMP", "TMP"):
        os.environ[name] = "/proc/nowhere"
    tempfile.gettempdir = tempfile._get_default_tempdir = lambda *a: (_ for _ in ()).throw(
        PermissionError(13, "denied", "/tmp")
    )


# --- numbers


DIVERGING = "--save-every 1 --max-grad-norm 1e30 --warmup-steps 0 --optimizer rmsprop".split()


def where(stage: str, update: int) -> str:
    """How a message names an update and its rows."""
    return rf"step {update}, .*prompt_id " if stage == "train-ppo" else rf"update {update} \(rows at lines "


@pytest.mark.parametrize("stage", ["sft", "train-dpo", "train-rm", "train-ppo"])
def test_an_update_that_overflows_is_named_and_not_saved(lab, stage):
    folder = lab.folder()
    outcome = lab.run(folder, [*STAGES[stage], *DIVERGING, "--lr", "1e38"])
    assert outcome.code == 3 and re.search(where(stage, 1), outcome.said, re.S), outcome.said
    out = folder / STAGES[stage][STAGES[stage].index("--out") + 1]
    assert not (out / "manifest.json").exists() and not list(out.rglob("*.safetensors"))


@pytest.mark.parametrize("stage", ["sft", "train-dpo", "train-rm", "train-ppo"])
def test_a_checkpoint_before_a_numerical_failure_is_finite_and_kept(lab, stage):
    """Weights of about 1e37 after the first update: the second one's loss, or its rollouts, are not finite."""
    folder = lab.folder()
    one_step = "--minibatch-size 4 --ppo-epochs 1".split() if stage == "train-ppo" else []
    outcome = lab.run(folder, [*STAGES[stage], *DIVERGING, *one_step, "--lr", "1e36"])
    assert outcome.code == 3, outcome.said
    out = folder / STAGES[stage][STAGES[stage].index("--out") + 1]
    assert not (out / "manifest.json").exists() and not (out / "model.safetensors").exists()
    saved = list(out.glob("checkpoints/step-00000001/model.safetensors"))
    assert len(saved) == 1
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(saved[0]).values())


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    """The loss of the third update is infinite: the weights stay those after the second."""
    from types import SimpleNamespace

    from dpoctl.errors import NumericalError
    from dpoctl.runtime.devices import Compute
    from dpoctl.training import loop
    from dpoctl.training.task import listed

    model = torch.nn.Linear(2, 1)
    config = SimpleNamespace(max_grad_norm=1.0)
    config.out, config.optimizer, config.lr, config.weight_decay = str(tmp_path), "adamw", 0.1, 0.0
    config.save_dtype, config.activation_checkpointing = "float32", False
    task = SimpleNamespace(
        config=config,
        compute=Compute(torch.device("cpu"), torch.float32),
        model=model,
        output=None,
        tokens=lambda micro: 1,
        flops=lambda micro: 0,
        loss=lambda micro: (model(micro).sum(), {}),
    )
    trainer = loop.Trainer(task)
    for factor in (1.0, 1.0, float("inf"), float("nan")):
        before = [p.detach().clone() for p in model.parameters()]
        micros = [torch.ones(3, 2) * factor]
        if factor == 1.0:
            trainer.optimize(micros, "update")
            continue
        with pytest.raises(NumericalError, match=r"update 3 \(rows at lines 7, 9\): the loss is"):
            trainer.optimize(micros, f"update 3 (rows at lines {listed([7, 9])})")
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# --- what is read and written


def plain(folder) -> None:
    """Nothing is written but safetensors, YAML and JSON without NaN, besides the report and its figures."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "said"]
    assert any(path.suffix in (".json", ".jsonl") for path in files)
    for path in files:
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            assert 0 < int.from_bytes(data[:8], "little") < len(data)
        elif path.suffix == ".yaml":
            assert b"stage:" in data
        elif path.suffix == ".jsonl":
            assert all(isinstance(strict(line), dict) for line in data.splitlines())
        elif path.suffix == ".json" or "sha256" in path.parts:
            strict(data)
        else:
            assert path.name == "report.html" or "figures" in path.parts, path


def strict(data: bytes):
    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(data, parse_constant=refuse)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_pickles_in_checkpoints_and_runs_are_never_read(lab):
    folder, stage = lab.folder(), measure(lab, "sft")
    saved = next(i for i, c in enumerate(stage.calls, 1) if c.startswith("replace") and c.endswith("step-00000002.tmp"))
    lab.run(folder, STAGES["sft"], Fault("kill", saved + 5))
    for place in (folder / "sft", folder / "sft/checkpoints", folder / "sft/checkpoints/step-00000002"):
        for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "model.pt", "state.pkl"):
            torch.save({"transformer.wte.weight": Bomb()}, place / name)
    outcome = lab.run(folder, STAGES["sft"])
    assert outcome.code == 0 and "resuming after update 2" in outcome.said
    assert (folder / "sft/model.safetensors").read_bytes() == (stage.folder / "sft/model.safetensors").read_bytes()
    args = [a.replace(f"{UP}/sft", "sft") for a in STAGES["sample"]]
    assert lab.run(folder, args).code == 0 and not (folder / "ran").exists()


def test_bin_weights_of_the_hub_are_read_as_tensors_only(lab, tmp_path, monkeypatch):
    """From the hub's cache as the hub's client lays it out; a pickle with more than tensors in it is refused unrun."""
    import shutil

    from huggingface_hub import constants

    from dpoctl.errors import InputError
    from dpoctl.models.load import load_policy

    commit = "0" * 40
    repo = tmp_path / "models--some--model"
    snapshot = repo / "snapshots" / commit
    shutil.copytree(
        lab.world / "sft", snapshot, ignore=shutil.ignore_patterns("checkpoints", "*.jsonl", "manifest.json")
    )
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    weights = load_file(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    torch.save(weights | {"lm_head.weight": weights["transformer.wte.weight"]}, snapshot / "pytorch_model.bin")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = load_policy("some/model").model
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    torch.save(weights | {"transformer.wte.weight": Bomb()}, snapshot / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="more than tensors"):
        load_policy("some/model")
    assert not (tmp_path / "ran").exists()


# --- inputs


def test_an_input_that_differs_from_its_manifest_is_refused(lab):
    """Rows, a model, and what prepare put into a directory; an unfinished model too."""
    folder = lab.folder()
    assert lab.run(folder, STAGES["prepare"]).code == 0
    import shutil

    for name in ("samples.jsonl", "samples.jsonl.manifest.json"):
        shutil.copy(lab.world / name, folder / name)
    shutil.copytree(lab.world / "rm", folder / "rm")
    score = ["score", "--data", "samples.jsonl", "--scorer", "rm", "--out", "scored.jsonl"]
    sample = f"sample --model {UP}/sft --prompts data/prompts.test.jsonl --limit 2 --out few.jsonl".split()
    for args, path in ((score, "samples.jsonl"), (score, "rm/model.safetensors"), (sample, "data/prompts.test.jsonl")):
        kept = (folder / path).read_bytes()
        damage(folder / path, random.Random(3))
        outcome = lab.run(folder, args)
        said = outcome.said
        assert outcome.code == 2 and path in said and "its sha256 is not the one in" in said, said
        (folder / path).write_bytes(kept)
    (folder / "rm/manifest.json").rename(folder / "rm/.plan.json")
    outcome = lab.run(folder, score)
    assert outcome.code == 2 and "not complete yet" in outcome.said
    (folder / "rm/.plan.json").rename(folder / "rm/manifest.json")
    for args in (score, sample):
        assert lab.run(folder, args).code == 0
