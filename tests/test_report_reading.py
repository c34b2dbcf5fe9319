"""The panel of efficiency, and the sentences of a report: what is drawn and claimed, and what is within the errors."""

import json
import math

import pytest
from rich.console import Console

from dpoctl.outputs.files import seal
from dpoctl.reports import efficiency, frontier, page, reading, rounds, tables
from dpoctl.reports.collect import collect

BASE = {"temperature": 1.0, "scorer": "c@prob", "n": 64, "length": 9.0, "length_se": 1.0}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sealed(path, stage, inputs, size=1, **more):
    described = [
        {"name": name, "path": name, "size": size, "sha256": content, "manifest": None} for name, content in inputs
    ]
    content = {"stage": stage, "options": {}, "inputs": described, "outputs": [], "metrics": {}, "versions": {}} | more
    path.write_text(json.dumps(seal(content) | {"cost": {}}))


def run(folder, method, points, *, se=0.01, beta=0.1, seed=0, lr=1e-4, schedule="constant", reference="SFT", size=1):
    """A run directory with (reward, KL) after updates 0, 1, ..."""
    row = BASE | {"model": str(folder), "method": method, "options": {"beta": beta, "seed": seed}}
    rows = [
        row | {"step": step, "reward": r, "reward_se": se, "kl": k, "kl_se": 0.02} for step, (r, k) in enumerate(points)
    ]
    write(folder / "eval.jsonl", rows)
    options = {"beta": beta, "lr": lr, "seed": seed, "schedule": schedule}
    (folder / "config.yaml").write_text(json.dumps({"stage": "train-dpo", "model": reference} | options))
    inputs = [("model", reference), ("scorer", "CLASSIFIER")]
    sealed(folder / "manifest.json", "train-dpo", inputs, size, identity=options, metrics={"folder": str(folder)})
    return str(folder)


def optimum(folder, best_of_n=(), reference="SFT", samples=()):
    """Reward .5 + .1 KL up to .8 at KL 3, best-of-n points (reward, KL), and rewards of the samples themselves."""
    write(folder / "ref.jsonl", [{"prompt_id": "1", "prompt": "p", "completion": "c", "k": 0, "finish": "stop"}])
    sealed(folder / "ref.jsonl.manifest.json", "sample", [("model", reference)])
    made = json.loads((folder / "ref.jsonl.manifest.json").read_text())["id"]
    row = BASE | {"model": "ref.jsonl", "method": "optimum", "options": {"samples": 64}, "step": None}
    row["effective_samples"] = 9.0
    rows = [row | {"reward": 0.5 + k / 10, "reward_se": 0.001, "kl": k, "kl_se": 0.01} for k in (0.0, 1.0, 2.0, 3.0)]
    best = row | {"method": "best-of-n", "options": {"n": 4}}
    rows += [best | {"reward": r, "reward_se": 0.01, "kl": k, "kl_se": 0.0} for r, k in best_of_n]
    rows += [row | {"method": "sample", "reward": r, "reward_se": 0.01, "kl": None} for r in samples]
    path = write(folder / "curves.jsonl", rows)
    described = [
        {"name": "completions", "path": "ref.jsonl", "size": 1, "sha256": "S", "manifest": made},
        {"name": "scorer", "path": "c", "size": 1, "sha256": "CLASSIFIER", "manifest": None},
    ]
    content = {"stage": "evaluate", "options": {"completions": "ref.jsonl"}, "inputs": described, "outputs": []}
    content |= {"metrics": {}, "versions": {}}
    (folder / "curves.jsonl.manifest.json").write_text(json.dumps(seal(content) | {"cost": {}}))
    return path


# --- the panel -------------------------------------------------------------------------------------------------------


