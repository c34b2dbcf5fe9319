"""init, docs and env: what a newcomer types before the first run."""

import json
import os
import re
import subprocess

import pytest

from dpoctl import __version__
from dpoctl.cli import docs, env, init
from dpoctl.cli.app import run
from helpers.chain import ROOT

RECIPES = sorted(path.parent.name for path in (ROOT / "recipes").glob("*/recipe.yaml"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_recipes_are_listed_with_a_line_each(capsys):
    assert run(["init"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted([*RECIPES, "slurm"])
    assert all(len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_works_alone(recipe, tmp_path, capsys):
    assert run(["init", recipe, "here"]) == 0
    assert f"make -C {'here'}" in capsys.readouterr().err
    rules = subprocess.run(["make", "-n", "-C", "here", "DPOCTL=dpoctl"], capture_output=True, text=True)
    assert rules.returncode == 0, rules.stderr
    assert re.search(r"^dpoctl \S+ .*--config recipe.yaml", rules.stdout, re.MULTILINE)
    text = "".join(path.read_text() for path in (tmp_path / "here").glob("*.mk"))
    assert ("tiny.py" in text) == (tmp_path / "here" / "tiny.py").exists()


def test_the_folder_has_the_recipes_name_unless_another_is_given(tmp_path):
    assert run(["init", "toy"]) == 0 and run(["init", "slurm", "a/b"]) == 0
    assert {path.name for path in (tmp_path / "toy").iterdir()} == {"Makefile", "recipe.yaml", "chain.mk"}
    assert os.access(tmp_path / "a" / "b" / "chain.sh", os.X_OK)


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    assert run(["init", "toy"]) == 2 and "exists and is not empty" in capsys.readouterr().err
    assert run(["init", "toy", "file"]) == 2 and "is a file; a directory is needed" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["mine"]
    (tmp_path / "toy" / "mine").unlink()
    assert run(["init", "toy"]) == 0  # an empty folder is filled


def test_an_unknown_recipe(capsys):
    assert run(["init", "toyy"]) == 2
    err = capsys.readouterr().err
    assert "did you mean toy?" in err and "own-preferences" in err


def test_runs_are_not_copied(tmp_path, monkeypatch):
    recipes = tmp_path / "recipes"
    (recipes / "one" / "runs").mkdir(parents=True)
    (recipes / "one" / "Makefile").write_text("# One.\ninclude ../a.mk\n")
    (recipes / "a.mk").write_text("x:\n\tpython ../b.py\n")
    (recipes / "b.py").write_text("")
    (recipes / "c.mk").write_text("")
    monkeypatch.setattr(init, "recipes_folder", lambda: recipes)
    assert run(["init", "one", "out"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"Makefile", "a.mk", "b.py"}


@pytest.fixture
def written(tmp_path, monkeypatch):
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "losses.md").write_text("# Losses\n\nText with `code`.\n")
    (folder / "judging.md").write_text("\n# Judging\n")
    monkeypatch.setattr(docs, "_PAGES", folder)


def test_docs_lists_and_prints_pages(written, capsys):
    assert run(["docs"]) == 0
    assert capsys.readouterr().out == "judging  Judging\nlosses   Losses\n"
    assert run(["docs", "losses"]) == 0
    assert capsys.readouterr().out == "# Losses\n\nText with `code`.\n"
    assert run(["docs", "loses"]) == 2
    assert "did you mean losses?" in capsys.readouterr().err


def test_docs_are_rendered_on_a_terminal(written, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run(["docs", "losses"]) == 0
    out = capsys.readouterr().out
    assert "Losses" in out and "# Losses" not in out and "Text with code." in re.sub(r"\x1b\[[\d;]*m", "", out)


def test_every_page_has_a_title():
    assert docs.topics()
    for topic, title in docs.topics().items():
        text = (ROOT / "dpoctl" / "docs" / f"{topic}.md").read_text(encoding="utf-8")
        assert text.startswith("# ") and title


def test_env(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dpoctl"] == __version__ and found["packages"]["torch"].startswith("2.")
    assert found["caches"]["dpoctl"] == {
        "path": str(tmp_path / "cache" / "dpoctl"),
        "writable": True,
        "free_bytes": found["caches"]["dpoctl"]["free_bytes"],
    }
    assert found["caches"]["dpoctl"]["free_bytes"] > 0 and found["variables"]["WORLD_SIZE"] == "4"
    assert found["torch"]["devices"][0]["device"] == "cpu"
    assert run(["env"]) == 0
    text = capsys.readouterr().out
    for part in (__version__, found["packages"]["transformers"], "can be written", "WORLD_SIZE", "GB free"):
        assert part in text


def test_env_without_a_cache_that_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert not env._folder(tmp_path / "file" / "below")["writable"]
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert not env._folder(tmp_path)["writable"]
    lines = env._lines(env.environment() | {"caches": {"hub": env._folder(tmp_path)}})
    assert any("CANNOT BE WRITTEN" in line for line in lines)


def test_env_where_torch_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    found = env.environment()
    assert "error" in found["torch"] and any("torch cannot be imported" in line for line in env._lines(found))
