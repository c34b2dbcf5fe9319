"""Two gloo ranks: the losses of one process, checkpoints across world sizes, and ranks that fail, hang or are
stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpoctl.cli.app import run as command_line
from helpers.chain import COLD, ROOT, lines_in, wait_until
from helpers.ranks import start_ranks, torchrun

SHORT = (
    "--max-length 96 --max-prompt-length 16 --warmup-steps 2 --max-steps 20 --epochs 99 "
    "--batch-size 6 --tokens-per-batch 200 --log-every 1 --lr 1e-4"
).split()
RUNS = {
    "sft": ["sft", "--model", "lm", "--data", "sft.jsonl", "--eval-data", "held.jsonl"],
    "dpo": ["train-dpo", "--model", "sft", "--data", "prefs.jsonl", "--eval-data", "prefs.jsonl", "--eval-every", "10"],
    "rm": ["train-rm", "--model", "sft", "--data", "prefs.jsonl", "--eval-every", "10"],
}
PPO = (
    "train-ppo --model sft --prompts train.jsonl --reward classifier --batch-size 12 "
    "--minibatch-size 6 --ppo-epochs 1 --max-steps 1 --max-new-tokens 8 "
    "--generation-batch-size 4 --max-length 96 --max-prompt-length 16 "
    "--tokens-per-batch 100"
).split()
ILQL = (
    "train-ilql --model sft --data samples.jsonl --eval-data samples.jsonl --target-rate 0.5 --max-steps 6 "
    "--batch-size 5 --tokens-per-batch 60 --max-length 96 --max-prompt-length 16 --warmup-steps 2 --log-every 1"
).split()


def column(world, run: str, name: str) -> list[float]:
    return [row[name] for row in world.rows(f"{run}/metrics.jsonl") if name in row]


def test_two_ranks_have_the_losses_of_one_process(here):
    """A rank may have fewer micro-batches, or none: batches of 6 pairs hold one or two prompts."""
    two = [
        [*RUNS[name], *SHORT, "--parallel", kind, "--out", f"{name}-{kind}"]
        for name in RUNS
        for kind in ("ddp", "fsdp")
    ]
    torchrun(here, *two, [*PPO, "--out", "ppo-ddp"], [*ILQL, "--out", "ilql-ddp"])
    for name in RUNS:
        assert command_line([*RUNS[name], *SHORT, "--out", f"{name}-one"]) == 0
        for kind in ("ddp", "fsdp"):
            same = pytest.approx(column(here, f"{name}-one", "loss"), rel=1e-5)
            assert len(same.expected) == 20 and column(here, f"{name}-{kind}", "loss") == same
            for metric in ("grad_norm", "eval/loss"):
                expected = column(here, f"{name}-one", metric)
                assert expected, f"{name} logs no {metric}"
                assert column(here, f"{name}-{kind}", metric) == pytest.approx(expected, rel=1e-3)
            costs = [here.manifest(f"{name}-{k}")["cost"] for k in ("one", kind)]
            assert costs[0]["tokens"] == costs[1]["tokens"] and costs[1]["world_size"] == 2
    assert command_line([*PPO, "--out", "ppo-one"]) == 0
    one, other = here.rows("ppo-one/metrics.jsonl")[0], here.rows("ppo-ddp/metrics.jsonl")[0]
    for metric in ("loss", "objective/kl", "objective/scores", "policy/approxkl_avg", "val/explained_variance"):
        assert other[metric] == pytest.approx(one[metric], rel=1e-4, abs=1e-6), metric

    assert command_line([*ILQL, "--out", "ilql-one"]) == 0
    for metric in ("loss", "loss/q", "eval/loss"):
        expected = pytest.approx(column(here, "ilql-one", metric), rel=1e-4)
        assert column(here, "ilql-ddp", metric) == expected, metric
    from transformers import AutoModelForCausalLM

    one, sharded = (AutoModelForCausalLM.from_pretrained(f"dpo-{kind}") for kind in ("one", "fsdp"))
    assert type(sharded) is type(one) and sharded.config.architectures == one.config.architectures
    weights = dict(one.named_parameters())
    assert all((p - weights[n]).abs().max() < 1e-4 for n, p in sharded.named_parameters())


@pytest.mark.slow
def test_sharded_models_load_the_weights_of_the_file(here):
    """Untied weights; buffers that are not saved or have no dimension; adapters, trained, continued or merged."""
    make_models()
    short = [*SHORT, "--max-steps", "3"]
    sft = ["sft", "--data", "sft.jsonl", *short, "--model"]
    runs = {
        "llama": [*sft, "llama"],
        "gemma": [*sft, "gemma"],
        "adapters": [*RUNS["dpo"], *short, "--lora", "4"],
        "adapted": ["train-dpo", "--model", "adapters-one", "--ref", "sft", "--data", "prefs.jsonl", *short],
        "continued": ["train-dpo", "--model", "adapters-one", "--data", "prefs.jsonl", *short, "--lora", "4"],
        "reward": [*RUNS["rm"], *short, "--lora", "4"],
    }
    for name, args in runs.items():
        assert command_line([*args, "--out", f"{name}-one"]) == 0
    torchrun(here, *([*args, "--parallel", "fsdp", "--out", f"{name}-two"] for name, args in runs.items()))
    for name in runs:
        losses = column(here, f"{name}-one", "loss")
        assert len(losses) == 3 and column(here, f"{name}-two", "loss") == pytest.approx(losses, rel=1e-5), name


@pytest.mark.slow
def test_sharded_models_hold_frozen_weights_in_the_compute_dtype(here):
    """Layers of frozen bfloat16 and trained float32 weights are sharded together; so is a frozen reference."""
    short = [*SHORT, "--max-steps", "3", "--dtype", "bfloat16"]
    runs = {
        "low-adapters": [*RUNS["dpo"], *short, "--lora", "4"],
        "low-reference": ["train-dpo", "--model", "sft", "--ref", "lm", "--data", "prefs.jsonl", *short],
    }
    kinds = ("ddp", "fsdp")
    torchrun(here, *([*args, "--parallel", kind, "--out", f"{n}-{kind}"] for n, args in runs.items() for kind in kinds))
    for name in runs:
        ddp, fsdp = (column(here, f"{name}-{kind}", "loss") for kind in kinds)
        assert len(ddp) == 3 and fsdp == pytest.approx(ddp, rel=3e-2), name  # fsdp rounds the residual stream too
    assert column(here, "low-adapters-fsdp", "loss")[0] == pytest.approx(0.6931, abs=1e-3)


def make_models() -> None:
    from transformers import AutoTokenizer, GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained("lm")
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    for folder, model in (
        ("llama", LlamaForCausalLM(LlamaConfig(**shape))),
        ("gemma", GemmaForCausalLM(GemmaConfig(head_dim=8, **shape))),
    ):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def test_a_damaged_model_that_only_rank_0_reads_is_refused_by_both(here):
    shutil.copytree("sft", "damaged", ignore=shutil.ignore_patterns("manifest.json", "checkpoints"))
    with open("damaged/model.safetensors", "r+b") as f:
        f.truncate(1000)
    args = ["train-dpo", "--model", "damaged", "--data", "prefs.jsonl", *SHORT, "--parallel", "fsdp", "--out", "none"]
    ranks = start_ranks(here, *args, command=here.warm)
    said = [rank.communicate(timeout=90)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2] and "damaged: the model cannot be loaded" in said[0], said


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_a_run_resumes_from_two_ranks_on_one_and_back(here, kind):
    args = [*RUNS["dpo"], *SHORT, "--save-every", "1000", "--rank-timeout", "1", "--out", f"moved-{kind}"]
    stopped = stop_one_rank(here, 4, [*args, "--parallel", kind])  # two ranks
    assert 4 <= stopped < 15
    files = sorted(p.name for p in (here.folder / f"moved-{kind}/checkpoints").glob("step-*/*"))
    assert ("model-00002-of-00002.safetensors" in files) == (kind == "fsdp")
    one = here.popen(*args, command=here.warm)
    wait_for_update(here, f"moved-{kind}", stopped + 2, one)
    one.send_signal(signal.SIGTERM)
    one.communicate(timeout=60)
    assert one.returncode == 75
    ranks = start_ranks(here, *args, "--parallel", kind, command=here.warm)
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    assert command_line([*RUNS["dpo"], *SHORT, "--out", "unmoved"]) == 0
    losses = column(here, "unmoved", "loss")
    assert len(losses) == 20 and column(here, f"moved-{kind}", "loss") == pytest.approx(losses, rel=1e-5)


def wait_for_update(world, run: str, step: int, *processes) -> None:
    wait_until(lambda: lines_in(world.folder / run / "metrics.jsonl") >= step, *processes)


def stop_one_rank(world, step: int, args: list[str]) -> int:
    """Send SIGTERM to one of two ranks: both must exit with 75 after the same update, which is returned."""
    ranks = start_ranks(world, *args, command=world.warm)
    run = args[args.index("--out") + 1]
    wait_for_update(world, run, step, *ranks)
    ranks[1].send_signal(signal.SIGTERM)
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [75, 75], said
    assert "a signal to another rank" in said[0] and "error" not in said[1]
    [checkpoint] = (world.folder / run / "checkpoints").glob("step-*")
    return json.loads((checkpoint / "state.json").read_text())["step"]


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_rank_that_dies_or_hangs_stops_the_other_in_time(here, how):
    run = f"lost-{how.name}"
    args = [*RUNS["dpo"], *SHORT, "--max-steps", "500", "--save-every", "3", "--rank-timeout", "0.1", "--out", run]
    ranks = start_ranks(here, *args, command=COLD)
    wait_for_update(here, run, 5, *ranks)
    ranks[1].send_signal(how)
    start = time.monotonic()
    said = ranks[0].communicate(timeout=90)[1]
    ranks[1].kill()
    ranks[1].communicate()
    assert ranks[0].returncode == 75 and time.monotonic() - start < 60
    assert "another rank died, or did not answer for 0.1 minutes" in said and "Traceback" not in said
    assert command_line([*args, "--max-steps", "500", "--dry-run"]) == 0
    assert (
        list((here.folder / run / "checkpoints").glob("step-*")) and not (here.folder / run / "manifest.json").exists()
    )


@pytest.mark.slow
def test_a_process_that_is_still_in_a_group_exits_at_once():
    """The interpreter's teardown of a connected group can abort: neither its exit handlers nor destructors run."""
    script = """if True:
        import atexit, sys
        import torch.distributed as dist
        from dpoctl import __main__ as entry
        from dpoctl.cli import app
        def run(argv):
            if argv[0] == "group":
                dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            print("ran")
            if argv[1] == "raise":
                raise ValueError("a mistake")
            return 75
        app.run = run
        atexit.register(print, "teardown")
        entry.main()
    """
    for group, how, code, printed in (
        ("group", "return", 75, "ran\n"),
        ("group", "raise", 1, "ran\n"),
        ("alone", "return", 75, "ran\nteardown\n"),
        ("alone", "raise", 1, "ran\nteardown\n"),
    ):
        done = subprocess.run([sys.executable, "-c", script, group, how], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout) == (code, printed), done.stderr
        assert ("ValueError: a mistake" in done.stderr) == (how == "raise")


