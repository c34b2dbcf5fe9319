"""Reports: told apart by content, escaped, of unfinished runs too; mistakes named by file and line."""

import json

import pytest

from dpoctl.errors import InputError
from dpoctl.reports import figures, page
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
