"""Rounds as one path in the reward-KL plane, and the efficiency of policies: by manifests, never by names."""

import json
import math
import shutil

import pytest
from markupsafe import escape

from dpoctl.outputs.files import seal
from dpoctl.reports import efficiency, frontier, origins, page, rounds, tables
from dpoctl.reports.collect import collect
from helpers.chain import dpo

BASE = {"temperature": 1.0, "scorer": "c@prob", "n": 64, "length": 9.0, "length_se": 1.0}


def given(name, path, content, made_by=None):
    return {"name": name, "path": path, "size": 1, "sha256": content, "manifest": made_by}


def sealed(path, stage, inputs, **more):
    content = {"stage": stage, "options": {}, "inputs": inputs, "outputs": [], "metrics": {}, "versions": {}} | more
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(seal(content) | {"cost": {}}))
    return json.loads(path.read_text())["id"]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trained(folder, points, start, reference=None, *, beta=0.1, seed=0, pairs=100):
    """A run directory; `start` and `reference` are (content, id of the manifest of the run that made it)."""
    row = BASE | {"model": str(folder), "method": "dpo", "options": {"beta": beta, "seed": seed}}
    rows = [row | {"step": s, "reward": r, "reward_se": 0.01, "kl": k, "kl_se": 0.1} for s, r, k in points]
    write(folder / "eval.jsonl", rows)
    (folder / "config.yaml").write_text(f"stage: train-dpo\nbeta: {beta}\nloss: sigmoid\n")
    inputs = [given("model", "m", *start), given("scorer", "c", "CLASSIFIER")]
    inputs += [given("ref", "r", *reference)] if reference else []
    return str(folder), sealed(
        folder / "manifest.json", "train-dpo", inputs, metrics={"pairs": pairs, "folder": folder.name}
    )


SFT = ("SFT", "id-of-sft")


@pytest.fixture
def chain(tmp_path):
    """Three rounds and an offline run, all with the SFT model as reference, named so that names tell nothing."""
    one, first = trained(tmp_path / "z", [(0, 0.5, 0.0), (9, 0.7, 1.0)], SFT)
    two, second = trained(tmp_path / "a", [(0, 0.7, 1.0), (9, 0.8, 2.0)], ("Z", first), SFT)
    three, _ = trained(tmp_path / "m", [(0, 0.8, 2.0), (9, 0.9, 3.0)], ("A", second), SFT)
    offline, _ = trained(tmp_path / "off", [(0, 0.5, 0.0), (9, 0.6, 2.5)], SFT, SFT)
    return one, two, three, offline


def lines_of(found):
    axes = frontier.plane(found).figure.axes[0]
    return {c.get_label(): list(c.lines[0].get_xdata()) for c in axes.containers}


def texts_of(found):
    return [text.get_text() for text in frontier.plane(found).figure.axes[0].texts]


def test_rounds_are_one_line_in_their_order(chain):
    found = collect([chain[3], *reversed(chain[:3])])
    assert [[run.name for run in path] for path in rounds.paths(found.runs)] == [["z", "a", "m"]]
    drawn = lines_of(found)
    assert drawn == {"dpo": [0.0, 2.5], "dpo in rounds": [0.0, 1.0, 1.0, 2.0, 2.0, 3.0]}
    assert texts_of(found) == ["β=0.1", "z", "a", "m"]
    assert rounds.told(found) == [] and "Rounds are one line" in frontier.plane(found).caption


def test_two_runs_from_one_round_are_two_paths(chain, tmp_path):
    id_of_z = json.loads((tmp_path / "z" / "manifest.json").read_text())["id"]
    other, _ = trained(tmp_path / "b", [(9, 0.75, 1.5)], ("Z", id_of_z), SFT)
    paths = rounds.paths(collect([*chain, other]).runs)
    assert sorted("".join(run.name for run in path) for path in paths) == ["zam", "zb"]


def test_rounds_with_another_reference_are_not_one_path_and_told(chain, tmp_path, capsys):
    """As where --ref was forgotten: the second round's reference is the policy of the first."""
    id_of_z = json.loads((tmp_path / "z" / "manifest.json").read_text())["id"]
    forgot, _ = trained(tmp_path / "a", [(0, 0.7, 0.0), (9, 0.8, 0.5)], ("Z", id_of_z))
    found = collect([chain[0], forgot])
    assert rounds.paths(found.runs) == []
    drawn = frontier.plane(found).figure.axes[0].containers
    assert [list(c.lines[0].get_xdata()) for c in drawn] == [[0.0, 1.0], [0.0, 0.5]]
    assert "dpo in rounds" not in lines_of(found)
    [said] = rounds.told(found)
    assert "a starts from z, but its KL is to another reference" in said
    assert escape(said) in page.write(found, [], "t") and said in frontier.plane(found).caption