def test_the_panel_has_the_efficiency_of_each_point(tmp_path):
    """Of reward .6 the optimum has KL 1, so that KL 4 is 25 %; .9 is beyond its samples, and best-of-n is a bound."""
    dpo = run(tmp_path / "a", "dpo", [(0.5, 0.0), (0.6, 4.0), (0.7, 8.0), (0.9, 12.0)])
    drawing = frontier.plane(collect([dpo, optimum(tmp_path, [(0.7, 3.0)])]))
    plane, panel = drawing.figure.axes
    [line] = [found for found in panel.lines if len(found.get_xdata()) == 3]
    assert list(line.get_xdata()) == [0.6, 0.7, 0.9] and list(line.get_ydata()) == pytest.approx([0.25, 0.25, 0.25])
    arrows = sorted(tuple(text.xy) for text in panel.texts)
    assert arrows == [(0.7, pytest.approx(2 / 3)), (0.9, pytest.approx(0.25))]
    assert plane.get_xlabel().startswith("sequence KL") and panel.get_xlabel() == plane.get_ylabel()
    assert 2 / 3 < panel.get_ylim()[1] < 1 and "100 %" in drawing.caption


def test_noise_is_not_drawn_and_without_an_optimum_there_is_one_panel(tmp_path):
    """Reward .52 +- .02 is the reference's within its error: the optimum's KL is 0.2 +- 0.2."""
    noisy = run(tmp_path / "a", "dpo", [(0.52, 1.0), (0.7, 4.0)], se=0.02)
    panel = frontier.plane(collect([noisy, optimum(tmp_path)])).figure.axes[1]
    assert [x for line in panel.lines for x in line.get_xdata() if x == 0.52] == []
    drawing = frontier.plane(collect([noisy]))
    assert len(drawing.figure.axes) == 1 and "efficiency" not in drawing.caption
    only_noise = run(tmp_path / "b", "dpo", [(0.52, 1.0)], se=0.02)
    assert len(frontier.plane(collect([only_noise, optimum(tmp_path)])).figure.axes) == 1


# --- the sentences ---------------------------------------------------------------------------------------------------


def test_a_lead_is_told_with_its_errors(tmp_path):
    """At KL 3 the lines are at .65 and .60; errors .01 each, and of the KL .02 by the slope."""
    dpo = run(tmp_path / "a", "dpo", [(0.5, 0.0), (0.6, 2.0), (0.7, 4.0)])
    ppo = run(tmp_path / "b", "ppo", [(0.5, 0.0), (0.55, 2.0), (0.65, 4.0)])
    told = reading.sentences(collect([dpo, ppo]))
    error = math.hypot(0.01, 0.05 * 0.02)
    apart = 0.05 / math.hypot(error, error)
    assert told[1] == (
        f"At KL 3 dpo (β=0.1) is ahead of the next method, ppo (β=0.1): reward 0.650 ± 0.010 against 0.600 ± 0.010, "
        f"{apart:.1f} standard errors apart."
    )
    assert [text.split()[2] for text in told[:3]] == ["2", "3", "4"]
    assert "where there is one run: dpo (β=0.1), ppo (β=0.1)" in told[3] and len(told) == 4


def test_nothing_is_claimed_within_the_error(tmp_path):
    dpo = run(tmp_path / "a", "dpo", [(0.6, 2.0), (0.7, 4.0)], se=0.03)
    ppo = run(tmp_path / "b", "ppo", [(0.55, 2.0), (0.65, 4.0)], se=0.03)
    told = reading.sentences(collect([dpo, ppo, optimum(tmp_path)]))
    assert all("no method is clearly ahead" in text for text in told[:3]) and "1.2 standard errors" in told[1]
    assert "In efficiency dpo (β=0.1) does not clearly lead" in told[3]
    assert "leads" not in " ".join(told) and " is ahead" not in " ".join(told)


def test_a_gap_is_not_bridged(tmp_path):
    """Between the reference and a first point at KL 4 nobody knows where the run was."""
    dpo = run(tmp_path / "a", "dpo", [(0.5, 0.0), (0.6, 1.0), (0.7, 2.0)])
    ppo = run(tmp_path / "b", "ppo", [(0.5, 0.0), (0.8, 4.0), (0.85, 6.0)])
    told = reading.sentences(collect([dpo, ppo]))
    assert told == ["No two methods have near points around one KL: dpo from 1 to 2 nats; ppo from 4 to 6 nats."]


