"""A share of the torture (`make torture` runs all of it), and the faults that no table holds."""

import json
import os
import random
import signal
import time

import pytest
import torch

from helpers.fault_stages import STAGES, UP, small_waves
from helpers.faults import Fault, contents, differences
from helpers.torture import FAULTS, damage, measure, torture

SHARE = {
    "prepare": "deaths no_room corruptions",
    "sft": "deaths kills no_room",
    "make-prefs": "deaths signals corruptions",
    "train-dpo": "deaths corruptions",
    "train-rm": "deaths corruptions",
    "train-ppo": "deaths signals",
    "sample": "deaths corruptions",
    "score": "no_room size_limit",
    "judge": "deaths kills",
    "evaluate": "deaths not_allowed",
    "report": "deaths",
}


@pytest.mark.parametrize("name", STAGES)
def test_a_share_of_the_torture(lab, name, monkeypatch):
    """One trial of each fault named, by a fixed seed: the command rerun ends in the undisturbed run's bytes."""
    stage = measure(lab, name)
    plain(stage.folder)
    assert set(SHARE[name].split()) <= set(FAULTS)
    for fault in SHARE[name].split():
        trials, wrong = torture(stage, fault, 0, 0, workers=1, most=1)
        assert trials == 1 and not wrong, wrong[0]


