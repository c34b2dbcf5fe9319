"""Several scorers as one, mean:A,B and min:A,B: worked numbers, scales, and every command that takes a SCORER."""

import math

import pytest

from dpoctl.config.commands import COMMANDS
from dpoctl.config.schema import identity, inputs
from dpoctl.config.scorer import ScorerSpec, model_revisions, parse_scorer
from dpoctl.errors import InputError
from dpoctl.inference.combined_scorer import CombinedScorer
from dpoctl.inference.scorer_base import Scorer, ScorerOptions, Scores
from dpoctl.inference.scorers import load_scorer
from dpoctl.outputs.manifests import revision_of
from dpoctl.reports import origins
from helpers.chain import TRAIN, ppo

ROWS = [{"prompt": "p", "completion": text} for text in ("a", "bb", "ccc")]


@pytest.fixture
def functions(tmp_path):
    """functions("mean", codes...) -> the combined scorer of Python functions of the number n of characters."""

    def build(how, *codes):
        names = []
        for i, code in enumerate(codes):
            path = tmp_path / f"s{i}.py"
            path.write_text(f"def f(rows):\n    return [{code} for n in (len(r['completion']) for r in rows)]\n")
            names.append(f"python:{path}:f")
        return load_scorer(f"{how}:{','.join(names)}")

    return build


def test_mean_and_minimum_by_hand(functions):
    """Scores 1 2 3, 4 2 0 and 0 5 7."""
    codes = ("n", "6 - 2 * n", "[0, 5, 7][n - 1]")
    mean, low = functions("mean", *codes), functions("min", *codes)
    assert mean.score(ROWS).values == pytest.approx([5 / 3, 3, 10 / 3])
    assert low.score(ROWS).values == [0, 2, 0]
    assert mean.score(ROWS).keys == mean.score(ROWS).values and mean.score_type == "python"
    assert functions("min", "n", "-n").score([]).values == []


def test_a_member_that_fails_is_named_with_its_text(functions):
    with pytest.raises(InputError, match="s1.py:f failed: line 2: ZeroDivisionError.*, on 'pbb'"):
        functions("mean", "n", "1 / (2 - n)").score(ROWS)
    with pytest.raises(InputError, match="gave nan for 'pccc'"):
        functions("mean", "n", "float('nan') if n > 2 else n").score(ROWS)


class Given(Scorer):
    """A classifier with these log-odds, read as a probability or as log-odds."""

    def __init__(self, score_type, log_odds):
        super().__init__("given", ScorerOptions())
        self.score_type, self.log_odds = score_type, log_odds

    def _score(self, rows):
        values = self.log_odds if self.score_type != "prob" else [1 / (1 + math.exp(-x)) for x in self.log_odds]
        return Scores(values, self.log_odds)


def combined(how, *members):
    return CombinedScorer("c", ScorerOptions(), how, members)


def test_probabilities_that_saturate_are_still_compared():
    """The log-odds of the mean of the probabilities 1/2 and 3/4 are log(5/3); those near 1 keep their order."""
    one, other = Given("prob", [0.0, 40.0, 50.0]), Given("prob", [math.log(3), 41.0, 51.0])
    mean = combined("mean", one, other).score(ROWS)
    assert mean.values == [0.625, 1.0, 1.0]  # the last two tie as probabilities
    near = [top - math.log((1 + math.exp(-1)) / 2) for top in (40, 50)]
    assert mean.keys == pytest.approx([math.log(5 / 3), *near], rel=1e-12)
    low = combined("min", one, other).score(ROWS)
    assert low.values == [0.5, 1.0, 1.0] and low.keys == [0.0, 40.0, 50.0]
    assert combined("mean", one, other).score_type == "prob"


def test_log_odds_are_averaged_as_they_are():
    scores = combined("mean", Given("log-odds", [1.0, 2.0, 3.0]), Given("log-odds", [3.0, -2.0, 0.0])).score(ROWS)
    assert scores.values == [2.0, 0.0, 1.5] == scores.keys


