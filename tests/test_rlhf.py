"""Reward model, PPO, best-of-n and optimum as a user runs them, on the miniature world."""

import json
import math
import signal
import time

import pytest
import torch

from dpoctl.config.training import TrainPPO
from dpoctl.inference import curves
from dpoctl.models.load import load_policy
from dpoctl.models.rewards import last_token_rewards, make_critic
from dpoctl.objectives.kl import kl_regularised_optimum, optimal_point
from helpers.chain import TRAIN

RM = [
    *"train-rm --model sft --data prefs.jsonl --batch-size 16 --lr 1e-3 --epochs 2".split(),
    *TRAIN,
]


def ppo(out: str, *more: str, reward: str = "rm") -> list[str]:
    return [
        *"train-ppo --model sft --prompts train.jsonl --reward".split(),
        reward,
        *(
            "--batch-size 12 --minibatch-size 6 --ppo-epochs 2 --max-steps 6 --epochs 4 --lr 3e-4 "
            "--target-kl 1 --kl-horizon 60 --max-new-tokens 12 --max-length 96 "
            "--max-prompt-length 16 --save-every 2 --generation-batch-size 4 "
            "--eval-prompts test.jsonl --scorer classifier --eval-every 3 --out"
        ).split(),
        out,
        *more,
    ]


@pytest.fixture(scope="session")
def rewarded(prefs):
    prefs.run(*RM, "--out", "rm")
    return prefs


@pytest.fixture(scope="session")
def optimised(rewarded):
    rewarded.run(*ppo("ppo"))
    return rewarded


def figures(world, name: str) -> dict:
    return json.loads((world.folder / name / "manifest.json").read_text())["metrics"]


def test_the_reward_model_learns_on_prompts_of_its_own(rewarded):
    found = figures(rewarded, "rm")
    assert found["train_pairs"] + found["validation_pairs"] == found["pairs"]
    rows = rewarded.rows("rm/metrics.jsonl")
    assert {"accuracy", "margin", "mean_reward", "min_reward", "max_reward", "eval/calibration_error"} <= set(rows[-1])
    assert rows[0]["min_reward"] < rows[0]["mean_reward"] < rows[0]["max_reward"]
    evaluated = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    assert len(evaluated) > 4 and found["best/accuracy"] == pytest.approx(max(evaluated), abs=1e-6)
    assert found["eval/accuracy"] == pytest.approx(found["best/accuracy"], abs=1e-6)  # the best is what was saved
    assert sum(n for *_, n in found["accuracy_by_margin"]) == found["validation_pairs"]


