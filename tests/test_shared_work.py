"""What ranks share beside updates: reference log-probs, rewards, points of the frontier, scores, `evaluate`.

The results are those of one process, and a rank that is killed or stopped in a shared part ends the others in time.
"""

import pytest
from safetensors.torch import load_file

from dpoctl.cli.app import run as command_line
from dpoctl.errors import NumericalError
from dpoctl.runtime import collectives, sharing
from helpers.chain import World
from helpers.ranks import start_ranks

LENGTHS = "--max-length 96 --max-prompt-length 16 --warmup-steps 2 --tokens-per-batch 200".split()
TRAIN = [*LENGTHS, *"--batch-size 6 --max-steps 2 --lr 1e-3 --log-every 1 --rank-timeout 0.5".split()]
DPO = ["train-dpo", "--model", "sft", "--data", "prefs.jsonl", *TRAIN]
RM = ["train-rm", "--model", "sft", "--data", "prefs.jsonl", *TRAIN, "--eval-every", "1000"]
SAMPLING = "--scorer classifier --max-new-tokens 6 --generation-batch-size 4".split()
POINTS = ["--eval-prompts", "test.jsonl", "--eval-every", "1", "--keep-samples", *SAMPLING]
PPO = (
    "train-ppo --model sft --prompts train.jsonl --reward classifier --minibatch-size 6 --ppo-epochs 1 "
    "--max-length 96 --max-prompt-length 16 --batch-size 6 --max-steps 1 --lr 1e-3 --tokens-per-batch 200"
).split()
EVALUATE = (
    "evaluate --model sft --model lm --ref sft --lm lm --prompts test.jsonl --n 2 --completions samples.jsonl"
).split()
REFERENCE = "dpoctl.training.reference_cache:summed_logps"
OFTEN = {"DPOCTL_RANK_SET": "dpoctl.training.reference_cache:SAVE_EVERY_S=0"}


def on_ranks(world: World, *args: str, ranks: int = 2, codes: set[int] | None = None, **env: str) -> list[str]:
    """What the ranks say; their exit codes are `codes`, 0 by default. One that dies must not hold up the others."""
    processes = start_ranks(world, *args, command=world.warm, ranks=ranks, **env)
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert {process.returncode for process in processes} == (codes or {0}), said
    assert "Traceback" not in "".join(said), said
    return said


def fault(place: str, call: int = 2, what: str = "SIGKILL") -> dict[str, str]:
    return {"DPOCTL_RANK_FAULT": f"1 {what} {call} {place}"}


KILLED = {75, 137}  # the rank that is left, and the one that is killed


def cached(world: World, folder: str) -> list:
    return sorted((world.folder / folder).iterdir())


@pytest.fixture(scope="module")
def alone(prefs):
    """Runs of one process: DPO with points of the frontier and a cache of its own, and a reward model."""
    prefs.run(*DPO, *POINTS, "--cache-dir", "cache-alone", "--out", "dpo-alone")
    prefs.run(*RM, "--out", "rm-alone")
    return prefs


# --- reference log-probs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "kind"), [(2, "ddp"), (4, "ddp"), (2, "fsdp")])
def test_reference_log_probs_are_those_of_one_process(here, alone, ranks, kind):
    [expected] = cached(here, "cache-alone")
    name = f"cache-{kind}-{ranks}"
    on_ranks(here, *DPO, "--parallel", kind, "--cache-dir", name, "--out", f"dpo-{kind}-{ranks}", ranks=ranks)
    [found] = cached(here, name)
    assert found.name == expected.name
    if kind == "ddp":
        assert found.read_bytes() == expected.read_bytes()
    else:
        assert load_file(found)["logps"].tolist() == pytest.approx(load_file(expected)["logps"].tolist(), rel=1e-5)