def test_the_best_setting_counts_and_seeds_are_averaged(tmp_path):
    """Seeds .60 and .64 of beta 1 have the mean .62 +- .02 (their spread); another learning rate is another setting."""
    seeds = [run(tmp_path / f"s{n}", "dpo", [(r, 2.0), (r, 4.0)], beta=1.0, seed=n) for n, r in enumerate((0.60, 0.64))]
    slower = run(tmp_path / "slow", "dpo", [(0.5, 2.0), (0.5, 4.0)], beta=1.0, lr=1e-6)
    worse = run(tmp_path / "w", "dpo", [(0.4, 2.0), (0.4, 4.0)], beta=0.1)
    ppo = run(tmp_path / "p", "ppo", [(0.5, 2.0), (0.5, 4.0)])
    told = reading.sentences(collect([*seeds, slower, worse, ppo]))
    assert f"dpo (β=1) is ahead of the next method, ppo (β=0.1): reward 0.620 ± {math.hypot(0.01, 0.02):.3f}" in told[0]
    assert told[-1].endswith("where there is one run: ppo (β=0.1).")


def test_efficiency_leads_by_its_errors(tmp_path):
    """25 % at reward .6 and 50 % at reward .7."""
    dpo = run(tmp_path / "a", "dpo", [(0.6, 4.0)], se=0.001)
    ppo = run(tmp_path / "b", "ppo", [(0.7, 4.0)], se=0.001)
    found = collect([dpo, ppo, optimum(tmp_path)])
    told = reading.sentences(found)
    [said] = [text for text in told if "efficiency" in text]
    assert said.startswith("In efficiency ppo (β=0.1) leads among final policies: 50.0 % ± ")
    assert "at reward 0.700, dpo (β=0.1) 25.0 % ± " in said
    assert said in page.write(found, [], "t")


def test_one_method_or_another_scorer_is_not_compared(tmp_path):
    dpo = run(tmp_path / "a", "dpo", [(0.6, 2.0), (0.7, 4.0)])
    assert reading.sentences(collect([dpo, optimum(tmp_path)])) == []
    ppo = run(tmp_path / "b", "ppo", [(0.55, 2.0), (0.65, 4.0)])
    rows = [json.loads(line) | {"scorer": "c@logit"} for line in (tmp_path / "b/eval.jsonl").read_text().splitlines()]
    write(tmp_path / "b/eval.jsonl", rows)
    assert reading.sentences(collect([dpo, ppo])) == []


# --- a whole chain for each seed -----------------------------------------------------------------------------------


def chains(folder, dpo, ppo):
    """The inputs of a report: for each seed its own reference and optimum, a DPO run through KL 2 and 4 at an equal
    reward, and where there is one a PPO run."""
    found = []
    for seed, (one, other) in enumerate(zip(dpo, ppo, strict=True)):
        home, own = folder / f"s{seed}", {"seed": seed, "reference": f"SFT{seed}"}
        found.append(run(home / "runs/dpo", "dpo", [(one, 2.0), (one, 4.0)], **own))
        found += [run(home / "runs/ppo", "ppo", [(other, 2.0), (other, 4.0)], **own)] if other else []
        found.append(optimum(home / "runs", [(0.6, 0.5)], own["reference"], [0.5]))
    return found


def test_equal_names_get_their_folders(tmp_path):
    found = collect([*chains(tmp_path, [0.6, 0.64], [0.5, None]), str(tmp_path / "s0/runs/dpo")])
    assert [one.name for one in found.runs] == ["s0/runs/dpo", "ppo", "s1/runs/dpo"]
    rows = tables.evaluations(found.final_points).rows
    assert [row[0] for row in rows] == [
        *("s0/runs/dpo", "ppo", "s1/runs/dpo"),
        *("s0/runs: best of 4", "s0/runs/ref.jsonl", "s1/runs: best of 4", "s1/runs/ref.jsonl"),
    ]
    assert {name for name, _ in found.costs} >= {"s0/runs/dpo", "ppo", "s0/runs/curves"}
    [several] = rounds.told(found)
    assert several.endswith("these groups: s0/runs/dpo, ppo; s1/runs/dpo")


