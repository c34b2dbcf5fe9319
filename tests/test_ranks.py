"""Two ranks are one: the same losses, checkpoints that go from one world size to another, and what happens when one is lost."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpoctl.cli.app import run as command_line
from helpers.chain import COLD, ROOT

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


def torchrun(world, *commands: list[str]) -> str:
    """Run command lines on two ranks of one torchrun; returns what rank 0 and 1 said."""
    worker = ROOT / "tests" / "helpers" / "ranks_worker.py"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, str(worker), json.dumps(commands)],
        cwd=world.folder,
        env=world.env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def by_hand(world, *args: str, command: list[str]) -> list[subprocess.Popen]:
    """Two ranks without torchrun, so that each one's exit code is seen."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank in (0, 1):
        own = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        ranks.append(
            subprocess.Popen(
                [*command, *args], cwd=world.folder, env=world.env | own, stderr=subprocess.PIPE, text=True
            )
        )
    return ranks


def column(world, run: str, name: str) -> list[float]:
    return [row[name] for row in world.rows(f"{run}/metrics.jsonl") if name in row]


def test_two_ranks_give_one_ranks_losses(here):
    """Also where a rank has fewer micro-batches, or none: batches of 6 pairs hold one or two prompts."""
    two = [
        [*RUNS[name], *SHORT, "--parallel", kind, "--out", f"{name}-{kind}"]
        for name in RUNS
        for kind in ("ddp", "fsdp")
    ]
    torchrun(here, *two, [*PPO, "--out", "ppo-ddp"])
    for name in RUNS:
        assert command_line([*RUNS[name], *SHORT, "--out", f"{name}-one"]) == 0
        for kind in ("ddp", "fsdp"):
            same = pytest.approx(column(here, f"{name}-one", "loss"), rel=1e-5)
            assert len(same.expected) == 20 and column(here, f"{name}-{kind}", "loss") == same
            for figure in ("grad_norm", "eval/loss"):
                expected = column(here, f"{name}-one", figure)
                assert column(here, f"{name}-{kind}", figure) == pytest.approx(expected, rel=1e-3)
            costs = [json.loads((here.folder / f"{name}-{k}/manifest.json").read_text())["cost"] for k in ("one", kind)]
            assert costs[0]["tokens"] == costs[1]["tokens"] and costs[1]["world_size"] == 2
    assert command_line([*PPO, "--out", "ppo-one"]) == 0
    one, other = here.rows("ppo-one/metrics.jsonl")[0], here.rows("ppo-ddp/metrics.jsonl")[0]
    for figure in ("loss", "objective/kl", "objective/scores", "policy/approxkl_avg", "val/explained_variance"):
        assert other[figure] == pytest.approx(one[figure], rel=1e-4, abs=1e-6), figure

    from transformers import AutoModelForCausalLM

    one, sharded = (AutoModelForCausalLM.from_pretrained(f"dpo-{kind}") for kind in ("one", "fsdp"))
    assert type(sharded) is type(one) and sharded.config.architectures == one.config.architectures
    weights = dict(one.named_parameters())
    assert all((p - weights[n]).abs().max() < 1e-4 for n, p in sharded.named_parameters())


def test_what_a_rank_is_given_of_a_model_is_what_the_file_holds(here):
    """Untied weights, buffers that are not saved, some without a dimension; adapters that are trained, or merged on the way."""
    make_models()
    short = [*SHORT, "--max-steps", "3"]
    sft = ["sft", "--data", "sft.jsonl", *short, "--model"]
    runs = {
        "llama": [*sft, "llama"],
        "gemma": [*sft, "gemma"],
        "adapters": [*RUNS["dpo"], *short, "--lora", "4"],
        "adapted": ["train-dpo", "--model", "adapters-one", "--ref", "sft", "--data", "prefs.jsonl", *short],
        "reward": [*RUNS["rm"], *short, "--lora", "4"],
    }
    for name, args in runs.items():
        assert command_line([*args, "--out", f"{name}-one"]) == 0
    torchrun(here, *([*args, "--parallel", "fsdp", "--out", f"{name}-two"] for name, args in runs.items()))
    for name in runs:
        losses = column(here, f"{name}-one", "loss")
        assert len(losses) == 3 and column(here, f"{name}-two", "loss") == pytest.approx(losses, rel=1e-5), name


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