def test_plain_transformers_reads_the_rewards_that_were_trained(rewarded):
    """On a padded batch, at the EOS; the scorer subtracts the shift, so that the reference's samples average 0."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(rewarded.folder / "rm").eval()
    tokenizer = AutoTokenizer.from_pretrained(rewarded.folder / "rm")
    assert model.config.num_labels == 1 and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    texts = ["I liked it.", "A film without any end, and then some more of it."]
    ids = [tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for t in texts]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    with torch.no_grad():
        plain = model(**batch).logits[:, 0]
        assert torch.allclose(plain, last_token_rewards(model, [(text, 1) for text in ids]), atol=1e-5)
        assert torch.allclose(plain[:1], last_token_rewards(model, [(ids[0], 2)]), atol=1e-5)
    rewarded.run("score", "--data", "samples.jsonl", "--scorer", "rm", "--out", "by-rm.jsonl")
    scores = [row["score"] for row in rewarded.rows("by-rm.jsonl")]
    # the preferences hold nearly all of these samples, each once
    assert abs(sum(scores) / len(scores)) < 0.15 * (max(scores) - min(scores))


def test_killed_the_reward_model_ends_in_the_same_bytes(rewarded):
    args = [*RM, "--save-every", "2", "--out", "rm-killed"]
    process = rewarded.popen(*args)
    deadline = time.monotonic() + 120
    while not list((rewarded.folder / "rm-killed/checkpoints").glob("step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rewarded.run(*args)
    kept = ("model.safetensors", "metrics.jsonl")
    assert rewarded.digest(*(f"rm/{k}" for k in kept)) == rewarded.digest(*(f"rm-killed/{k}" for k in kept))


def test_ppo_logs_what_it_does(optimised):
    rows = optimised.rows("ppo/metrics.jsonl")
    wanted = {
        "objective/kl",
        "objective/kl_coef",
        "objective/scores",
        "objective/entropy",
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "loss/policy_avg",
        "loss/value_avg",
        "val/explained_variance",
        "episode",
    }
    assert wanted <= set(rows[0]) and [row["episode"] for row in rows] == [12 * s for s in range(1, 7)]
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    for before, after in zip(rows, rows[1:], strict=False):  # the controller's formula, step by step
        error = min(0.2, max(-0.2, before["objective/kl"] / 1.0 - 1))
        assert after["objective/kl_coef"] == pytest.approx(
            before["objective/kl_coef"] * (1 + error * 12 / 60), rel=1e-4
        )
    points = optimised.rows("ppo/eval.jsonl")
    assert [p["step"] for p in points] == [0, 3, 6] and all(
        "learned_reward" in p and p["method"] == "ppo" for p in points
    )
    timing = optimised.rows("ppo/timing.jsonl")[-1]
    assert {f"seconds/{part}" for part in ("generating", "scoring", "log_probs", "learning")} <= set(timing)
    load_policy(str(optimised.folder / "ppo"))  # a plain policy: no value head in the way


def test_killed_inside_a_rollout_it_ends_in_the_same_bytes(optimised):
    """Killed a moment after a checkpoint: the next step's rollouts are under way."""
    process = optimised.popen(*ppo("ppo-killed"))
    deadline = time.monotonic() + 120
    while not list((optimised.folder / "ppo-killed/checkpoints").glob("step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (optimised.folder / "ppo-killed/manifest.json").exists()
    _, err = optimised.run(*ppo("ppo-killed"))
    assert "resuming after update 2" in err
    kept = ("model.safetensors", "metrics.jsonl")
    assert optimised.digest(*(f"ppo/{k}" for k in kept)) == optimised.digest(*(f"ppo-killed/{k}" for k in kept))


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_the_value_function_starts_where_it_should(rewarded, kind):
    from transformers import AutoModelForSequenceClassification

    policy, _ = load_policy(str(rewarded.folder / "sft"))
    ids = list(range(5, 25))
    critic = make_critic(policy, kind)
    with torch.no_grad():
        logps, values, entropies, owner = critic([(ids, 4), (ids[:9], 2)], 0.7, entropy=True)
        assert not values.any() and owner.tolist() == [0] * 16 + [1] * 7
        plain = (policy(torch.tensor([ids])).logits[0].float() / 0.7).log_softmax(-1)
        assert torch.allclose(logps[:16], plain[3:-1].gather(1, torch.tensor(ids[4:])[:, None])[:, 0], atol=1e-5)
        assert torch.allclose(entropies[:16], -(plain.exp() * plain).sum(-1)[3:-1], atol=1e-4)
        if kind == "separate":
            rm = AutoModelForSequenceClassification.from_pretrained(rewarded.folder / "rm").eval()
            values = make_critic(policy, kind, rm)([(ids, 4)], 1.0)[1]
            # the value before the last token is the reward of the text up to there
            expected = (last_token_rewards(rm, [(ids[:-1], 4)]) - rm.config.reward_shift) / rm.config.reward_scale
            assert values[-1].item() == pytest.approx(expected.item(), abs=1e-4)


def test_shared_value_head_whitening_and_penalty_train_too(rewarded):
    """A penalty beyond any reward shows in the scores; the fixed coefficient stays."""
    flags = ["--value-model", "shared", "--whiten-rewards", "--normalize-rewards", "--missing-eos-penalty", "-50"]
    args = [a for a in ppo("ppo-shared", *flags, reward="classifier")]
    cut = args.index("--target-kl")
    rewarded.run(*args[:cut], *args[cut + 4 :], "--max-steps", "2")
    rows = rewarded.rows("ppo-shared/metrics.jsonl")
    assert rows[0]["objective/scores"] < -50 * (1 - rows[0]["ended"]) + 1
    assert {row["objective/kl_coef"] for row in rows} == {0.2}
    assert rewarded.rows("ppo-shared/eval.jsonl")[0]["method"] == "ppo-gt"


def test_the_trl_preset_is_papers_row_for_row(prefs):
    out, _ = prefs.run(
        *(
            "train-ppo --preset trl-2023 --model sft --prompts train.jsonl --reward classifier --out planned --dry-run"
        ).split(),
    )
    shown = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split()) == 2)
    expected = {
        "lr": "1.41e-05",
        "adam-eps": "1e-08",
        "batch-size": "256",
        "minibatch-size": "16",
        "ppo-epochs": "4",
        "kl-coef": "0.2",
        "target-kl": "6.0",
        "kl-horizon": "10000",
        "gamma": "1.0",
        "lam": "0.95",
        "clip": "0.2",
        "value-clip": "0.2",
        "vf-coef": "0.1",
        "schedule": "constant",
        "max-grad-norm": "0.0",
    }
    assert {name: shown[name] for name in expected} == expected
    assert "reward's score type    logit" in out
    assert TrainPPO.PRESETS["paper"]["batch_size"] == 1024 and TrainPPO.PRESETS["paper"]["normalize_rewards"]


