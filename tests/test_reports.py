"""Reports: told apart by content, escaped, of unfinished runs too; mistakes named by file and line."""

import json

import pytest

from dpoctl.errors import InputError
from dpoctl.reports import figures, page, tables, wins
from dpoctl.reports.collect import collect

POINT = {"model": "runs/<b>dpo</b>", "method": "dpo", "options": {"beta": 0.1}, "step": 5, "temperature": 1.0, "reward": 0.8125,
         "reward_se": 0.01, "kl": 3.25, "kl_se": 0.2, "n": 64, "length": 40.0, "length_se": 1.0, "scorer": "c@prob"}  # fmt: skip


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
    assert {name for name, _, _ in drawn} == {"frontier", "kl-against-beta"}
    html = page.write(found, drawn, "a < b", tmp_path)
    assert "<script>" not in html and "&lt;script&gt;" in html and "&amp; fine ⏎" in html and "a &lt; b" in html
    assert "0.812 ± 0.010" in html and "3.25 ± 0.20" in html


def test_an_unfinished_run_is_shown_as_one(tmp_path):
    write(tmp_path / "run/metrics.jsonl", [{"step": s, "loss": 1.0 / s} for s in (1, 2, 3)])
    (tmp_path / "run/config.yaml").write_text("stage: sft\nlr: 0.1\n")
    found = collect((str(tmp_path / "run"),))
    html = page.write(found, figures.draw(found, tmp_path / "figures"), "t", tmp_path)
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
    along = [base | {"prompt_id": "p", "order": "AB", "temperature": 1.0, "step": step, "verdict": verdict}
             for step, verdict in ((0, "b"), (50, "a"))]  # fmt: skip
    paths.append(write(tmp_path / "along.dpo.jsonl", along))
    found = collect(tuple(paths))
    head, table = tables.win_rates(found.judged)
    shown = {row[0]: dict(zip(head, row, strict=True)) for row in table}
    rates = {name: row["win rate"] for name, row in shown.items()}
    assert rates == {"wins.dpo, T = 0": "0.750", "wins.dpo, T = 1": "1.000", "wins.ppo, T = 0": "0.250",
                     "wins.ppo, T = 1": "0.500", "along.dpo, update 50": "1.000"}  # fmt: skip
    assert shown["wins.ppo, T = 1"]["win / tie / loss"] == "2 / 0 / 2" and shown["wins.ppo, T = 1"]["n"] == "4"
    drawn = {name: caption for name, caption, _ in figures.draw(found, tmp_path / "figures")}
    assert set(drawn) == {"wins-by-temperature", "wins-by-step"} and "n = 4 comparisons" in drawn["wins-by-temperature"]
    axes = wins.against_temperature(found.judged)[2].axes[0]
    lines = {c.get_label(): [round(y, 3) for y in c.lines[0].get_ydata()] for c in axes.containers}
    assert lines == {"wins.dpo": [0.75, 1.0], "wins.ppo": [0.25, 0.5]}