def test_points_of_several_references_are_told(chain, tmp_path):
    other, _ = trained(tmp_path / "other", [(9, 0.8, 0.5)], ("BASE", None))
    [said] = rounds.told(collect([chain[0], other]))
    assert "different references" in said and "z; other" in said


@pytest.mark.parametrize(
    ("differs", "shown"),
    [
        ({"seed": 1}, tables.seeds),
        ({"beta": 0.5}, frontier.kl_against_beta),
        ({"pairs": 200}, frontier.reward_against_pairs),
    ],
    ids=["seed", "beta", "pairs"],
)
def test_later_rounds_are_no_seeds_betas_or_sizes_of_one_run(chain, tmp_path, differs, shown):
    """A run from the reference with another one is compared with the first round, one from the first round is not."""
    id_of_z = json.loads((tmp_path / "z" / "manifest.json").read_text())["id"]
    later, _ = trained(tmp_path / "later", [(9, 0.75, 1.5)], ("Z", id_of_z), SFT, **differs)
    other, _ = trained(tmp_path / "other", [(9, 0.75, 1.5)], SFT, SFT, **differs)
    assert shown(collect([chain[0], later])) is None
    assert shown(collect([chain[0], other])) is not None


def test_evaluated_rounds_are_points_of_the_path(chain, tmp_path):
    ids = [json.loads((tmp_path / name / "manifest.json").read_text())["id"] for name in "za"]
    rows = [
        BASE | {"model": m, "method": "dpo", "step": 9, "reward": 0.7, "reward_se": 0.1, "kl": k, "kl_se": 0.1}
        for m, k in (("x/a", 2.1), ("x/z", 1.1))
    ]
    path = write(tmp_path / "e.jsonl", rows)
    inputs = [given("model", "a", "A", ids[1]), given("model", "z", "Z", ids[0]), given("ref", "r", *SFT)]
    sealed(tmp_path / "e.jsonl.manifest.json", "evaluate", inputs, options={"model": ["x/a", "x/z"]})
    found = collect([*chain, path])
    axes = frontier.plane(found).figure.axes[0]
    drawn = [(list(c.lines[0].get_xdata()), c.lines[0].get_linestyle()) for c in axes.containers]
    assert ([1.1, 2.1], "None") in drawn and ([0.0, 1.0, 1.0, 2.0, 2.0, 3.0], "-") in drawn
    # the table has the evaluated points, and the last ones of the other runs
    assert [p["kl"] for p in found.final_points] == [3.0, 2.5, 2.1, 1.1]


def test_a_round_of_two_paths_is_a_point_of_both(chain, tmp_path):
    """Also where the runs measured nothing, and evaluate did."""
    ids = {name: json.loads((tmp_path / name / "manifest.json").read_text())["id"] for name in "za"}
    other, ids["b"] = trained(tmp_path / "b", [], ("Z", ids["z"]), SFT)
    for name in "za":
        (tmp_path / name / "eval.jsonl").unlink()
    row = BASE | {"method": "dpo", "step": 9, "reward": 0.7, "reward_se": 0.1, "kl_se": 0.1}
    rows = [row | {"model": name, "kl": k} for name, k in (("z", 1.0), ("a", 2.0), ("b", 3.0))]
    path = write(tmp_path / "e.jsonl", rows)
    inputs = [*(given("model", name, name, ids[name]) for name in "zab"), given("ref", "r", *SFT)]
    sealed(tmp_path / "e.jsonl.manifest.json", "evaluate", inputs, options={"model": ["z", "a", "b"]})
    axes = frontier.plane(collect([*chain[:2], other, path])).figure.axes[0]
    drawn = [(list(c.lines[0].get_xdata()), c.lines[0].get_linestyle()) for c in axes.containers]
    assert drawn == [([1.0, 2.0], "-"), ([1.0, 3.0], "-")]


# --- efficiency


