"""Every option of every command is read by its stage, and refused where the other options make it meaningless."""

import inspect
import json
import shlex
import subprocess
from dataclasses import dataclass, fields, make_dataclass
from typing import Any

import pytest

from dpoctl.cli import command
from dpoctl.cli.app import run
from dpoctl.config.commands import COMMANDS
from dpoctl.config.conditions import ALWAYS, all_of, any_of, given, not_given, one_of
from dpoctl.config.resolve import resolve
from dpoctl.config.schema import base_type, flag_of, identity, inputs, is_required, option, spec_of
from dpoctl.config.shared import PANELS
from dpoctl.errors import InputError
from dpoctl.objectives.catalogue import OBJECTIVES
from helpers.package_source import PACKAGE, closure, read_by_properties, reads

BASE = {  # values of the required options
    "prepare": {"task": "imdb", "tokenizer": "t"},
    "sft": {"model": "m", "data": "d"},
    "make-prefs": {"model": "m", "prompts": "p"},
    "train-dpo": {"model": "m", "data": "d"},
    "train-rm": {"model": "m", "data": "d"},
    "train-ppo": {"model": "m", "prompts": "p", "reward": "r"},
    "train-ilql": {"model": "m", "data": "d"},
    "sample": {"model": "m", "prompts": "p"},
    "score": {"data": "d", "scorer": "s"},
    "evaluate": {},
    "judge": {"candidates": ["a"], "judge_model": "m"},
    "merge": {"inputs": ["a.jsonl"]},
    "report": {"inputs": ["a"]},
    "preview": {"data": "d", "model": "m"},
}
PRESENT = {  # what makes a condition hold
    "eval_prompts": "p",
    "lora": 4,
    "dry_run": True,
    "target_kl": 6.0,
    "ref": "r",
    "best_of": 2,
    "model": ["m"],
    "completions": ["c"],
    "lm": "l",
    "selection_scorer": "s",
    "compare": "j",
    "within": True,
    "check": True,
    "scale": True,
    "add": True,
    "samples": ["s"],
    "judgements": ["j"],
    "form": "f",
    "eval_data": "e",
    "source": "s",
    "scorer": "s",
    "shard": "1/2",
    "row": 2,
    "field": "chosen",
    "json": True,
    "device": "cpu",
    "soft_labels": 1.0,
    "sync_ref_every": 2,
    "judge_batch": True,
    "judge_batch_files": "d",
}
ASKED = [{"judge_batch_files": "d"}, {"price_in": 1.0, "price_out": 1.0}, {"judge_batch": True}]
COMBINED = {  # settings of several options, for conditions of several
    "sft": [{"eval_prompts": "p", "ref": "r"}, {"field": "chosen"}, {"eval_data": "e", "select": "best"}],
    "train-dpo": [
        {"eval_data": "e", "select": "best"},
        {"eval_prompts": "p", "select": "best", "select_by": "reward"},
    ],
    "train-rm": [{"select": "last"}],
    "evaluate": [
        {"model": ["m"], "prompts": "p", "ref": "r"},
        {"completions": ["c"], "selection_scorer": "s"},
        {"model": ["m"], "prompts": "p", "ref": "r", "engine": "vllm"},
        {"model": ["m"], "prompts": "p", "ref": "r", "engine": "server", "base_url": "http://s/v1"},
        {"scorer": "python:s.py:f", "selection_scorer": "python:s.py:f"},
    ],
    "sample": [{"engine": "server", "base_url": "http://s/v1"}],
    "make-prefs": [
        {"judge": "openai", "judge_model": "m"},
        {"samples": ["s"], "scorer": "s"},
        {"samples": ["s"], "judge": "openai", "judge_model": "m", "pairs": "random"},
        *({"judge": "openai", "judge_model": "m"} | more for more in ASKED),
        {"judgements": ["j"], "pairs": "random"},
        {"samples": ["s"], "dry_run": True},
        {"dry_run": True},
        {"unpaired": True},
        *({"engine": "server", "base_url": "http://s/v1", "scorer": scorer} for scorer in ("s", "python:s.py:f")),
    ],
    "merge": [{"inputs": ["adapter"]}],
    "judge": [
        {"backend": "scorer", "scorer": "s", "order": "random"},
        {"backend": "human", "form": "f"},
        {"backend": "human", "form": "f", "annotators": 3},
        *ASKED,
        {"backend": "scorer", "scorer": "s", "dry_run": True},
    ],
}