def python_reward(world, name: str, body: str) -> str:
    (world.folder / f"{name}.py").write_text(f"def f(rows):\n    {body}\n")
    return f"python:{name}.py:f"


@pytest.mark.parametrize(
    ("reward", "more", "said"),
    [
        ("return [float('nan')] * len(rows)", [], "nan for"),
        ("return [1.0]", [], "returned 1 numbers for"),
        ("return [1 / 0 for _ in rows]", [], "ZeroDivisionError"),
        ("return [0.0] * len(rows)", ["--max-new-tokens", "95"], "train.jsonl:"),
        ("return [0.0] * len(rows)", ["--preset", "trl-2023"], "contradicts --preset trl-2023, which sets"),
        ("return [0.0] * len(rows)", ["--top-k", "5"], "the distribution that it samples"),
        ("return [0.0] * len(rows)", ["--minibatch-size", "13"], "more than --batch-size"),
    ],
    ids=["nan", "too-few", "raises", "no-room", "preset", "top-k", "minibatch"],
)
def test_bad_rewards_and_settings_are_one_clear_message(prefs, request, reward, more, said):
    name = request.node.callspec.id
    spec = python_reward(prefs, f"reward_{name.replace('-', '_')}", reward)
    _, err = prefs.run(*ppo(f"refused-{name}", *more, reward=spec), code=2)
    assert said in err and err.count("error:") == 1


def test_a_kl_that_runs_away_is_exit_3(prefs):
    spec = python_reward(prefs, "many", "return [100.0 * len(r['completion']) for r in rows]")
    _, err = prefs.run(*ppo("runaway", "--max-kl", "0.05", "--lr", "1e-2", reward=spec), code=3)
    assert "above --max-kl" in err and "hint:" in err and "checkpoint" in err


def test_a_target_out_of_the_controllers_reach_is_warned_of(prefs):
    spec = python_reward(prefs, "flat", "return [0.0] * len(rows)")
    _, err = prefs.run(*ppo("slow", "--kl-horizon", "10000", "--max-steps", "1", reward=spec))
    assert "can hardly be reached" in err