def curve(tmp_path, reference="SFT", scorer="CLASSIFIER", temperature=1.0, name="curves", manifest=True, made_by="x"):
    """An optimum with reward .5 + .1 KL up to .8 at KL 3, from samples of `reference`."""
    samples = tmp_path / f"{name}.samples.jsonl"
    write(samples, [{"prompt_id": "1", "prompt": "p", "completion": "c", "k": 0, "finish": "stop"}])
    made = sealed(tmp_path / f"{name}.samples.jsonl.manifest.json", "sample", [given("model", "s", reference, made_by)])
    row = BASE | {"model": samples.name, "method": "optimum", "options": {"samples": 64}, "effective_samples": 9.0}
    row |= {"temperature": temperature, "step": None}
    rows = [row | {"reward": 0.5 + kl / 10, "reward_se": 0.02, "kl": kl, "kl_se": 0.1} for kl in (0.0, 1.0, 2.0, 3.0)]
    rows.append(row | {"reward": 0.95, "reward_se": 0.0, "kl": 4.0, "kl_se": 0.0, "supported": False})
    inputs = [given("completions", samples.name, "S", made), given("scorer", "c", scorer)]
    path = write(tmp_path / f"{name}.jsonl", rows)
    if manifest:
        options = {"completions": samples.name}
        sealed(tmp_path / f"{name}.jsonl.manifest.json", "evaluate", inputs, options=options)
    return path


def of_last(found, name):
    [run] = [run for run in found.runs if run.name == name]
    return efficiency.efficiency(run.points[-1], efficiency.curves(found))


def test_efficiency_is_the_optimums_kl_over_the_policys(chain, tmp_path):
    """z has reward .7, for which the optimum needs a KL of 2, and has KL 1; off has .6 at KL 2.5: 1 / 2.5."""
    found = collect([*chain, curve(tmp_path)])
    assert of_last(found, "z").value == pytest.approx(2.0)
    off = of_last(found, "off")
    assert off.value == pytest.approx(0.4) and not off.at_least
    # error: KL per reward is 10; the rewards' errors .01 and .02, the KL's .1
    needed = 10 * math.hypot(0.01, 0.02)
    assert off.error == pytest.approx(0.4 * math.hypot(needed / 1.0, 0.1 / 2.5))
    shown = {row[0]: row[4] for row in tables.evaluations(found.final_points, efficiency.of_table(found)).rows}
    assert shown == {"z": "200.0% ± 30.0%", "a": "150.0% ± 13.5%", "m": "≥ 100.0%", "off": "40.0% ± 9.1%"}
    numbers = {entry["model"].rpartition("/")[2]: entry for entry in tables.numbers(found)["efficiency"]}
    assert numbers["off"]["efficiency"] == pytest.approx(0.4) and numbers["m"]["at_least"]


def test_the_exact_kl_counts_where_there_is_one(chain, tmp_path):
    found = collect([*chain, curve(tmp_path)])
    [run] = [run for run in found.runs if run.name == "off"]
    run.points[-1].update(kl_exact=2.0, kl_exact_se=0.0)
    assert of_last(found, "off").value == pytest.approx(0.5)


def test_a_reward_beyond_the_curve_or_below_it(chain, tmp_path):
    found = collect([*chain, curve(tmp_path)])
    last = of_last(found, "m")  # reward .9: supported up to .8 at KL 3
    assert last.at_least and last.value == pytest.approx(1.0) and "beyond" in last.why
    [run] = [run for run in found.runs if run.name == "off"]
    run.points[-1]["reward"] = 0.45
    assert of_last(found, "off").value == 0.0
    run.points[-1]["kl"] = 0.15  # not above twice its error
    assert of_last(found, "off").value is None and "not above 0" in of_last(found, "off").why
    told = efficiency.told(found)
    assert any("m: its reward is beyond" in text for text in told) and any("off: its KL" in text for text in told)


@pytest.mark.parametrize(
    ("differs", "said"),
    [
        ({"reference": "ANOTHER"}, "the optimum is of another reference"),
        ({"scorer": "ANOTHER"}, "the optimum is of another scorer"),
        ({"temperature": 0.7}, "the optimum is of another temperature"),
        ({"manifest": False}, "the optimum's reference or scorer is unknown"),
    ],
)
def test_an_optimum_of_something_else_gives_no_efficiency(chain, tmp_path, differs, said):
    found = collect([*chain, curve(tmp_path, **differs)])
    assert of_last(found, "off").value is None
    assert [text for text in efficiency.told(found) if said in text]
    assert escape(said) in page.write(found, [], "t")


