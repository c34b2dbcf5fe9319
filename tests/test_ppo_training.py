"""train-ppo as a user runs it: what it logs, the value function, presets, resuming inside a rollout, refusals."""

import pytest
import torch

from dpoctl.config.ppo import TrainPPO
from dpoctl.models.load import load_policy
from dpoctl.models.rewards import last_token_rewards, make_critic
from helpers.chain import assert_same_bytes, ppo


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
    load_policy(str(optimised.folder / "ppo"))  # a plain policy, without the value head


@pytest.mark.slow
def test_a_run_killed_inside_a_rollout_resumes_to_the_same_bytes(optimised):
    """Killed a moment after a checkpoint, while the next step's rollouts are generated."""
    optimised.kill(*ppo("ppo-killed"), when=lambda: optimised.has_checkpoint("ppo-killed"), delay=0.02)
    assert not (optimised.folder / "ppo-killed/manifest.json").exists()
    _, err = optimised.run(*ppo("ppo-killed"))
    assert "resuming after update 2" in err
    assert_same_bytes(optimised, "ppo", "ppo-killed")


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_the_value_function_starts_at_zero_or_at_the_reward_model(rewarded, kind):
    from transformers import AutoModelForSequenceClassification

    policy = load_policy(str(rewarded.folder / "sft")).model
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
    args = ppo("ppo-shared", *flags, reward="classifier")
    cut = args.index("--target-kl")
    rewarded.run(*args[:cut], *args[cut + 4 :], "--max-steps", "2")
    rows = rewarded.rows("ppo-shared/metrics.jsonl")
    assert rows[0]["objective/scores"] < -50 * (1 - rows[0]["ended"]) + 1
    assert {row["objective/kl_coef"] for row in rows} == {0.2}
    assert rewarded.rows("ppo-shared/eval.jsonl")[0]["method"] == "ppo-gt"


def test_the_trl_preset_has_the_papers_values(prefs):
    out, _ = prefs.run(
        "train-ppo --preset trl-2023 --model sft --prompts train.jsonl --reward classifier --out planned --dry-run",
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