def test_a_probability_is_not_combined_with_an_unbounded_score(capsys):
    for other in ("logit", "log-odds", "reward", "implicit"):
        with pytest.raises(InputError, match=f"a probability beside .*given: {other}"):
            combined("mean", Given("prob", [0.0]), Given(other, [0.0]))
    scorer = combined("min", Given("prob", [0.0] * 3), Given("python", [7.0] * 3))  # whose scale nobody knows
    assert scorer.score_type == "mixed" and scorer.score(ROWS).keys == [0.5] * 3
    assert "scores of different types (given: prob, given: python)" in " ".join(capsys.readouterr().err.split())


def test_the_notation():
    spec = parse_scorer("mean: rm-a, implicit:p,r,python:f.py:g,http://h:1/x, c@logit")
    kinds = [(member.kind, member.parts, member.score_type) for member in spec.members]
    assert kinds == [
        ("model", ("rm-a",), None),
        ("implicit", ("p", "r"), None),
        ("python", ("f.py", "g"), None),
        ("remote", ("http://h:1/x",), None),
        ("model", ("c",), "logit"),
    ]
    assert spec.inputs == (("model", "rm-a"), ("model", "p"), ("model", "r"), ("file", "f.py"), ("model", "c"))
    assert spec.variant == "mean:model,implicit,python g,remote http://h:1/x,model @logit"
    assert ScorerSpec("model", ("a",)).each == (ScorerSpec("model", ("a",)),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mean:a", "expected two scorers or more\nhint: write mean:SCORER,SCORER"),
        ("min:a,", "expected two scorers or more"),
        ("mean:implicit:p,r", "expected two scorers or more"),
        ("mean:a,a", "names a twice"),
        ("mean:a,min:b,c", "min:b inside mean"),
        ("mean:a@prob,b@logit", "mean of a probability and a logit\nhint: their scales differ"),
        ("min:a,b@probs", "unknown score type 'probs'"),
        ("mean:implicit:p,a@prob", "unknown|expected two scorers or more"),
        ("Mean:a,b", "did you mean mean:a,b"),
    ],
)
def test_malformed_notations_are_refused(text, said):
    with pytest.raises(InputError, match=said):
        parse_scorer(text)


def test_revisions_of_several_models():
    spec = parse_scorer("mean:a,implicit:p,r,python:f.py:g")
    assert model_revisions(spec, None) == (None,) * 3 and model_revisions(spec, "v1") == ("v1",) * 3
    assert model_revisions(spec, "x, y,z") == ("x", "y", "z")
    for given in ("x,y", "x,,z"):
        with pytest.raises(InputError, match="of a scorer of 3 models: expected one or 3"):
            model_revisions(spec, given)
    described = [("data", "file", "d"), *(("scorer", *found) for found in spec.inputs)]
    assert [revision_of(described, i, "x,y,z") for i in (1, 2, 3)] == ["x", "y", "z"]
    assert [revision_of(described, i, "v1") for i in (1, 2, 3)] == ["v1"] * 3


def test_the_identity_tells_how_the_parts_are_combined():
    def scorer(text):
        config = COMMANDS["score"](data="d", scorer=text, out="o.jsonl")
        return identity(config)["scorer"], [path for name, _, path in inputs(config) if name == "scorer"]

    assert scorer("mean:a,b")[1] == scorer("min:a,b")[1] == ["a", "b"]
    different = ["mean:a,b", "min:a,b", "mean:a@logit,b", "mean:a,b@logit", "mean:a,b,c", "mean:a,implicit:b,c"]
    assert len({scorer(text)[0] for text in different}) == len(different)