def test_functions_of_one_file_are_different_scorers(chain, tmp_path):
    found = collect([chain[3], curve(tmp_path)])
    for points, function in ((found.evaluations, "f"), (found.runs[0].points, "g")):
        for p in points:
            p["scorer"] = f"python:c.py:{function}@python"
    assert "another scorer" in of_last(found, "off").why
    for p in found.evaluations:
        p["scorer"] = "python:elsewhere/c.py:g@python"
    assert of_last(found, "off").value == pytest.approx(0.4)


def test_a_servers_scores_are_told_by_its_name(chain, tmp_path):
    manifest = {"id": "1", "inputs": [given("model", "m", *SFT)], "options": {"scorer": "http://node:8000/score"}}
    assert origins.of_run(manifest).scorer == "http://node:8000/score"


def test_samples_of_a_policy_do_not_hide_it_from_the_table(chain, tmp_path):
    """A completions file has no KL; nor are its curves the policy's."""
    made = json.loads((tmp_path / "off" / "manifest.json").read_text())["id"]
    path = curve(tmp_path, reference="OFF", made_by=made)
    table = tables.evaluations(collect([chain[3], path]).final_points)
    assert [row[0] for row in table.rows] == ["off"]


def test_of_two_optima_each_policy_has_its_own(chain, tmp_path):
    found = collect([*chain, curve(tmp_path, reference="ANOTHER", name="c1"), curve(tmp_path, name="c2")])
    assert of_last(found, "off").value == pytest.approx(0.4)


def test_points_of_another_reference_are_not_above_the_optimum(chain, tmp_path):
    """Round z is .1 above the curve at its KL, which counts where the curve may be its own."""
    assert [text[:2] for text in frontier.above_optimum(collect([chain[0], curve(tmp_path)]))] == ["z "]
    assert frontier.above_optimum(collect([chain[0], curve(tmp_path, reference="ANOTHER")])) == []


def test_without_an_optimum_it_is_said_what_adds_one(chain):
    found = collect(chain)
    assert efficiency.of_table(found) is None
    [said] = efficiency.told(found)
    assert "evaluate --completions SAMPLES --optimum" in said and escape(said) in page.write(found, [], "t")
    assert "efficiency" not in tables.evaluations(found.final_points, efficiency.of_table(found)).head


# --- as the commands write it


@pytest.mark.slow
def test_a_real_second_round(trained, tmp_path):
    """Of runs, evaluations and samples as they are written; the run without --ref is another path."""
    world, more = trained, ["--max-steps", "2", "--eval-every", "2"]
    again = [word if word != "sft" else "dpo" for word in dpo("round-2", *more)]
    world.run(*again, "--ref sft")
    world.run(*[word if word != "round-2" else "forgot" for word in again])
    world.run("sample --model sft --prompts test.jsonl --n 16 --max-new-tokens 12 --out ref.jsonl")
    world.run("evaluate --completions ref.jsonl --optimum --scorer classifier --out curves.jsonl")
    measured = "--ref sft --prompts test.jsonl --n 4 --max-new-tokens 12 --scorer classifier"
    world.run(f"evaluate --model dpo --model round-2 {measured} --out rounds.eval.jsonl")
    out, err = world.run("report dpo round-2 rounds.eval.jsonl curves.jsonl --out rounds.report --json")
    found = json.loads(out)
    assert "another reference" not in err
    shown = {entry["model"] for entry in found["efficiency"]}
    beyond = [word for line in err.splitlines() if "efficiency:" in line for word in line.split()]
    assert shown | {word.strip(",:") for word in beyond} >= {"dpo", "round-2"}
    _, err = world.run("report dpo forgot curves.jsonl --out forgot.report")
    assert "forgot starts from dpo, but its KL is to another reference" in " ".join(err.split())
    moved = tmp_path / "moved"  # what a path holds does not count
    shutil.copytree(world.folder / "round-2", moved)
    [path] = rounds.paths(collect([str(world.folder / "dpo"), str(moved)]).runs)
    assert [run.name for run in path] == ["dpo", "moved"]


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("dpo", {"beta": 0.1}, "β=0.1"),
        ("distill", {"beta": 0.3, "loss": "distill"}, "β=0.3"),
        ("dpo-soft", {"beta": 1.0, "soft_labels": 0.05}, "τ=0.05"),
        ("unlikelihood", {"alpha": 0.5, "beta": 0.1}, "α=0.5"),
        ("ppo", {"target_kl": 4.0}, "KL*=4"),
        ("preferred-ft", {}, ""),
    ],
)
def test_the_swept_option_is_written_beside_a_point(method, options, text):
    assert frontier.swept_option({"method": method, "options": options}) == text