@pytest.mark.slow
def test_if_rank_0_cannot_write_the_other_rank_ends_too(here):
    """A limit on file sizes below the first checkpoint: rank 0 reports it, and the other does not wait for it."""
    args = [*RUNS["dpo"], *SHORT, "--save-every", "3", "--rank-timeout", "5", "--out", "roomless"]
    limited = ["bash", "-c", 'ulimit -f 200; exec "$0" "$@"', *COLD]
    start = time.monotonic()
    ranks = start_ranks(here, *args, command=limited)
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 75] and time.monotonic() - start < 100, said
    assert "cannot be written: " in said[0] and "hint: " in said[0] and "another rank died" in said[1]


def test_all_ranks_exit_with_2_where_rank_0_refuses_its_input(here):
    os.makedirs("foreign", exist_ok=True)
    Path("foreign/notes").write_text("not dpoctl's")
    for args, message in (
        ([*RUNS["dpo"], *SHORT, "--out", "foreign"], "was not created by dpoctl"),
        ([*RUNS["dpo"], *SHORT, "--data", "nowhere.jsonl", "--out", "none"], "nowhere.jsonl: not found"),
    ):
        ranks = start_ranks(here, *args, command=here.warm)
        said = [rank.communicate(timeout=90)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [2, 2], said
        assert message in " ".join(said[0].split())