def test_a_report_tells_mean_and_minimum_of_the_same_models_apart():
    """An efficiency compares a policy with the optimum of the same scorer."""

    def scorer(text, names=("a", "b")):
        described = [{"name": "scorer", "path": name, "sha256": name, "manifest": None} for name in names]
        config = COMMANDS["score"](data="d", scorer=text, out="o.jsonl")
        manifest = {
            "identity": {"scorer": identity(config)["scorer"]},
            "options": {"scorer": text},
            "inputs": described,
        }
        return origins.of_run(manifest).scorer

    assert scorer("mean:a,b") == scorer("mean:x,y") != scorer("min:a,b")
    assert scorer("a", ["a"]) == "a"  # as before


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(rewarded):
    """The miniature world with a second reward model, of another seed."""
    rewarded.run("train-rm --model sft --data prefs.jsonl --lr 2e-3 --epochs 1 --seed 7", *TRAIN, "--out rm2")
    return rewarded


def scored(world, scorer, out, *more):
    world.run("score --data samples.jsonl --scorer", scorer, *more, "--out", out)
    return [row["score"] for row in world.rows(out)]


@pytest.mark.slow
def test_every_command_scores_with_both(two):
    each = [scored(two, name, f"{name}.jsonl") for name in ("rm", "rm2")]
    low = [min(pair) for pair in zip(*each, strict=True)]
    assert scored(two, "min:rm,rm2", "low.jsonl") == pytest.approx(low, abs=1e-5)
    assert scored(two, "mean:rm,rm2", "mean.jsonl") == pytest.approx(
        [sum(pair) / 2 for pair in zip(*each, strict=True)], abs=1e-5
    )
    manifest = two.manifest("low.jsonl")
    assert [i["path"] for i in manifest["inputs"] if i["name"] == "scorer"] == ["rm", "rm2"]
    assert all(i["sha256"] and i["manifest"] for i in manifest["inputs"] if i["name"] == "scorer")
    assert manifest["metrics"]["score_type"] == "reward"
    _, err = two.run("score --data samples.jsonl --scorer mean:rm,rm2 --out low.jsonl", code=2)
    assert "scorer" in err and "--overwrite" in err
    # make-prefs, sample --best-of and the judge choose by the same scores
    score_of = {(row["prompt_id"], row["completion"]): s for row, s in zip(two.rows("samples.jsonl"), low, strict=True)}
    two.run("make-prefs --samples samples.jsonl --scorer min:rm,rm2 --out low-prefs.jsonl")
    for row in two.rows("low-prefs.jsonl"):
        assert row["chosen_score"] == pytest.approx(score_of[row["prompt_id"], row["chosen"]], abs=1e-5)
        assert row["chosen_score"] > row["rejected_score"]
    two.run("judge samples.jsonl --within --backend scorer --scorer min:rm,rm2 --out judged.jsonl")
    for row in two.rows("judged.jsonl"):
        a, b = (score_of[row["prompt_id"], row[side]] for side in ("a", "b"))
        assert abs(a - b) < 1e-5 or row["verdict"] == ("a" if a > b else "b")
    two.run("evaluate --completions samples.jsonl --scorer min:rm,rm2 --out eval.jsonl")
    assert two.rows("eval.jsonl")[0]["reward"] == pytest.approx(sum(low) / len(low), abs=1e-4)
    best = "sample --model sft --prompts train.jsonl --limit 2 --best-of 3 --max-new-tokens 8 --out best.jsonl"
    two.run(best, "--scorer mean:rm,rm2")
    assert len(two.rows("best.jsonl")) == 2


def test_ppo_learns_from_the_lower_reward(two):
    two.run(*ppo("ppo-low", reward="min:rm,rm2"))
    manifest = two.manifest("ppo-low")
    assert manifest["metrics"]["method"] == "ppo"  # both were learnt
    assert [i["path"] for i in manifest["inputs"] if i["name"] == "reward"] == ["../rm", "../rm2"]


def test_a_classifier_s_probability_beside_a_reward_is_refused(rewarded):
    line = "score --data samples.jsonl --scorer {} --out no.jsonl"
    _, err = rewarded.run(line.format("mean:classifier,rm"), code=2)
    assert "classifier: prob, rm: reward" in " ".join(err.split()) and "@log-odds" in err
    assert not (rewarded.folder / "no.jsonl").exists()
    _, err = rewarded.run(line.format("mean:classifier@log-odds,rm"))
    assert "each on its own scale" in " ".join(err.split())
