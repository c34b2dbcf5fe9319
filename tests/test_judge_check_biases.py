"""judge --check: biases that are planted in simulated judges are found, and none where none is; worked statistics."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from dpoctl.judging import check_statistics as statistics
from dpoctl.judging.check_pairs import Checked
from dpoctl.judging.check_results import family_of, metrics_of_check
from dpoctl.judging.statistics import wilson
from helpers.checked_judges import Simulated, asked, preferences


def findings(comparisons: list[Checked], judge: Simulated) -> dict[str, dict]:
    metrics = metrics_of_check(judge.rows(comparisons), "openai", 0)["check"]
    return {finding["name"]: finding for finding in metrics["findings"]}


def found(comparisons: list[Checked], judge: Simulated) -> set[str]:
    return {name for name, finding in findings(comparisons, judge).items() if finding["found"]}


# --- planted, and not ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory) -> list[Checked]:
    """What a judge is asked of 200 known pairs, whose models are named."""
    models = random.Random(0)

    def model(_: random.Random) -> str:
        return models.choice(["gpt-5-mini", "llama-3", "qwen3"])

    path = tmp_path_factory.mktemp("known") / "known.jsonl"
    return asked(preferences(path, 200, 0, chosen_model=model, rejected_model=model))


@pytest.mark.parametrize(
    ("planted", "names", "implied"),
    [
        ({"position": 0.1}, {"position"}, set()),
        ({"length": 0.7}, {"length"}, {"padded"}),
        ({"obedience": 0.4}, {"injected-a", "injected-b"}, set()),
        ({"family": 1.2}, {"family"}, set()),
        ({"position": 0.1, "obedience": 0.4}, {"position", "injected-a", "injected-b"}, set()),
    ],
    ids=["position", "length", "injection", "family", "two"],
)
def test_a_planted_bias_is_found_and_no_other(planted, names, implied, comparisons):
    """Over five judges; what the planted bias implies may be found too, and one false finding among all of them."""
    seen = [found(comparisons, Simulated(100 * len(str(planted)) + seed, **planted)) for seed in range(5)]
    assert all(names <= each for each in seen)
    assert sum(len(each - names - implied) for each in seen) <= 1


@pytest.mark.parametrize("count", [36, pytest.param(600, marks=pytest.mark.slow)])
def test_a_judge_without_a_bias_is_charged_with_one_in_at_most_one_check_of_twenty(count, tmp_path):
    """Accurate judges and poor ones, few pairs and many, several pairs of a prompt: the family-wise error rate."""
    false = 0
    for seed in range(count):
        n, per_prompt = [(100, 1), (30, 1), (100, 4)][seed % 3]
        comparisons = asked(preferences(tmp_path / "known.jsonl", n, seed, per_prompt), constructed=60)
        false += bool(found(comparisons, Simulated(seed, accuracy=(0.6, 0.8, 0.97)[seed // 3 % 3])))
    assert false / count <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / count)


def test_a_judge_that_answers_by_chance_agrees_with_nothing_and_a_perfect_one_with_all(comparisons):
    chance = metrics_of_check(Simulated(0, accuracy=0.5).rows(comparisons), "openai", 0)["check"]
    assert chance["agreement"]["kappa_low"] < 0 < chance["agreement"]["kappa_high"]
    assert chance["agreement"]["low"] < 0.5 < chance["agreement"]["high"]
    assert 0.4 < chance["stability"]["value"] < 0.6
    perfect = metrics_of_check(Simulated(0, accuracy=1 - 1e-12).rows(comparisons), "openai", 0)["check"]
    assert perfect["agreement"]["value"] == perfect["agreement"]["kappa"] == 1 == perfect["agreement"]["high"]
    assert 0.98 < perfect["agreement"]["low"] < 1 and perfect["stability"]["value"] == 0
    assert not any(finding["found"] for finding in perfect["findings"])
    assert {f["name"]: f["value"] for f in perfect["findings"]}["position"] == 0
    for name, finding in {f["name"]: f for f in perfect["findings"]}.items():  # no error seen is not no error there is
        low, high = (finding[f"excess_{end}" if "excess" in finding else end] for end in ("low", "high"))
        assert high - low > 0.005 and finding["can_find"] > 0.005, name


def test_effects_are_those_that_are_planted(comparisons):
    """Of 20 % of the verdicts that are for A whatever it is, half are above 1/2: 10 points."""
    every = [findings(comparisons, Simulated(seed, position=0.1, length=0.7)) for seed in range(6)]
    positions = [e["position"] for e in every]
    assert np.mean([p["value"] for p in positions]) == pytest.approx(0.1, abs=0.015)
    assert all(p["low"] < 0.1 < p["high"] for p in positions)
    lengths = [findings(comparisons, Simulated(seed, length=0.7))["length"] for seed in range(6)]
    assert np.mean([e["coefficient"] * 20 / e["words"] for e in lengths]) == pytest.approx(0.7, abs=0.1)
    obeyed = [findings(comparisons, Simulated(seed, obedience=0.4))["injected-b"] for seed in range(6)]
    assert np.mean([e["value"] for e in obeyed]) == pytest.approx(0.2 * 0.6 + 0.4, abs=0.05)
    assert np.mean([e["excess"] for e in obeyed]) == pytest.approx(0.4 - 0.2 * 0.4, abs=0.05)


def test_a_length_that_follows_the_truth_is_no_bias(tmp_path):
    """Better answers are longer, but for one in six: a judge of quality alone prefers longer ones, and has no bias."""
    comparisons = [
        replace(c, known="a" if (words(c.a) >= words(c.b)) == (i % 6 > 0) else "b")
        for i, c in enumerate(asked(preferences(tmp_path / "known.jsonl", 150, 0), constructed=0, repeats=1))
    ]
    rows = Simulated(0, accuracy=0.85).rows(comparisons)
    assert np.mean([(row["verdict"] == "a") == (words(row["a"]) >= words(row["b"])) for row in rows]) > 0.65
    lengths = [findings(comparisons, Simulated(seed, accuracy=0.85))["length"] for seed in range(30)]
    assert np.mean([length["value"] for length in lengths]) == pytest.approx(0, abs=0.02)
    assert sum(length["found"] for length in lengths) <= 2


def words(text: str) -> int:
    return len(text.split())


def test_can_find_is_what_is_found_four_times_out_of_five(tmp_path):
    """A position bias as large as the table says is found in about 80 % of the simulations."""
    comparisons = asked(preferences(tmp_path / "known.jsonl", 120, 0), constructed=0, repeats=1)
    every = [findings(comparisons, Simulated(seed, position=0.09))["position"] for seed in range(60)]
    assert np.mean([position["can_find"] for position in every]) == pytest.approx(0.09, abs=0.01)
    assert 0.68 <= np.mean([position["found"] for position in every]) <= 0.92


# --- worked values ---------------------------------------------------------------------------------------------------


def test_signs_are_flipped_exactly_where_prompts_are_few():
    assert statistics.sign_flips(np.array([1.0] * 5), 0) == 2 / 32
    assert statistics.sign_flips(np.array([1.0] * 5), 0, one_sided=True) == 1 / 32
    assert statistics.sign_flips(np.array([2.0, 1.0, -1.0]), 0, one_sided=True) == 3 / 8  # totals 4, 2, 2 of eight
    assert statistics.sign_flips(np.array([0.0, 0.0]), 0) == 1.0
    drawn = statistics.sign_flips(np.array([1.0] * 14 + [-1.0] * 6), 0)
    assert drawn == pytest.approx(0.1153, abs=0.02)  # two-sided sign test of 14 of 20


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0] and statistics.holm([]) == []


def test_intervals_know_prompts():
    values, prompts = [1.0] * 300 + [0.0] * 100, [i // 10 for i in range(400)]
    mean, low, high = statistics.share(values, prompts)
    assert mean == 0.75 and (low, high) == pytest.approx(wilson(0.75, 39), abs=1e-9)  # 40 prompts, variance over n - 1
    assert statistics.share(values, range(400))[1:] == pytest.approx(wilson(0.75, 400), abs=1e-3)
    assert statistics.share([1.0] * 20, [i // 2 for i in range(20)])[1:] == wilson(1.0, 10)


def test_a_difference_of_paired_shares_by_hand():
    """12 against 5 of 100 pairs: (12 - 5)/102, variance ((12 + 5 + 1) - 7^2/102)/102^2, Agresti and Min 2005."""
    values = [1.0] * 12 + [-1.0] * 5 + [0.0] * 83
    estimate = statistics.balance(values, range(100), 0)
    middle, error = 7 / 102, math.sqrt((18 - 49 / 102) / 102**2 * 102 / 101)
    assert estimate.value == 0.07 and estimate.error == pytest.approx(error)
    assert (estimate.low, estimate.high) == pytest.approx((middle - 1.96 * error, middle + 1.96 * error), abs=1e-4)
    assert estimate.p == pytest.approx(0.1435, abs=0.02)  # exact sign test of 12 of 17
    none = statistics.balance([0.0] * 50, range(50), 0)
    assert none.low < 0 < none.high and none.p == 1


def test_kappa_is_that_of_the_summary():
    """Both a 20, both b 15, 5 and 10 apart, of 50: kappa .4; its large-sample error .127 (Fleiss, Cohen, Everitt)."""
    one = ["a"] * 20 + ["a"] * 5 + ["b"] * 10 + ["b"] * 15
    other = ["a"] * 20 + ["b"] * 5 + ["a"] * 10 + ["b"] * 15
    kappa, low, high = statistics.kappa(one, other, range(50), 0)
    assert kappa == pytest.approx(0.4) and (high - low) / 3.92 == pytest.approx(0.127, abs=0.015)
    assert statistics.kappa(["a", "b"], ["a", "b"], [0, 1], 0)[0] == 1
    assert statistics.kappa(["a", "a"], ["a", "a"], [0, 1], 0)[0] == 1  # as statistics.agreement


def test_a_coefficient_is_recovered_with_its_interval():
    rng, covered = np.random.default_rng(0), 0
    for seed in range(60):
        truth, x, z = rng.choice([-1.0, 1.0], 300), rng.normal(size=300), rng.normal(size=300)
        y = (rng.random(300) < 1 / (1 + np.exp(-(1.2 * truth + 0.5 * x)))).astype(float)
        estimate, points = statistics.controlled(y, x + 0.3 * truth, [truth, z], range(300), seed)
        covered += estimate.low < 0.5 < estimate.high
        assert points == pytest.approx(0.17, abs=0.05)
    assert covered >= 53  # of 57 expected


def test_a_covariate_beside_truth_that_explains_all_is_no_bias():
    truth = [1.0, -1.0] * 40
    estimate, _ = statistics.controlled([t > 0 for t in truth], list(range(80)), [truth], range(80), 0)
    assert estimate.p > 0.05 and math.isfinite(estimate.value) and estimate.low < 0 < estimate.high


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("gpt-5-mini", "gpt"),
        ("openai/chatgpt-4o-latest", "gpt"),
        ("o3-mini", "gpt"),
        ("text-davinci-003", "gpt"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama"),
        ("Meta-Llama-3-8B", "llama"),
        ("Qwen2.5-7B", "qwen"),
        ("mistralai/Mixtral-8x7B", "mistral"),
        ("claude-sonnet-4", "claude"),
        ("olmo-2", "olmo"),
        ("7b", ""),
    ],
)
def test_families_by_name(model, family):
    assert family_of(model) == family