# --- each option is read --------------------------------------------------------------------------------------------


def unread(name: str, cls: type) -> set[str]:
    files = closure(PACKAGE / "stages" / f"{name.replace('-', '_')}.py")
    files |= {
        PACKAGE / "cli" / file for file in ("claiming.py", "dispatch.py", "torchrun_rows.py", "torchrun_group.py")
    }
    read = set().union(*map(reads, files)) | read_by_properties(cls)
    if name == "train-dpo":
        read |= {option for traits in OBJECTIVES.values() for option in traits.options}
    return {f.name for f in fields(cls)} - read


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_read_by_its_stage(name):
    assert unread(name, COMMANDS[name]) == set()


def test_an_option_that_nothing_reads_is_found():
    colour = ("colour", str, option("blue", "Of the bars."))
    added = make_dataclass("Added", [colour], bases=(COMMANDS["score"],), frozen=True, kw_only=True)
    assert unread("score", added) == {"colour"}


def test_every_option_is_in_a_panel_and_has_a_help_sentence():
    for cls in COMMANDS.values():
        for f in fields(cls):
            condition = spec_of(f).when.help
            assert not (" or --" in condition and " and " in condition), f"{f.name}: ambiguous: {condition}"
            assert spec_of(f).panel in PANELS, f.name
            assert spec_of(f).help.rstrip(")").endswith("."), f.name


# --- each option is refused where it has no effect ------------------------------------------------------------------

CONDITIONAL = [(name, f.name) for name, cls in COMMANDS.items() for f in fields(cls) if spec_of(f).when.help]


def a_value(cls: type, f) -> Any:
    kind, many = base_type(inspect.get_annotations(cls, eval_str=True).get(f.name, f.type))
    spec = spec_of(f)
    if spec.choices:
        return spec.choices[-1]
    if kind is bool:
        return True
    if kind in (int, float):
        low = spec.at_least if spec.at_least is not None else 0.25
        return kind(max(low, 1)) if spec.at_most is None or spec.at_most >= 1 else 0.25
    return ["x"] if many else "x"


def settings_of(name: str) -> list[dict[str, Any]]:
    """Different settings of a command's other options, so that each condition holds in one and fails in another."""
    found = [{}]
    cls = COMMANDS[name]
    for f in fields(cls):
        if f.name in PRESENT:
            found.append({f.name: PRESENT[f.name]})
        if f.name in ("loss", "backend", "judge", "engine", "normalize", "task", "optimizer", "f_divergence", "for_"):
            found += [{f.name: choice} for choice in spec_of(f).choices]
        if spec_of(f).input == "scorer":
            found += [{f.name: "s"}, {f.name: "python:s.py:f"}]
        if f.name == "temperature":
            found.append({"temperature": [0.0] if name == "sample" else 0.0})
    return found + COMBINED.get(name, [])


@pytest.mark.parametrize(("name", "key"), CONDITIONAL)
def test_an_option_without_effect_is_refused_and_one_with_effect_is_not(name, key):
    cls = COMMANDS[name]
    f = next(f for f in fields(cls) if f.name == key)
    refused, accepted = set(), set()
    for setting in settings_of(name):
        if key in setting:
            continue
        flags = {"out": "o"} | BASE[name] | setting | {key: a_value(cls, f)}
        try:
            resolve(cls, name, flags, None)
            said = ""
        except InputError as e:
            said = e.message
        (refused if f"{flag_of(f)} has no effect with" in said else accepted).add(json.dumps(setting))
    assert refused and accepted, (refused, accepted)


