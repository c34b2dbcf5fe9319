"""Reports: inputs recognised by content, text escaped, unfinished runs shown; mistakes named by file and line."""

import io
import json

import pytest
from rich.console import Console

from dpoctl.errors import InputError
from dpoctl.outputs.files import seal
from dpoctl.reports import efficiency, figures, page, tables, wins
from dpoctl.reports.collect import collect

POINT = {
    "model": "runs/<b>dpo</b>",
    "method": "dpo",
    "options": {"beta": 0.1},
    "step": 5,
    "temperature": 1.0,
    "reward": 0.8125,
    "reward_se": 0.01,
    "kl": 3.25,
    "kl_se": 0.2,
    "n": 64,
    "length": 40.0,
    "length_se": 1.0,
    "scorer": "c@prob",
}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_text_is_escaped_and_figures_are_those_of_the_rows(tmp_path):
    evaluations = write(tmp_path / "eval.jsonl", [POINT, POINT | {"options": {"beta": 1.0}, "model": "b", "kl": 1.0}])
    rows = [{"prompt_id": "1", "prompt": "<script>", "completion": "& fine", "k": 0, "finish": "length", "score": 0.25}]
    samples = write(tmp_path / "samples.jsonl", rows)
    found = collect((evaluations, samples))
    drawn = figures.draw(found, tmp_path / "figures")
    assert {figure.name for figure in drawn} == {"frontier", "kl-against-beta"}
    html = page.write(found, drawn, "a < b")
    assert "<script>" not in html and "&lt;script&gt;" in html and "&amp; fine ⏎" in html and "a &lt; b" in html
    assert "0.812 ± 0.010" in html and "3.25 ± 0.20" in html


def test_an_unfinished_run_is_shown_as_one(tmp_path):
    write(tmp_path / "run/metrics.jsonl", [{"step": s, "loss": 1.0 / s} for s in (1, 2, 3)])
    (tmp_path / "run/config.yaml").write_text("stage: sft\nlr: 0.1\n")
    found = collect((str(tmp_path / "run"),))
    html = page.write(found, figures.draw(found, tmp_path / "figures"), "t")
    assert "run: sft (unfinished)" in html and "<svg" in html


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"reward": 1}\n', "eval.jsonl:1"), (json.dumps(POINT) + '\n{"reward"\n', "eval.jsonl:2"), ('{"a": 1}\n', ":1")],
)
def test_what_cannot_be_shown_is_named(tmp_path, text, said):
    (tmp_path / "eval.jsonl").write_text(text)
    with pytest.raises(InputError, match=said):
        collect((str(tmp_path / "eval.jsonl"),))


def test_a_directory_of_something_else_is_named(tmp_path):
    with pytest.raises(InputError, match=r"config\.yaml"):
        collect((str(tmp_path),))


def test_win_rates_against_temperature_and_along_training(tmp_path):
    """A line for each policy in each figure; in the table a row for each temperature, and the last update's."""
    base = {"k": 0, "prompt": "p", "a": "two words", "b": "one", "criterion": "summary-c", "judge": "m", "raw": ""}
    paths = []
    for policy, won in (("dpo", 3), ("ppo", 1)):
        rows = [
            base | {"prompt_id": f"p{i}", "order": order, "temperature": t, "verdict": "a" if i < won + t else "b"}
            for t in (0.0, 1.0)
            for i in range(4)
            for order in ("AB", "BA")
        ]
        paths.append(write(tmp_path / f"wins.{policy}.jsonl", rows))
    along = [
        base | {"prompt_id": "p", "order": "AB", "temperature": 1.0, "step": step, "verdict": verdict}
        for step, verdict in ((0, "b"), (50, "a"))
    ]
    paths.append(write(tmp_path / "along.dpo.jsonl", along))
    found = collect(tuple(paths))
    head, table = tables.win_rates(found.judged)
    shown = {row[0]: dict(zip(head, row, strict=True)) for row in table}
    rates = {name: row["win rate"] for name, row in shown.items()}
    assert rates == {
        "wins.dpo, T = 0": "0.750",
        "wins.dpo, T = 1": "1.000",
        "wins.ppo, T = 0": "0.250",
        "wins.ppo, T = 1": "0.500",
        "along.dpo, update 50": "1.000",
    }
    assert shown["wins.ppo, T = 1"]["win / tie / loss"] == "2 / 0 / 2" and shown["wins.ppo, T = 1"]["n"] == "4"
    drawn = {figure.name: figure.caption for figure in figures.draw(found, tmp_path / "figures")}
    assert set(drawn) == {"wins-by-temperature", "wins-by-step"} and "n = 4 comparisons" in drawn["wins-by-temperature"]
    axes = wins.against_temperature(found.judged).figure.axes[0]
    lines = {c.get_label(): [round(y, 3) for y in c.lines[0].get_ydata()] for c in axes.containers}
    assert lines == {"wins.dpo": [0.75, 1.0], "wins.ppo": [0.25, 0.5]}


def run_with(folder, loss, rows):
    write(folder / "metrics.jsonl", rows)
    (folder / "config.yaml").write_text(f"stage: train-dpo\nloss: {loss}\nbeta: 0.1\n")
    return str(folder)


def lines_of(drawing):
    return {line.get_label(): [round(y, 6) for y in line.get_ydata()] for line in drawing.figure.axes[0].lines}