@pytest.mark.slow
def test_a_lower_precision_has_a_cache_of_its_own_where_the_model_is_sharded(here):
    """FSDP rounds hidden states between blocks, replicas do not: with the other's log-probs the log-ratios are off."""
    args = [*DPO, "--dtype", "bfloat16", "--cache-dir", "cache-bf16", "--parallel"]
    for n, kind in enumerate(("ddp", "fsdp")):
        said = on_ranks(here, *args, kind, "--out", f"dpo-bf16-{kind}")[0]
        assert "log-ratios before the first update: at most 0.0e+00" in said
        assert len(cached(here, "cache-bf16")) == n + 1


@pytest.mark.parametrize(
    ("what", "codes"), [("SIGKILL", KILLED), pytest.param("SIGTERM", {75}, marks=pytest.mark.slow)]
)
def test_reference_log_probs_resume(here, alone, what, codes):
    """Killed on two ranks (parts are saved every few minutes) or stopped; resumed on one, whose bytes are the same."""
    name = f"stopped-{what}"
    args = [*DPO, *POINTS, "--cache-dir", f"cache-{name}", "--out", name]
    said = on_ranks(here, *args, codes=codes, **fault(REFERENCE, 4, what), **(OFTEN if what == "SIGKILL" else {}))[0]
    if what == "SIGTERM":
        assert "stopped by a signal to another rank after" in said and "reference log-probs, which are kept" in said
    [part] = cached(here, f"cache-{name}")
    done = int(load_file(part)["done"].sum())
    assert part.name.endswith(".partial") and 0 < done < len(load_file(part)["done"])
    said = here.run(*args)[1]
    assert f"resuming after {done} of" in said and "log-ratios before the first update: at most 0.0e+00" in said
    [whole], [expected] = cached(here, f"cache-{name}"), cached(here, "cache-alone")
    assert whole.read_bytes() == expected.read_bytes()
    assert here.digest(f"{name}/model.safetensors") == here.digest("dpo-alone/model.safetensors")


def test_a_damaged_part_is_computed_again(here, alone):
    [expected] = cached(here, "cache-alone")
    args = [*DPO, "--cache-dir", "cache-damaged", "--out", "dpo-damaged"]
    here.run(*args, "--out", "dpo-damaged-before")
    [whole] = cached(here, "cache-damaged")
    data = bytearray(whole.read_bytes())
    data[-1] ^= 1
    whole.unlink()
    whole.with_name(whole.name + ".partial").write_bytes(data)
    assert "damaged; computing it again" in here.run(*args)[1]
    assert [p.read_bytes() for p in cached(here, "cache-damaged")] == [expected.read_bytes()]


# --- reward models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "codes"), [("SIGKILL", KILLED), ("SIGTERM", {75})])
def test_a_reward_model_stopped_after_its_last_update_loses_none(here, what, codes):
    """In the pass over the training completions that normalises rewards; the rerun starts from the last update."""
    name, whole = f"rm-{what}", f"rm-whole-{what}"
    place = "dpoctl.training.reward_model:rewards_of"
    said = on_ranks(here, *RM, "--out", name, codes=codes, **fault(place, 2, what))[0]
    assert "held-out accuracy" not in said
    if what == "SIGTERM":
        assert "stopped by a signal to another rank after update 2 of 2; the state is saved" in said
    assert "resuming after update 2" in on_ranks(here, *RM, "--out", name)[0]
    on_ranks(here, *RM, "--out", whole)
    files = ("model.safetensors", "config.json", "metrics.jsonl")
    assert here.digest(*(f"{name}/{f}" for f in files)) == here.digest(*(f"{whole}/{f}" for f in files))
    assert here.manifest(name)["metrics"] == here.manifest(whole)["metrics"]


def test_rewards_are_those_of_one_process(here, alone):
    for ranks, kind in ((2, "ddp"), (4, "ddp"), (2, "fsdp")):
        on_ranks(here, *RM, "--parallel", kind, "--out", f"rm-{kind}-{ranks}", ranks=ranks)
        found, expected = (here.manifest(run)["metrics"] for run in (f"rm-{kind}-{ranks}", "rm-alone"))
        for metric in ("eval/loss", "eval/mean_reward", "reward_shift"):
            assert found[metric] == pytest.approx(expected[metric], rel=1e-3, abs=1e-4), metric


