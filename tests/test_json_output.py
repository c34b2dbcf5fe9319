"""--json: what a table shows, as one JSON object alone on stdout, also of an output that is complete already."""

import json
import subprocess
import sys

import pytest

from dpoctl.cli.app import run
from dpoctl.outputs.manifests import read_manifest

EVALUATE = [
    *("evaluate", "--model", "sft", "--model", "dpo", "--ref", "sft", "--prompts", "test.jsonl", "--limit", "6"),
    *("--scorer", "classifier", "--max-new-tokens", "8", "--out", "j.eval.jsonl"),
]
JUDGE = [
    *("judge", "j.dpo.jsonl", "j.sft.jsonl", "--backend", "scorer", "--scorer", "classifier"),
    *("--criterion", "sentiment", "--out", "j.wins.jsonl"),
]
REPORT = ["report", "sft", "dpo", "j.eval.jsonl", "j.wins.jsonl", "--out", "j.report"]


@pytest.fixture(scope="module")
def done(trained):
    """The world with everything that the commands below read; what each of them printed with --json."""
    for model in ("sft", "dpo"):
        sample = ["sample", "--model", model, "--prompts", "test.jsonl", "--limit", "6", "--max-new-tokens", "8"]
        trained.run(*sample, "--out", f"j.{model}.jsonl")
    printed = {command[0]: trained.run(*command, "--json") for command in (EVALUATE, JUDGE, REPORT)}
    return trained, {name: json.loads(out) for name, (out, _) in printed.items()}


def test_evaluate_prints_its_rows(done):
    world, printed = done
    assert printed["evaluate"] == {"evaluations": world.rows("j.eval.jsonl")}
    assert [row["model"] for row in printed["evaluate"]["evaluations"]] == ["sft", "dpo"]


def test_judge_prints_its_summary(done):
    world, printed = done
    manifest = read_manifest(world.folder / "j.wins.jsonl")
    assert printed["judge"] == manifest["metrics"]
    assert printed["judge"]["summary"]["n"] == 6


def test_report_prints_the_numbers_of_its_tables(done):
    world, printed = done
    report = printed["report"]
    assert report["evaluations"] == world.rows("j.eval.jsonl")
    judged = read_manifest(world.folder / "j.wins.jsonl")["metrics"]["summary"]
    assert [row["win_rate"] for row in report["win_rates"]] == [judged["win_rate"]]
    assert {row["output"]: row["stage"] for row in report["costs"]} == {
        "sft": "sft",
        "dpo": "train-dpo",
        "j.eval": "evaluate",
        "j.wins": "judge",
    }
    assert "dpo_against_rlhf" not in report  # no reward model


@pytest.mark.parametrize("command", [EVALUATE, JUDGE, REPORT], ids=lambda c: c[0])
def test_a_complete_output_prints_the_same(done, command):
    world, printed = done
    out, err = world.run(*command, "--json")
    assert "nothing to do" in err and json.loads(out) == printed[command[0]] and out.count("\n") == 1
    assert world.run(*command)[0] == ""


def test_without_it_there_is_a_table_on_stdout(done):
    out, _ = done[0].run(*JUDGE[:-1], "j.table.jsonl")
    assert "win rate" in out and not out.startswith("{")


def test_merge_prints_what_the_command_would(done):
    world, printed = done
    for i in "12":
        world.run(*JUDGE[:-1], f"j.part-{i}.jsonl", "--shard", f"{i}/2")
    out, _ = world.run("merge", "j.part-1.jsonl", "j.part-2.jsonl", "--out", "j.joined.jsonl", "--json")
    assert json.loads(out) == printed["judge"]


def test_a_plan(done, capsys, monkeypatch):
    world, _ = done
    monkeypatch.chdir(world.folder)
    assert run([*JUDGE[:-1], "new.jsonl", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {"comparisons": 6, "judgements": 12}.items() < plan.items()
    assert plan["memory of a device"].endswith("GB (scoring)")
    assert not (world.folder / "new.jsonl").exists()


def test_a_form_has_no_numbers(capsys):
    argv = ["judge", "a.jsonl", "b.jsonl", "--backend", "human", "--form", "f.html", "--out", "w.jsonl", "--json"]
    assert run(argv) == 2
    assert "--json has no effect with --form" in capsys.readouterr().err


def test_plans_of_a_form_and_of_an_adapter(done, capsys, monkeypatch, tmp_path):
    world, _ = done
    monkeypatch.chdir(world.folder)
    people = ["judge", "j.dpo.jsonl", "j.sft.jsonl", "--backend", "human", "--form", "f.html", "--out", "p.jsonl"]
    assert run([*people, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparisons"] == 6
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
    assert run(["merge", str(tmp_path), "--out", "merged", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"adapter": str(tmp_path), "base": "base"}
    assert not {"f.html", "p.jsonl", "merged"} & {p.name for p in world.folder.iterdir()}


@pytest.mark.slow
def test_under_torchrun_only_rank_0_prints_and_only_the_table_of_all_rows(done):
    world, _ = done
    alone, _ = world.run(*JUDGE[:-1], "j.alone.jsonl")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "dpoctl", *JUDGE[:-1], "j.ranks.jsonl"],
            cwd=world.folder,
            env=world.env | {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in (0, 1)
    ]
    (first, _), (second, said) = (process.communicate(timeout=120) for process in ranks)
    assert [process.returncode for process in ranks] == [0, 0]
    assert first.replace("j.ranks", "j.alone") == alone and "win rate" in first
    assert second == "" and said == ""