DPO, SFT = "train-dpo --model m --data d --out o", "sft --model m --data d --out o"
PPO = "train-ppo --model m --prompts p --reward r --out o"
SAMPLE = "sample --model m --prompts p --out o.jsonl"
JUDGE = "judge a.jsonl --out o.jsonl"
EVALUATE = "evaluate --out o.jsonl"


@pytest.mark.parametrize(
    ("line", "without_effect", "reason", "with_effect"),
    [
        (DPO, "--eval-every 5", "without --eval-data or --eval-prompts", "--eval-every 5 --eval-data e"),
        (SFT, "--eval-every 5", "without --eval-data or --eval-prompts", "--eval-every 5 --eval-prompts e"),
        (PPO, "--eval-every 5", "without --eval-prompts", "--eval-every 5 --eval-prompts e"),
        (DPO, "--ref r --loss simpo", "with --loss simpo and without --eval-prompts", "--ref r"),
        (DPO, "--ref r --loss orpo", "with --loss orpo and", "--ref r --loss orpo --eval-prompts e"),
        (DPO, "--cache-dir c --loss unlikelihood", "with --loss unlikelihood", "--cache-dir c --loss kto"),
        (DPO, "--alpha 1 --loss simpo", "with --loss simpo", "--alpha 1 --loss rpo"),
        (DPO, "--lora-alpha 8", "without --lora", "--lora-alpha 8 --lora 4"),
        (DPO, "--plan-world-size 2", "without --dry-run", "--plan-world-size 2 --dry-run"),
        (DPO, "--top-k 4", "without --eval-prompts", "--top-k 4 --eval-prompts e"),
        (PPO, "--scorer s", "without --eval-prompts", "--scorer s --eval-prompts e"),
        (PPO, "--kl-horizon 9", "without --target-kl", "--kl-horizon 9 --target-kl 6"),
        (PPO, "--adam-eps 1e-8 --optimizer rmsprop", "with --optimizer rmsprop", "--adam-eps 1e-8"),
        (SAMPLE, "--seed 3 --temperature 0", "with --temperature 0", "--seed 3 --temperature 0,1"),
        (SAMPLE, "--top-p .9 --temperature 0", "with --temperature 0", "--top-p .9"),
        (SAMPLE, "--rank-timeout 5 --shard 1/2", "with --shard", "--rank-timeout 5"),
        (
            f"{SAMPLE} --best-of 4",
            "--scorer-revision v --scorer python:s.py:f",
            "with --scorer python:...",
            "--scorer-revision v --scorer s",
        ),
        (EVALUATE, "--n 4 --completions c", "without --model", "--n 4 --model m --ref r --prompts p"),
        (EVALUATE, "--optimum --model m --ref r --prompts p", "without --completions", "--optimum --completions c"),
        (JUDGE, "--prompt-noun x --backend scorer --scorer s", "with --backend scorer", "--prompt-noun x --model m"),
        (
            f"{JUDGE} --model m",
            f"--prompt-noun x --criterion {__file__}",
            "with a file as --criterion",
            "--prompt-noun x --criterion sentiment",
        ),
        (f"{JUDGE} --backend human", "--compare c --form f", "with --form", "--compare c --answers a"),
        (
            JUDGE,
            "--seed 3 --backend scorer --scorer s",
            "with --backend scorer and with --order both and without --compare",
            "--seed 3 --backend scorer --scorer s --order random",
        ),
        (JUDGE, "--retries 2 --backend scorer --scorer s", "with --backend scorer", "--retries 2 --model m"),
        ("prepare --out o", "hh --min-prefix 3", "with TASK hh", "toy --min-prefix 3"),
        ("prepare --out o", "toy --source s", "with TASK toy", "hh --source s"),
        ("merge --out o.jsonl", "a.jsonl --save-dtype bfloat16", "with shards of rows", "a --save-dtype bfloat16"),
    ],
)
def test_what_has_no_effect_is_refused_with_its_reason(line, without_effect, reason, with_effect, command_line):
    flag = next(word for word in without_effect.split() if word.startswith("--"))
    assert f"{flag} has no effect {reason}" in command_line(f"{line} {without_effect}")
    assert command_line(f"{line} {with_effect}") == ""