def test_a_model_that_rank_0_alone_finds_damaged_is_refused_by_both(here):
    shutil.copytree("sft", "damaged", ignore=shutil.ignore_patterns("manifest.json", "checkpoints"))
    with open("damaged/model.safetensors", "r+b") as f:
        f.truncate(1000)
    args = ["train-dpo", "--model", "damaged", "--data", "prefs.jsonl", *SHORT, "--parallel", "fsdp", "--out", "none"]
    ranks = by_hand(here, *args, command=here.warm)
    said = [rank.communicate(timeout=90)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2] and "damaged: the model cannot be loaded" in said[0], said


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_checkpoint_goes_from_two_ranks_to_one_and_back(here, kind):
    args = [*RUNS["dpo"], *SHORT, "--save-every", "1000", "--rank-timeout", "1", "--out", f"moved-{kind}"]
    assert stopped_behind(here, 4, [*args, "--parallel", kind]) >= 4  # two ranks
    files = sorted(p.name for p in (here.folder / f"moved-{kind}/checkpoints").glob("step-*/*"))
    assert ("model-00002-of-00002.safetensors" in files) == (kind == "fsdp")
    one = here.popen(*args, command=here.warm)
    wait_for(here, f"moved-{kind}", 9, one)
    one.send_signal(signal.SIGTERM)
    one.communicate(timeout=60)
    assert one.returncode == 75
    ranks = by_hand(here, *args, "--parallel", kind, command=here.warm)
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    assert command_line([*RUNS["dpo"], *SHORT, "--out", "unmoved"]) == 0
    assert column(here, f"moved-{kind}", "loss") == pytest.approx(column(here, "unmoved", "loss"), rel=1e-5)


def wait_for(world, run: str, step: int, *processes) -> None:
    deadline = time.monotonic() + 120
    while not (path := world.folder / run / "metrics.jsonl").exists() or len(path.read_bytes().splitlines()) < step:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.02)


def stopped_behind(world, step: int, args: list[str]) -> int:
    """Two ranks of which one is told to stop; both stop behind the same update with 75. Returns that update."""
    ranks = by_hand(world, *args, command=world.warm)
    run = args[args.index("--out") + 1]
    wait_for(world, run, step, *ranks)
    ranks[1].send_signal(signal.SIGTERM)
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [75, 75], said
    assert "a signal to another rank" in said[0] and "error" not in said[1]
    [checkpoint] = (world.folder / run / "checkpoints").glob("step-*")
    return json.loads((checkpoint / "state.json").read_text())["step"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_stops_the_other_in_time(here, how):
    run = f"lost-{how.name}"
    args = [*RUNS["dpo"], *SHORT, "--max-steps", "500", "--save-every", "3", "--rank-timeout", "0.1", "--out", run]
    ranks = by_hand(here, *args, command=COLD)
    wait_for(here, run, 5, *ranks)
    ranks[1].send_signal(how)
    start = time.monotonic()
    said = ranks[0].communicate(timeout=90)[1]
    ranks[1].kill()
    ranks[1].communicate()
    assert ranks[0].returncode == 75 and time.monotonic() - start < 60
    assert "another rank has died, or has not answered for 0.1 minutes" in said and "Traceback" not in said
    assert command_line([*args, "--max-steps", "500", "--dry-run"]) == 0
    assert (
        list((here.folder / run / "checkpoints").glob("step-*")) and not (here.folder / run / "manifest.json").exists()
    )


def test_where_rank_0_finds_no_room_the_other_ends_too(here):
    """A limit on file sizes that the first checkpoint passes: said by rank 0, and nobody waits for it."""
    args = [*RUNS["dpo"], *SHORT, "--save-every", "3", "--rank-timeout", "5", "--out", "roomless"]
    limited = ["bash", "-c", 'ulimit -f 200; exec "$0" "$@"', *COLD]
    start = time.monotonic()
    ranks = by_hand(here, *args, command=limited)
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 75] and time.monotonic() - start < 100, said
    assert "cannot be written: " in said[0] and "hint: " in said[0] and "another rank has died" in said[1]


def test_ranks_end_alike_where_rank_0_is_refused(here):
    os.makedirs("foreign", exist_ok=True)
    Path("foreign/thing").write_text("not dpoctl's")
    for args, code, word in (
        ([*RUNS["dpo"], *SHORT, "--out", "foreign"], 2, "dpoctl did not begin"),
        ([*RUNS["dpo"], *SHORT, "--data", "nowhere.jsonl", "--out", "none"], 2, "not found"),
    ):
        ranks = by_hand(here, *args, command=here.warm)
        said = [rank.communicate(timeout=90)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [code, code], said
        assert word in " ".join(said[0].split())
