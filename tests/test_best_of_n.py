"""Best of n and the estimated optimum: the estimators against enumeration, and the curves that `evaluate` writes."""

import itertools
import math

import pytest
import torch

from dpoctl.inference import curves
from dpoctl.objectives.best_of_n import expected_best
from dpoctl.objectives.kl import kl_regularised_optimum, optimal_point


def test_best_of_n_is_the_mean_over_all_subsets():
    g = torch.Generator().manual_seed(0)
    selection = torch.tensor([0.3, -1.0, 0.3, 2.0, 0.7, -1.0])  # with ties
    values = torch.rand(6, generator=g, dtype=torch.float64)
    for n in range(1, 7):
        picked = []
        for subset in itertools.combinations(range(6), n):
            top = max(selection[list(subset)])
            tied = [values[i].item() for i in subset if selection[i] == top]
            picked.append(sum(tied) / len(tied))
        assert expected_best(selection, values, n).item() == pytest.approx(sum(picked) / len(picked), abs=1e-12)
    with pytest.raises(ValueError, match="7 of 6"):
        expected_best(selection, values, 7)


def test_best_of_n_by_the_reward_itself_increases_with_n():
    values = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    curve = [expected_best(values, values, n).item() for n in range(1, 17)]
    assert curve[0] == pytest.approx(values.mean().item()) and curve[-1] == values.max().item()
    assert all(a < b for a, b in itertools.pairwise(curve))


def test_best_of_n_keeps_the_best_and_the_curves_are_those_of_the_samples(rewarded):
    common = ["--model", "sft", "--prompts", "test.jsonl", "--max-new-tokens", "12", "--generation-batch-size", "16"]
    rewarded.run("sample", *common, "--n", "8", "--out", "ref8.jsonl")
    rewarded.run("sample", *common, "--best-of", "8", "--scorer", "rm", "--out", "best8.jsonl")
    rewarded.run("score", "--data", "ref8.jsonl", "--scorer", "rm", "--out", "ref8-rm.jsonl")
    best = {row["prompt_id"]: row for row in rewarded.rows("best8.jsonl")}
    assert len(best) == 12
    # one completion a prompt, with k = 0, so that judge pairs it with the first completion of another policy
    assert {row["k"] for row in best.values()} == {0} and len({row["best_k"] for row in best.values()}) > 1
    groups: dict[str, list[dict]] = {}
    for row in rewarded.rows("ref8-rm.jsonl"):
        groups.setdefault(row["prompt_id"], []).append(row)
    for prompt_id, rows in groups.items():
        top = max(rows, key=lambda r: r["score"])
        assert best[prompt_id]["score"] == pytest.approx(top["score"], abs=1e-4)
    rewarded.run(
        "evaluate --completions ref8.jsonl --selection-scorer rm --optimum --scorer classifier --out curves8.jsonl",
    )
    rows = rewarded.rows("curves8.jsonl")
    plain, of_n = rows[0], [r for r in rows if r["method"] == "best-of-n"]
    assert [r["options"]["n"] for r in of_n] == [1, 2, 4, 8]
    assert of_n[0]["reward"] == pytest.approx(plain["reward"], abs=1e-9) and of_n[0]["kl"] == 0
    assert of_n[3]["kl"] == pytest.approx(math.log(8) - 7 / 8)
    bound = [r for r in rows if r["method"] == "optimum"]
    assert all(a["kl"] <= b["kl"] and a["reward"] <= b["reward"] for a, b in zip(bound, bound[1:], strict=False))
    assert bound[-1]["kl"] < math.log(8) and bound[-1]["effective_samples"] >= 1
    _, err = rewarded.run("evaluate --completions best8.jsonl --optimum --scorer classifier --out no.jsonl", code=2)
    assert "best8.jsonl: not plain samples of one model, so --optimum does not hold" in err


def test_the_optimums_estimate_agrees_with_enumeration():
    """20 prompts of 13 outcomes, 4,000 samples each: reward and KL within sampling error."""
    g = torch.Generator().manual_seed(0)
    ref = torch.randn(20, 13, generator=g, dtype=torch.float64).log_softmax(-1)
    rewards = torch.rand(20, 13, generator=g, dtype=torch.float64)
    drawn = torch.multinomial(ref.exp(), 4000, replacement=True, generator=g)
    # at a smaller beta the outcomes of least probability decide: a bias of order 1 / (M p)
    rows = [row for row in curves.optimum_curve(rewards.gather(1, drawn)) if row["options"]["beta"] >= 0.05]
    assert len(rows) > 5
    for row in rows:
        exact_reward, exact_kl = (x.mean().item() for x in optimal_point(ref, rewards, row["options"]["beta"]))
        assert row["reward"] == pytest.approx(exact_reward, abs=0.01)
        assert row["kl"] == pytest.approx(exact_kl, abs=0.03)
        assert row["supported"]
    assert torch.allclose(kl_regularised_optimum(ref, rewards, 1e6), ref, atol=1e-5)