# --- points of the frontier ------------------------------------------------------------------------------------------


def points(world: World, run: str) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "model"} for row in world.rows(f"{run}/eval.jsonl")]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_point_of_the_frontier_is_that_of_one_process(here, alone, kind):
    """Three batches of prompts over two ranks. The untouched policy's point is the same to the last bit."""
    on_ranks(here, *DPO, *POINTS, "--parallel", kind, "--out", f"points-{kind}")
    found, expected = points(here, f"points-{kind}"), points(here, "dpo-alone")
    assert found[0] == expected[0] and found[0]["kl"] == 0.0
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-4)
        assert one["kl"] == pytest.approx(other["kl"], abs=0.05)
    samples = [
        [row for row in here.rows(f"{run}/samples.jsonl") if row["step"] == 0]
        for run in (f"points-{kind}", "dpo-alone")
    ]
    assert samples[0] == samples[1] and len(samples[0]) == 12


@pytest.mark.slow
def test_sharded_ranks_may_run_different_numbers_of_passes(here):
    """Prompts of each length are decoded apart, so that ranks forward the model equally often by chance only."""
    aligned = {"DPOCTL_RANK_SET": "dpoctl.inference.decoding:_find_mode=lambda model, length: Mode.ALIGNED"}
    args = ["sft", "--model", "sft", "--data", "sft.jsonl", *TRAIN, *POINTS, "--max-new-tokens", "3"]
    said = on_ranks(here, *args, "--parallel", "fsdp", "--out", "aligned-fsdp", **aligned)[0]
    assert "prompts of equal length share a batch" in said
    on_ranks(here, *args, "--out", "aligned-alone", ranks=1, **aligned)
    assert points(here, "aligned-fsdp")[0] == points(here, "aligned-alone")[0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "place",
    [
        "dpoctl.inference.completions:generate",
        "dpoctl.models.logprobs:_kl_sums",
        "dpoctl.inference.scorers:classifier_logits",
    ],
)
@pytest.mark.slow
def test_a_rank_killed_at_a_point_of_the_frontier(here, alone, kind, place):
    run = f"killed-{kind}-{place.partition(':')[2]}"
    args = [*DPO, *POINTS, "--tokens-per-batch", "40", "--parallel", kind, "--out", run]
    said = on_ranks(here, *args, codes=KILLED, **fault(place))[0]
    assert "another rank died, or did not answer for 0.5 minutes" in said
    if place.endswith("generate"):
        on_ranks(here, *args)
        assert points(here, run)[0] == points(here, "dpo-alone")[0] and len(points(here, run)) == 3


def test_ppo_shares_points_and_scores_with_its_own_reference(here):
    args = [*PPO, *POINTS, "--rank-timeout", "0.5"]
    here.run(*args, "--out", "ppo-alone")
    on_ranks(here, *args, "--out", "ppo-ranks")
    found, expected = points(here, "ppo-ranks"), points(here, "ppo-alone")
    assert found[0] == expected[0] and found[1]["kl"] == pytest.approx(expected[1]["kl"], abs=0.05)
    scores = [here.rows(f"{run}/metrics.jsonl")[0]["objective/scores"] for run in ("ppo-ranks", "ppo-alone")]
    assert scores[0] == scores[1]


def test_a_scorer_that_fails_on_one_rank_stops_all_with_its_message(here):
    (here.folder / "picky.py").write_text(
        "def f(rows):\n    for row in rows:\n        if row['prompt'] == PROMPT:\n            raise ValueError('no')\n"
        f"    return [1.0] * len(rows)\nPROMPT = {here.rows('test.jsonl')[1]['prompt']!r}\n"
    )
    args = [*DPO, *POINTS, "--scorer", "python:picky.py:f", "--out", "picky"]
    said = on_ranks(here, *args, codes={2})
    assert all("picky.py:f failed: ValueError: no, on prompt_id" in " ".join(text.split()) for text in said)


