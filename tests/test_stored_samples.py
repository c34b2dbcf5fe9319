"""evaluate --completions with --model and --ref: the KL of samples that are on disk, by the ids of their rows."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpoctl.cli.app import run
from dpoctl.data.chats import prompt_of
from dpoctl.data.stored import text_key

TOLD = ("reward", "kl", "kl_exact", "length", "perplexity_ref", "ended", "repetition", "distinct_2")
SAMPLE = "sample --model dpo --prompts test.jsonl --limit 12 --max-new-tokens 12 --n 3"


@pytest.fixture(scope="module")
def sampled(trained):
    """The world with samples of `dpo` at two temperatures, and the evaluation of `dpo` that samples for itself."""
    for name, temperature in (("warm", "1"), ("cold", "0.5")):
        trained.run(f"{SAMPLE} --temperature {temperature} --out {name}.jsonl")
        trained.run(
            f"evaluate --model dpo --ref sft --prompts test.jsonl --limit 12 --max-new-tokens 12 --n 3 "
            f"--temperature {temperature} --scorer classifier --out {name}.direct.jsonl"
        )
    return trained


@pytest.fixture
def evaluate(sampled, monkeypatch, capsys):
    """Run evaluate on a completions file: (exit code, rows, what it said)."""
    monkeypatch.chdir(sampled.folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    count = 0

    def evaluated(*arguments, model="dpo", ref="sft"):
        nonlocal count
        count += 1
        out = sampled.folder / f"stored.{count}.jsonl"
        given = [*("--model", model), *(("--ref", ref) if ref else ())]
        capsys.readouterr()
        code = run(["evaluate", *given, "--scorer", "classifier", "--overwrite", "--out", out.name, *arguments])
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        return code, rows, " ".join(capsys.readouterr().err.split())

    return evaluated


def changed(sampled, name, change, source="warm.jsonl"):
    """A copy of a samples file, without its manifest, with some rows changed."""
    rows = [json.loads(line) for line in (sampled.folder / source).read_text().splitlines()]
    for i, row in enumerate(rows):
        change(i, row)
    (sampled.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.mark.parametrize("name", ["warm", "cold"])
def test_the_numbers_are_those_of_sampling_again(name, sampled, evaluate):
    code, [row], _ = evaluate("--completions", f"{name}.jsonl")
    [direct] = sampled.rows(f"{name}.direct.jsonl")
    assert code == 0
    for field in (*TOLD, "reward_se", "kl_se", "kl_exact_se", "n", "temperature"):
        assert row[field] == pytest.approx(direct[field], rel=1e-5, abs=1e-6), field
    assert row["kl"] > 0.01
    same = ("model", "method", "options", "step", "scorer")
    assert {k: row[k] for k in same} == {k: direct[k] for k in same}
    assert row["completions"] == f"{name}.jsonl" and "completions" not in direct


def kls_of(folder, rows, temperature):
    """(mean log-ratio, mean exact KL) of samples of `dpo`, in float64, each on its own."""
    models = [AutoModelForCausalLM.from_pretrained(folder / name).double().eval() for name in ("dpo", "sft")]
    found = []
    for row in rows:
        prompt, ids = row["prompt_ids"], row["completion_ids"]
        with torch.no_grad():
            logits = [model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] for model in models]
        p, r = (each.div(temperature).log_softmax(-1) for each in logits)
        ratio = (p - r).gather(1, torch.tensor(ids)[:, None]).sum()
        found.append([ratio.item(), (p.exp() * (p - r)).sum().item()])
    return torch.tensor(found).mean(0).tolist()


@pytest.mark.parametrize(("name", "temperature"), [("warm", 1.0), ("cold", 0.5)])
def test_the_kl_is_that_of_the_sampled_distribution(name, temperature, sampled, evaluate):
    _, [row], _ = evaluate("--completions", f"{name}.jsonl")
    expected = kls_of(sampled.folder, sampled.rows(f"{name}.jsonl"), temperature)
    assert [row["kl"], row["kl_exact"]] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_scored_samples_and_several_files(sampled, evaluate):
    sampled.run("score --data warm.jsonl --scorer classifier --out warm.scored.jsonl")
    code, rows, said = evaluate("--completions", "warm.scored.jsonl", "--completions", "cold.jsonl")
    assert code == 0 and [row["temperature"] for row in rows] == [1.0, 0.5]
    assert rows[0]["kl"] == pytest.approx(sampled.rows("warm.direct.jsonl")[0]["kl"], rel=1e-5)
    assert "without a manifest" not in said


def test_copies_of_samples_are_told_by_the_command_that_sampled_them(sampled, evaluate):
    """Rows that do not tell their temperature, copied twice with scores."""
    sampled.run(
        "make-prefs --model sft --prompts test.jsonl --limit 8 --completions 2 --temperature 0.5 --top-p 0.9 "
        "--max-new-tokens 8 --scorer classifier --completions-out first.jsonl --out first.prefs.jsonl"
    )
    sampled.run("score --data first.jsonl --scorer classifier --out second.jsonl")
    sampled.run("make-prefs --samples second.jsonl --completions-out third.jsonl --out third.prefs.jsonl")
    assert all("temperature" not in row for row in sampled.rows("third.jsonl"))
    code, [row], said = evaluate("--completions", "third.jsonl", model="sft", ref="lm")
    assert code == 0 and row["temperature"] == 0.5 and row["kl"] is None and "--top-p or --top-k" in said
    code, rows, said = evaluate("--completions", "third.jsonl", model="dpo")
    assert (code, rows) == (2, []) and "samples of sft, not of dpo" in said
    code, rows, said = evaluate("--completions", "second.jsonl", "--optimum", model="sft", ref="lm")
    assert (code, rows) == (2, []) and "--optimum does not hold for them: they were sampled with --top-p" in said
    (sampled.folder / "second.jsonl.manifest.json").unlink()
    code, rows, said = evaluate("--completions", "third.jsonl", model="sft", ref="lm")
    assert (code, rows) == (2, []) and "'temperature': missing" in said


def test_completions_without_a_token_have_no_kl(sampled, evaluate):
    """A batch of them alone has nothing to forward."""

    def emptied(i, row):
        if i % 3:
            row |= {"completion": "", "completion_ids": [], "finish": "length"}
            row["texts"] = [text_key(prompt_of(row), row["prompt_ids"], "", [])]

    code, [row], _ = evaluate("--completions", changed(sampled, "emptied.jsonl", emptied), "--tokens-per-batch", "1")
    _, [kept], _ = evaluate("--completions", changed(sampled, "full.jsonl", lambda i, row: None))
    assert code == 0 and row["n"] == kept["n"] and 0 < row["kl_exact"] < kept["kl_exact"]
    assert row["length"] < kept["length"]


def test_samples_of_make_prefs_have_the_temperature_of_their_manifest(sampled, evaluate):
    code, [row], _ = evaluate("--completions", "samples.jsonl", model="sft", ref="lm")
    assert code == 0 and row["temperature"] == 1.0 and row["kl"] > 0


def test_with_prompts_models_and_files_are_evaluated_apart(sampled, evaluate):
    more = ["--prompts", "test.jsonl", "--limit", "4", "--max-new-tokens", "4"]
    code, rows, _ = evaluate("--completions", "warm.jsonl", "--model", "sft", *more)
    assert code == 0 and [row["model"] for row in rows] == ["dpo", "sft", "warm.jsonl"]
    assert [row["kl"] is None for row in rows] == [False, False, True]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--top-p 0.9", "--top-p or --top-k"),
        ("--top-k 5", "--top-p or --top-k"),
        ("--temperature 0", "greedy"),
        ("--best-of 2 --scorer classifier", "best of several"),
        ("--stop e", "cut at a stop string"),
    ],
)
def test_samples_that_are_not_plain_have_no_kl(options, why, sampled, evaluate):
    name = f"plain.{options.split()[0].strip('-')}.jsonl"
    n = "" if "best-of" in options else "--n 2"
    sampled.run(f"sample --model dpo --prompts test.jsonl --limit 6 --max-new-tokens 12 {n} {options} --out {name}")
    code, [row], said = evaluate("--completions", name)
    assert code == 0 and row["kl"] is None is row["kl_exact_se"] and "no KL: " in said
    assert why in said and math.isfinite(row["reward"]) and row["perplexity_ref"] > 1


def test_rows_that_do_not_hold_are_refused_or_skipped(sampled, evaluate):
    def no_ids(i, row):
        if i == 3:
            del row["completion_ids"]

    def edited(i, row):
        if i == 3:
            row["completion"] += "!"

    def another(i, row):
        if i == 3:
            row["tokenizer"] = "0123456789abcdef"

    def empty(i, row):
        if i == 3:
            row["prompt_ids"] = []

    for change, said in (
        (empty, "'texts'"),
        (no_ids, "'completion_ids': missing"),
        (edited, "'texts'"),
        (another, "another tokenizer"),
    ):
        name = changed(sampled, f"{change.__name__}.jsonl", change)
        code, rows, err = evaluate("--completions", name)
        assert (code, rows) == (2, []) and f"{name}:4: field" in err and said in err and "hint:" in err
        code, [row], err = evaluate("--completions", name, "--skip-bad-rows")
        assert code == 0 and row["n"] == 35 and sum(row["skipped"].values()) == 1 and said in err


def test_samples_of_another_model_are_refused_by_their_manifest(sampled, evaluate):
    code, rows, said = evaluate("--completions", "warm.jsonl", model="sft", ref="lm")
    assert (code, rows) == (2, []) and "samples of dpo, not of sft" in said


def test_samples_of_another_model_without_a_manifest_are_told(sampled, evaluate):
    """Their log-ratios have another mean than the exact KL of the steps."""
    shutil.copy(sampled.folder / "samples.jsonl", sampled.folder / "unknown.jsonl")  # of sft
    changed(sampled, "unknown.jsonl", lambda i, row: row.update(temperature=1.0), "samples.jsonl")
    code, _, said = evaluate("--completions", "unknown.jsonl", ref="sft")
    assert code == 0 and "taken for plain samples of dpo" in said and "more than chance" in said
    name = changed(sampled, "own.jsonl", lambda i, row: None)
    code, _, said = evaluate("--completions", name)
    assert code == 0 and "more than chance" not in said


def test_a_temperature_must_be_one_and_known(sampled, evaluate):
    name = changed(sampled, "several.jsonl", lambda i, row: row.update(temperature=1.0 + (i > 5)))
    code, _, said = evaluate("--completions", name)
    assert code == 2 and "several temperatures (1, 2)" in said
    name = changed(sampled, "unknown-t.jsonl", lambda i, row: row.pop("temperature"))
    code, _, said = evaluate("--completions", name)
    assert code == 2 and "'temperature': missing" in said


def test_what_cannot_be_meant_is_refused(evaluate):
    code, _, said = evaluate("--completions", "warm.jsonl", "--model", "sft")
    assert code == 2 and "several --model need --prompts" in said
    code, _, said = evaluate("--completions", "warm.jsonl", ref=None)
    assert code == 2 and "--ref is required" in said
    code, _, said = evaluate("--completions", "warm.jsonl", "--n", "4")
    assert code == 2 and "--n has no effect without --prompts" in said


def test_its_plan_holds_the_policy_and_samples_nothing(evaluate, capsys, sampled):
    argv = ["evaluate", "--completions", "warm.jsonl", "--model", "dpo", "--ref", "sft", "--scorer", "classifier"]
    assert run([*argv, "--out", "never.jsonl", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["sampled by"] == "dpo" and "completions" not in plan
    assert {"memory: weights", "memory: reference", "memory: scorer"} <= set(plan) and "memory: key cache" not in plan