def test_a_death_loses_no_more_than_the_steps_since_the_last_checkpoint(lab):
    stage = measure(lab, "sft")
    saved = [
        i for i, call in enumerate(stage.calls, 1) if call.startswith("replace") and call.endswith("step-00000002.tmp")
    ]
    assert saved
    folder = lab.folder()
    assert lab.run(folder, STAGES["sft"], Fault("kill", saved[0] + 5)).code == 137
    outcome = lab.run(folder, STAGES["sft"])
    assert outcome.code == 0 and "resuming after update 2" in outcome.said
    assert not differences(contents(folder), stage.whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_second_signal_ends_at_once(lab, number):
    """The first sets a flag and nothing else; the second is the system's own."""
    folder = lab.folder()
    slow = folder / "slow.py"
    slow.write_text(
        "import time\ndef f(rows):\n    open('begun', 'w').close()\n    time.sleep(120)\n    return [0.0] * len(rows)\n"
    )
    args = ["score", "--data", f"{UP}/samples.jsonl", "--scorer", "python:slow.py:f", "--out", "scored.jsonl"]
    process = lab.start(folder, args)
    wait_for(folder / "begun")
    os.kill(process.pid, number)
    time.sleep(0.3)
    assert process.exitcode is None
    os.kill(process.pid, number)
    assert lab.end(process, folder).code == -number


def test_a_signal_stops_behind_the_wave_or_update(lab):
    """75, and the rows and updates that were done are kept."""
    folder = lab.folder()
    (folder / "own.py").write_text(
        "import os, signal\nfrom pathlib import Path\ndef f(rows):\n    with open('n', 'a') as n:\n"
        "        n.write('x')\n    if Path('n').read_text() == 'xx':\n        os.kill(os.getpid(), "
        "signal.SIGUSR1)\n    return [0.5] * len(rows)\n"
    )
    score = ["score", "--data", f"{UP}/samples.jsonl", "--scorer", "python:own.py:f", "--out", "scored.jsonl"]
    ppo = [*STAGES["train-ppo"]]
    ppo[ppo.index("--reward") + 1] = "python:own.py:f"
    for args, behind in ((score, "6 rows"), (ppo, "update 1")):  # the first rewards of ppo are those of its start
        (folder / "n").unlink(missing_ok=True)
        outcome = lab.run(folder, args, None, small_waves)
        assert outcome.code == 75 and f"stopped by SIGUSR1 after {behind}" in outcome.said, outcome.said
        outcome = lab.run(folder, args, None, small_waves)
        assert outcome.code == 0 and f"resuming after {behind}" in outcome.said, outcome.said


def wait_for(path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_of_two_processes_on_one_output_one_goes_on(lab):
    folder = lab.folder()
    held = [*STAGES["make-prefs"]]
    held[held.index("--scorer") + 1] = "python:slow.py:f"
    (folder / "slow.py").write_text("import time\ndef f(rows):\n    open('begun', 'w').close()\n    time.sleep(120)\n")
    process = lab.start(folder, held)
    wait_for(folder / "begun")
    same = lab.run(folder, held)
    other = [*STAGES["make-prefs"][:-1], "other.jsonl"]  # another work, whose second file is that of the first
    second = lab.run(folder, other)
    process.kill()
    lab.end(process, folder)
    assert same.code == 2 and "prefs.jsonl: another dpoctl process is " in same.said
    assert second.code == 2 and "samples.jsonl: another dpoctl process is writing it" in second.said
    assert lab.run(folder, other).code == 0  # the lock went with the process


def test_of_two_processes_that_start_together_one_does_the_work(lab):
    folder = lab.folder()
    processes = [lab.start(folder, STAGES["sample"]) for _ in range(2)]
    codes = sorted(lab.end(p, folder).code for p in processes)
    said = (folder / "said").read_text()
    assert (codes == [0, 2] and "another dpoctl process is " in said) or (codes == [0, 0] and "nothing to do" in said)
    assert not differences(contents(folder), measure(lab, "sample").whole)


def test_an_unwritable_temporary_directory_and_cache_cost_nothing(lab):
    whole = measure(lab, "train-dpo").whole
    folder = lab.folder()
    (folder / "cache").write_text("a file, where the cache's directory would be")
    outcome = lab.run(folder, STAGES["train-dpo"], None, without_temporary_directory)
    assert outcome.code == 0, outcome.said
    assert not {n for n in differences(contents(folder), whole) if n != "cache"}


def without_temporary_directory() -> None:
    import tempfile

    for name in ("TMPDIR", "TEMP", "TMP"):
        os.environ[name] = "/proc/nowhere"
    tempfile.gettempdir = tempfile._get_default_tempdir = lambda *a: (_ for _ in ()).throw(
        PermissionError(13, "denied", "/tmp")
    )


# --- numbers


@pytest.mark.parametrize("stage", ["sft", "train-dpo", "train-rm", "train-ppo"])
def test_no_checkpoint_ever_holds_a_number_that_is_not_finite(lab, stage):
    """Weights that an update would overflow are named with their rows; what was saved before is finite, and stays."""
    from safetensors.torch import load_file

    folder = lab.folder()
    args = [
        *STAGES[stage],
        *"--save-every 1 --lr 1e38 --max-grad-norm 1e30 --warmup-steps 0 --optimizer rmsprop".split(),
    ]
    outcome = lab.run(folder, args)
    assert outcome.code == 3 and ("update 1 (" in outcome.said or "step 1, " in outcome.said), outcome.said
    assert "rows at lines " in outcome.said or "prompt_id " in outcome.said
    out = folder / args[args.index("--out") + 1]
    assert not (out / "manifest.json").exists() and not (out / "model.safetensors").exists()
    for file in out.rglob("*.safetensors"):
        assert all(bool(t.isfinite().all()) for t in load_file(file).values())


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    """Hand-made: the third update's loss is infinite; weights and optimizer are those behind the second."""
    from types import SimpleNamespace

    from dpoctl.errors import NumericalError
    from dpoctl.runtime.devices import Compute
    from dpoctl.training import loop
    from dpoctl.training.task import listed

    model = torch.nn.Linear(2, 1)
    config = SimpleNamespace(max_grad_norm=1.0)
    config.out, config.optimizer, config.lr, config.weight_decay = str(tmp_path), "adamw", 0.1, 0.0
    task = SimpleNamespace(
        config=config,
        compute=Compute(torch.device("cpu"), torch.float32),
        model=model,
        output=None,
        tokens=lambda micro: 1,
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
    """Nothing is written but safetensors, JSON and YAML, and JSON is what the standard calls so."""
    for path in (p for p in folder.rglob("*") if p.is_file() and p.name != "said"):
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
        raise ValueError(f"{constant} is no JSON")

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


def test_a_hub_model_with_bin_weights_alone_is_read_as_tensors_only(lab, tmp_path, monkeypatch):
    """From the hub's cache as the hub's client lays it out; a pickle with more than tensors in it is refused unrun."""
    import shutil

    from huggingface_hub import constants
    from safetensors.torch import load_file

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
    model, _ = load_policy("some/model")
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    torch.save(weights | {"transformer.wte.weight": Bomb()}, snapshot / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="more than tensors"):
        load_policy("some/model")
    assert not (tmp_path / "ran").exists()


# --- inputs


def test_a_damaged_input_is_refused_by_its_producers_manifest(lab):
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