def test_long_names_are_whole_and_long_lists_are_not(tmp_path, capsys):
    runs = [run(tmp_path / f"{'long-' * 9}{n}", "dpo", [(0.6, 2.0)]) for n in range(6)]
    found = collect([*runs, run(tmp_path / "other", "dpo", [(0.6, 2.0)], reference="OTHER")])
    tables.show_evaluations(found.final_points, Console(width=100))
    cells = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert "".join(cells) == "".join(one.name for one in found.runs)
    [several] = rounds.told(found)
    assert several.endswith(f"{found.runs[3].name} and 2 more; other") and found.runs[4].name not in several


def test_chains_of_several_seeds_are_averaged(tmp_path):
    """DPO has .60 and .64, PPO .52 and .50: means .62 +- .02 and .51 +- .01, and each run's error of .01."""
    found = collect(chains(tmp_path, [0.60, 0.64], [0.52, 0.50]))
    told = reading.sentences(found)
    first, second = math.hypot(0.01, 0.02), math.hypot(0.01, 0.01)
    assert f"dpo (β=0.1) is ahead of the next method, ppo (β=0.1): reward 0.620 ± {first:.3f} against " in told[0]
    assert f"0.510 ± {second:.3f}, {0.11 / math.hypot(first, second):.1f} standard errors" in told[0]
    assert told[-1] == "These are means over 2 references, each with its own policies."
    rows = {row[0]: row[1:] for row in tables.seeds(found).rows}
    # the optimum has .60, .64, .52 and .50 at KL 1, 1.4, .2 and 0: of KL 4 25 %, 35 %, 5 % and 0 %
    assert rows["dpo"] == ["training", "0.620 ± 0.028", "0.010", "4.00 ± 0.00", "30.0% ± 7.1%", "2"]
    assert rows["ppo"] == ["training", "0.510 ± 0.014", "0.010", "4.00 ± 0.00", "2.5% ± 3.5%", "2"]
    assert set(rows) == {"dpo", "ppo"}  # the samples of two references are no two evaluations of one
    twice = tables.seeds(collect([optimum(tmp_path / "twice", samples=[0.5, 0.6])]))
    assert twice.rows == [["ref.jsonl", "sampling", "0.550 ± 0.071", "0.010", "–", "–", "2"]]


def test_methods_are_compared_on_the_references_that_both_have(tmp_path):
    """PPO ran on the second reference only, where DPO has .64: not the mean over both."""
    told = reading.sentences(collect(chains(tmp_path, [0.50, 0.64], [None, 0.60])))
    assert "dpo (β=0.1) is ahead of the next method, ppo (β=0.1): reward 0.640 ± 0.010 against 0.600" in told[0]
    assert not any("means over" in text for text in told)
    apart = collect([*chains(tmp_path / "a", [0.50], [None]), run(tmp_path / "p", "ppo", [(0.6, 2.0), (0.6, 4.0)])])
    assert not any(" is ahead" in text for text in reading.sentences(apart))


@pytest.mark.parametrize("other", [{}, {"lr": 1e-3}, {"schedule": "cosine"}, {"size": 2}, {"beta": 1.0}])
def test_runs_of_other_settings_or_models_are_no_seeds(tmp_path, other):
    """What a point says of itself has neither learning rate nor schedule, and no run says how large its model is."""
    first, second = (run(tmp_path / f"a{n}", "dpo", [(0.6, 2.0)], seed=n, **(other if n else {})) for n in range(2))
    assert (tables.seeds(collect([first, second])) is None) == bool(other)


def test_a_mean_of_bounds_is_a_bound(tmp_path):
    found = collect(chains(tmp_path, [0.60, 0.90], [None, None]))
    assert efficiency.of_table(found)[1].at_least
    assert tables.seeds(found).rows[0][5] == "≥ 50.0% ± 35.4%"  # 25 %, and at least 3 of 4 nats