@pytest.mark.parametrize("share", [sharing.map_shared, lambda items, work: sharing.on_rank_0(lambda: work(items))])
@pytest.mark.parametrize("own", [True, False])
def test_an_error_of_any_kind_is_raised_on_every_rank(monkeypatch, share, own):
    """As rank 0 of two: what this rank meets, or what the other tells of."""
    told = [None, (NumericalError, "the other's", "its hint")]
    sent = []
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "gather", lambda item: sent.append(item) or ([item, None] if own else told))

    def work(items):
        if own:
            raise NumericalError("this one's", "a hint")
        return list(items)

    with pytest.raises(NumericalError, match="this one's" if own else "the other's"):
        share([1, 2], work)
    assert sent == [(NumericalError, "this one's", "a hint") if own else None]


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_splits_prompts_and_has_the_bytes_of_one_process(here):
    args = [*EVALUATE, *SAMPLING, "--rank-timeout", "0.5"]
    assert command_line([*args, "--out", "evaluated.jsonl"]) == 0
    for ranks in (2, 4):
        on_ranks(here, *args, "--out", f"evaluated-{ranks}.jsonl", ranks=ranks)
        assert here.digest(f"evaluated-{ranks}.jsonl") == here.digest("evaluated.jsonl")
        one, other = (here.manifest(f"{name}.jsonl") for name in ("evaluated", f"evaluated-{ranks}"))
        assert one["metrics"] == other["metrics"] and one["identity"] == other["identity"]
    assert "nothing to do" in on_ranks(here, *args, "--out", "evaluated.jsonl")[0]
    refused = on_ranks(here, *args[:-2], "--shard", "1/2", "--out", "x.jsonl", codes={2})
    assert "ranks split the work themselves" in refused[0]


@pytest.mark.slow
def test_an_engine_of_each_rank_samples_all_models_first(here):
    """One rank is stopped while the second model is sampled: no row is sampled twice, and the rows are the same."""
    common = [*EVALUATE, "--scorer", "classifier", "--max-new-tokens", "6", "--rank-timeout", "0.5"]
    here.run(*common, "--generation-batch-size", "8", "--out", "local.jsonl")
    ahead = [*common, "--engine", "vllm", "--engine-batch-size", "8", "--out", "ahead.jsonl"]
    stopped = fault("dpoctl.inference.engines.local:generate", 2, "SIGTERM")
    said = on_ranks(here, *ahead, codes={75}, DPOCTL_AHEAD="1", **stopped)
    assert "after 40 samples, which are kept" in said[0]
    kept = here.folder / "ahead.jsonl.samples.partial"
    assert len(kept.read_text().splitlines()) == 40
    on_ranks(here, *ahead, DPOCTL_AHEAD="1")
    assert here.digest("ahead.jsonl") == here.digest("local.jsonl") and not kept.exists()


@pytest.mark.slow
def test_evaluate_keeps_the_models_that_are_done(here):
    """Rank 1 is killed at the second model, then stopped at it: the first row stays, and the bytes are the same."""
    args = [*EVALUATE, *SAMPLING, "--rank-timeout", "0.5", "--out", "kept.jsonl"]
    on_ranks(here, *args, codes=KILLED, **fault("dpoctl.inference.completions:generate", 4))
    said = on_ranks(here, *args, codes={75}, **fault("dpoctl.inference.completions:generate", 2, "SIGTERM"))
    assert "resuming after 1 rows" in said[0] and "stopped by a signal to another rank after 2 rows" in said[0]
    on_ranks(here, *args)
    here.run(*args[:-1], "once.jsonl")
    assert here.digest("kept.jsonl") == here.digest("once.jsonl")
