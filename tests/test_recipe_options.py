"""Options from flags and recipe sections: precedence, mistakes reported together, and their list in the help."""

import re
from dataclasses import fields

import pytest

from dpoctl.cli.app import run
from dpoctl.config.commands import COMMANDS
from dpoctl.config.dpo import TrainDPO
from dpoctl.config.resolve import resolve
from dpoctl.config.schema import flag_of, spec_of
from dpoctl.errors import InputError


def test_flags_override_the_section_which_overrides_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("defaults:\n  seed: 3\n  lr: 1e-3\n  beta: 9\ntrain-dpo:\n  lr: 2e-6\n  batch-size: 8\n")
    given = {"model": "m", "data": "d", "out": "o", "batch_size": 16}
    config = resolve(TrainDPO, "train-dpo", given, str(recipe))
    assert (config.seed, config.lr, config.batch_size, config.beta) == (3, 2e-6, 16, 9.0)


def test_all_mistakes_are_reported_at_once_with_place_and_nearest_name(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train-dpo:\n  betta: 1\n  lr: fast\n  loss: sigmoidd\ntrain-dop:\n  beta: 1\n")
    with pytest.raises(InputError) as e:
        resolve(TrainDPO, "train-dpo", {"model": "m", "data": "d"}, str(recipe))
    for message in (
        ":2: train-dpo.betta: no such option (did you mean beta?)",
        ":3: train-dpo.lr: expected a number, got 'fast'",
        "did you mean sigmoid?",
        ":5: train-dop: no such section (did you mean train-dpo?)",
        "--out is required",
    ):
        assert message in e.value.message


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_the_options_of_the_command_and_no_others(name, capsys):
    assert run([name, "--help"]) == 0
    shown = set(re.findall(r"^│ (?:-\w, )?(--[a-z][a-z0-9-]*)", capsys.readouterr().out, re.M))
    options = {flag_of(f) for f in fields(COMMANDS[name]) if not spec_of(f).argument}
    assert options <= shown, options - shown
    assert shown - options <= {"--config", "--json", "--verbose", "--quiet", "--help"}
    assert all(spec_of(f).help for f in fields(COMMANDS[name]))


@pytest.mark.parametrize(
    "line",
    [
        "sample --model m --prompts a.jsonl --prompts b.jsonl --out o.jsonl",
        "train-dpo --model m --data a.jsonl --eval-prompts a.jsonl --eval-prompts b.jsonl --out o",
        "train-dpo --model m --data a.jsonl --columns prompt=a --columns chosen=b --out o",
    ],
)
def test_a_file_that_would_be_left_out_is_refused(line, capsys):
    assert run(line.split()) == 2
    said = capsys.readouterr().err
    assert "given 2 times" in said and "hint: it takes one" in said and "--out" not in said