def test_learning_curves_show_log_ratios_and_not_which_pairs_are_in_a_batch(tmp_path):
    """Batches of long and short pairs in turn: raw log-probs jump by 50 nats, the log-ratios do not."""
    chosen, rejected = [0.0, -0.02, -0.04], [0.0, -0.05, -0.1]
    rows = [
        {"step": i + 1, "loss": 0.6, "logps/chosen": -60.0 + 50 * (i % 2), "logps/rejected": -70.0 + 50 * (i % 2)}
        | {"rewards/chosen": c, "rewards/rejected": r, "rewards/accuracies": 0.5, "rewards/margins": c - r}
        for i, (c, r) in enumerate(zip(chosen, rejected, strict=True))
    ]
    found = collect((run_with(tmp_path / "dpo", "sigmoid", rows), run_with(tmp_path / "simpo", "simpo", rows)))
    drawings = {drawing.name: drawing for drawing in figures.drawings(found) if drawing}
    ratios = lines_of(drawings["log-ratios"])
    assert ratios["dpo: log-ratio/chosen"] == [0.0, -0.2, -0.4]
    assert ratios["dpo: log-ratio/rejected"] == [0.0, -0.5, -1.0]
    assert not [label for label in ratios if label.startswith("simpo")]
    raw = lines_of(drawings["logps"])
    assert raw == {"simpo: logps/chosen": [-60.0, -10.0, -60.0], "simpo: logps/rejected": [-70.0, -20.0, -70.0]}
    assert "without a reference" in drawings["logps"].caption
    margins = lines_of(drawings["margins"])
    assert list(margins) == ["dpo: rewards/margins"] and len(margins["dpo: rewards/margins"]) == 2  # not the first


def test_calibration_of_reward_models(tmp_path):
    """The bins of the manifest, of complete runs of train-rm alone; Wilson's interval of 3 of 4 is 0.301 to 0.954."""
    bins = [[0.55, 0.5, 10], [0.75, 0.75, 4], [0.97, 1.0, 6]]
    paths = []
    for name in ("rm", "rm-unfinished"):
        write(tmp_path / name / "metrics.jsonl", [{"step": 1, "loss": 0.7}])
        (tmp_path / name / "config.yaml").write_text("stage: train-rm\n")
        paths.append(str(tmp_path / name))
    metrics = {"calibration": bins, "eval/calibration_error": 0.034}
    sealed = seal({"stage": "train-rm", "options": {}, "inputs": [], "outputs": [], "metrics": metrics}) | {"cost": {}}
    (tmp_path / "rm/manifest.json").write_text(json.dumps(sealed))
    found = collect(paths)
    drawing = next(drawing for drawing in figures.drawings(found) if drawing and drawing.name == "calibration")
    [shown] = drawing.figure.axes[0].containers
    assert shown.get_label() == "rm: error 0.034, 20 pairs"
    assert shown.lines[0].get_xydata().tolist() == [[c, a] for c, a, _ in bins]
    ends = [[round(y, 3) for _, y in segment] for segment in shown.lines[2][0].get_segments()]
    assert ends[1] == [0.301, 0.954] and ends[2][1] == 1.0
    assert not [d for d in figures.drawings(collect(paths[1:])) if d and d.name == "calibration"]


def test_the_table_of_evaluations_has_every_number_of_its_rows():
    fluency = {"ended": 0.25, "perplexity_ref": 12.345, "distinct_1": 0.1, "distinct_2": 0.2, "distinct_3": 0.3}
    curve = {"model": "ref.jsonl", "method": "best-of-n", "options": {"n": 8}, "reward": 0.5, "reward_se": 0.1, "n": 9}
    out = io.StringIO()
    rows = [POINT | fluency | {"repetition": 0.125, "kl_exact": 3.5, "kl_exact_se": 0.1}, curve]
    tables.show_evaluations([*rows, curve | {"method": "optimum"}], Console(file=out, width=200))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.getvalue().splitlines() if "│" in line]
    kl = ["3.25 ± 0.20", "3.50 ± 0.10"]
    measured = ["0.812 ± 0.010", *kl, "40.0 ± 1.0", "25%", "12.35", "0.100/0.200/0.300", "12.5%", "64"]
    assert lines[0][1:] == measured
    assert lines[1] == ["best of 8", "0.500 ± 0.100", "–", "–", "–", "–", "–", "–", "–", "9"]
    assert len(lines) == 2


def test_an_optimum_written_by_version_0_1_is_read(tmp_path):
    point = POINT | {"method": "ceiling", "options": {"samples": 64}, "effective_samples": 12.0}
    found = collect((write(tmp_path / "curves.jsonl", [point, point | {"kl": 1.0}]),))
    [curve] = efficiency.curves(found)
    assert [p["kl"] for p in curve.points] == [1.0, 3.25]
    assert tables.evaluations(found.evaluations).rows == []


def test_an_odd_verdict_is_refused_with_its_line(tmp_path):
    row = {"prompt_id": "p", "k": 0, "prompt": "x", "a": "1", "b": "2", "criterion": "c", "judge": "j", "order": "AB"}
    path = tmp_path / "j.jsonl"
    path.write_text("".join(json.dumps(row | {"verdict": verdict}) + "\n" for verdict in ("a", "maybe")))
    with pytest.raises(InputError, match=r"j\.jsonl:2: field 'verdict': expected one of a, b, tie, invalid"):
        collect([str(path)])