@pytest.fixture
def command_line(monkeypatch, capsys):
    """A function from a command line to what it is refused with; the stage itself is not run."""
    monkeypatch.setattr(command, "run_stage", lambda name, config: 0)

    def refusal(line: str) -> str:
        capsys.readouterr()
        code, said = run(shlex.split(line)), capsys.readouterr().err
        assert code == (2 if said else 0)
        return " ".join(said.split())

    return refusal


RECIPES = {
    "toy": "all frontier stability",
    "imdb": "all frontier stability",
    "imdb-small": "all frontier stability",
    "online": "all",
    "hh": "all smoke",
    "tldr": "all smoke",
    "cnn-dm": "all smoke",
    "own-preferences": "all",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_command_line_of_a_recipe_is_accepted(recipe, monkeypatch, command_line):
    monkeypatch.chdir(PACKAGE.parent / "recipes" / recipe)
    asked = ["make", "-nB", *RECIPES[recipe].split(), "DPOCTL=dpoctl", "PYTHON=python"]
    printed = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ")
    lines = [line.removeprefix("dpoctl ") for line in printed.splitlines() if line.startswith("dpoctl ")]
    assert len(lines) >= 4
    assert {line: said for line in lines if (said := command_line(line))} == {}


def test_a_section_may_state_a_default_and_nothing_else_without_effect(tmp_path):
    recipe = tmp_path / "r.yaml"
    asked = {"completions": ["c"], "out": "o.jsonl"}
    recipe.write_text("evaluate:\n  n: 1\n  temperature: 1\n  limit:\n")
    assert resolve(COMMANDS["evaluate"], "evaluate", asked, str(recipe)).n == 1
    recipe.write_text("evaluate:\n  n: 4\n")
    with pytest.raises(InputError, match="r.yaml:2: evaluate.n has no effect without --model"):
        resolve(COMMANDS["evaluate"], "evaluate", asked, str(recipe))
    with pytest.raises(InputError, match="--n has no effect without --model"):
        resolve(COMMANDS["evaluate"], "evaluate", asked | {"n": 1}, None)


def test_what_a_preset_sets_is_not_refused():
    asked = {"model": "m", "prompts": "p", "reward": "r", "preset": "trl-2023", "out": "o"}
    assert resolve(COMMANDS["train-ppo"], "train-ppo", asked, None).adam_eps == 1e-8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sft:\n  lr: !unknown 3\n", ":2: not a valid value"),
        ("sft:\n  lr: 2001-99-99\n", ":2: not a valid value"),
        ("sft: &a\n  lr: *a\n", ":1: not a valid value"),
        ("? [a, b]\n: 1\n", ":1: a recipe is a mapping of sections, and a key is a name"),
        ("sft:\n  [lr]\n", ":2: section sft is a mapping of options"),
        ("sft:\n  lr: [1\n", "not YAML"),
        ("train-ppo:\n  preset: [paper]\n", ":2: train-ppo.preset: expected a text, got"),
        ("sft:\n  lr: true\n", ":2: sft.lr: expected a number, got true"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused_with_its_line(tmp_path, text, said):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    name = "train-ppo" if "ppo" in text else "sft"
    with pytest.raises(InputError) as e:
        resolve(COMMANDS[name], name, {"out": "o"}, str(recipe))
    assert f"{recipe}{said}" in e.value.message or (said == "not YAML" and said in e.value.message)


def test_a_default_that_has_no_effect_here_is_left_to_the_commands_that_read_it(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("defaults:\n  max-new-tokens: 8\n  lora-alpha: 4\n")
    config = resolve(COMMANDS["train-dpo"], "train-dpo", {"model": "m", "data": "d", "out": "o"}, str(recipe))
    assert config.max_new_tokens == 8
    recipe.write_text("train-dpo:\n  max-new-tokens: 8\n")
    with pytest.raises(InputError, match=r"r.yaml:2: train-dpo.max-new-tokens has no effect without --eval-prompts"):
        resolve(COMMANDS["train-dpo"], "train-dpo", {"model": "m", "data": "d", "out": "o"}, str(recipe))


def test_identity_and_inputs_leave_out_what_is_not_read():
    config = resolve(COMMANDS["train-dpo"], "train-dpo", {"model": "m", "data": "d", "out": "o"}, None)
    assert {"alpha", "lora-alpha", "scorer", "temperature", "eval-limit"}.isdisjoint(identity(config))
    assert sorted(name for name, _, _ in inputs(config)) == ["data", "model"]
    asked = {"model": "m", "data": "d", "out": "o", "eval_prompts": "p"}
    config = resolve(COMMANDS["train-dpo"], "train-dpo", asked, None)
    assert {"temperature", "eval-limit", "scorer"} <= set(identity(config))
    assert {name for name, _, _ in inputs(config)} == {"data", "model", "eval-prompts", "scorer"}


def test_impossible_combinations_are_told_with_everything_else():
    flags = {"task": "imdb", "min_prefix": 9, "limit": "many", "out": "o"}
    with pytest.raises(InputError) as e:
        resolve(COMMANDS["prepare"], "prepare", flags, None)
    for said in ("--limit: expected a whole number", "--min-prefix 9 is more than", "--tokenizer is required"):
        assert said in e.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sft:\n  lr: 1\n  lr: 2\n", r":3: lr: given twice, first at line 2"),
        ("sft:\n  lr: 1\ntrain-dpo:\n  beta: 1\nsft:\n  epochs: 2\n", r":5: sft: given twice, first at line 1"),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path, text, said):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(InputError, match=said):
        resolve(COMMANDS["sft"], "sft", {"model": "m", "data": "d", "out": "o"}, str(recipe))


def test_a_scorer_whose_directory_ends_like_a_score_type_is_recorded_with_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@prob").mkdir()
    config = resolve(COMMANDS["score"], "score", {"data": "d", "scorer": "a@prob", "out": "o.jsonl"}, None)
    assert ("scorer", "model", "a@prob") in inputs(config) and identity(config)["scorer"] == ""
    config = resolve(COMMANDS["score"], "score", {"data": "d", "scorer": "a@prob@logit", "out": "o.jsonl"}, None)
    assert ("scorer", "model", "a@prob") in inputs(config) and identity(config)["scorer"] == "@logit"


# --- conditions -----------------------------------------------------------------------------------------------------


@dataclass
class Few:
    loss: str = "a"
    lora: int | None = None
    eval_data: str | None = None


def test_conditions_hold_and_say_what_is_in_the_way():
    assert given("lora").holds(Few(lora=4)) and not given("lora").holds(Few())
    assert given("lora").unmet(Few()) == "without --lora"
    assert not_given("eval_data").unmet(Few(eval_data="x")) == "with --eval-data"
    assert (
        one_of("loss", "b", "c").unmet(Few()) == "with --loss a"
        and one_of("loss", "b", "c").help == "with --loss b or c"
    )
    both, either = all_of(given("lora"), one_of("loss", "a")), any_of(given("lora"), one_of("loss", "b"))
    assert both.unmet(Few()) == "without --lora" and both.unmet(Few(lora=1, loss="b")) == "with --loss b"
    assert not either.holds(Few()) and either.unmet(Few()) == "without --lora and with --loss a"
    assert either.holds(Few(loss="b"))
    one = any_of(given("lora"), given("eval_data"))
    assert one.unmet(Few()) == "without --lora or --eval-data" and one.help == "with --lora or --eval-data"
    assert all_of(ALWAYS, given("lora")).help == "with --lora"


def test_what_is_required_has_no_default():
    assert {f.name for f in fields(COMMANDS["train-dpo"]) if is_required(f)} == {"model", "data", "out"}