def test_a_reward_model_that_cannot_be(prefs):
    _, err = prefs.run("train-rm", "--model", "classifier", "--data", "prefs.jsonl", "--out", "no-rm", code=2)
    assert "cannot become a reward model" in err or "mismatch" in err or "is [" in err
    _, err = prefs.run(
        *"train-rm --model sft --data prefs.jsonl --eval-data prefs.jsonl --out no-rm".split(),
        *TRAIN,
        code=2,
    )
    assert "all of its prompts are trained on" in err


def test_best_of_keeps_the_best_and_the_curves_are_those_of_the_samples(rewarded):
    common = ["--model", "sft", "--prompts", "test.jsonl", "--max-new-tokens", "12", "--generation-batch-size", "16"]
    rewarded.run("sample", *common, "--n", "8", "--out", "ref8.jsonl")
    rewarded.run("sample", *common, "--best-of", "8", "--scorer", "rm", "--out", "best8.jsonl")
    rewarded.run("score", "--data", "ref8.jsonl", "--scorer", "rm", "--out", "ref8-rm.jsonl")
    best = {row["prompt_id"]: row for row in rewarded.rows("best8.jsonl")}
    assert len(best) == 12
    # one completion a prompt: it pairs with the first of any other policy
    assert {row["k"] for row in best.values()} == {0} and len({row["best_k"] for row in best.values()}) > 1
    groups: dict[str, list[dict]] = {}
    for row in rewarded.rows("ref8-rm.jsonl"):
        groups.setdefault(row["prompt_id"], []).append(row)
    for prompt_id, rows in groups.items():
        top = max(rows, key=lambda r: r["score"])
        assert best[prompt_id]["score"] == pytest.approx(top["score"], abs=1e-4)
    rewarded.run(
        *(
            "evaluate --completions ref8.jsonl --selection-scorer rm --optimum --scorer classifier --out curves8.jsonl"
        ).split(),
    )
    rows = rewarded.rows("curves8.jsonl")
    plain, of_n = rows[0], [r for r in rows if r["method"] == "best-of-n"]
    assert [r["options"]["n"] for r in of_n] == [1, 2, 4, 8]
    assert of_n[0]["reward"] == pytest.approx(plain["reward"], abs=1e-9) and of_n[0]["kl"] == 0
    assert of_n[3]["kl"] == pytest.approx(math.log(8) - 7 / 8)
    bound = [r for r in rows if r["method"] == "optimum"]
    assert all(a["kl"] <= b["kl"] and a["reward"] <= b["reward"] for a, b in zip(bound, bound[1:], strict=False))
    assert bound[-1]["kl"] < math.log(8) and bound[-1]["effective_samples"] >= 1
    _, err = rewarded.run(
        "evaluate", "--completions", "best8.jsonl", "--optimum", "--scorer", "classifier", "--out", "no.jsonl", code=2
    )
    assert "hint:" in err


def test_the_optimums_estimate_agrees_with_enumeration():
    """20 prompts of 13 outcomes, 4,000 samples each: reward and KL within four standard errors and the small-sample bias."""
    g = torch.Generator().manual_seed(0)
    ref = torch.randn(20, 13, generator=g, dtype=torch.float64).log_softmax(-1)
    rewards = torch.rand(20, 13, generator=g, dtype=torch.float64)
    drawn = torch.multinomial(ref.exp(), 4000, replacement=True, generator=g)
    rows = curves.optimum_curve(rewards.gather(1, drawn))
    for row in rows:
        if row["options"]["beta"] < 0.05:  # the outcomes of least probability decide there: bias of order 1 / (M p)
            continue
        exact_reward, exact_kl = (x.mean().item() for x in optimal_point(ref, rewards, row["options"]["beta"]))
        assert row["reward"] == pytest.approx(exact_reward, abs=0.01)
        assert row["kl"] == pytest.approx(exact_kl, abs=0.03)
        assert row["supported"]
    assert torch.allclose(kl_regularised_optimum(ref, rewards, 1e6), ref, atol=1e-5)
