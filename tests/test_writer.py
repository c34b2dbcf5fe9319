"""A row output cut at any byte continues to the same bytes."""

import json

import pytest

from dpoctl.outputs import claims
from dpoctl.outputs.row_writer import RowWriter

WAVES = [[{"prompt_id": str(w), "text": "é" * w}, {"prompt_id": f"{w}b", "text": "x"}] for w in range(4)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def work(folder, **more):
    return claims.claim(str(folder / "rows.jsonl"), "sample", {}, {}, [], overwrite=False, **more)


def write(folder, batches=None):
    """Go on from where the output stands; stop before `waves` are done, as a kill would, or finish."""
    with work(folder) as w:
        writer = RowWriter(w, str(folder / "more.jsonl"))
        for rows in WAVES[writer.batches_done : batches]:
            writer.write_batch(rows, rows[:1], state={"rows": writer.rows[0] + len(rows)})
        if batches is None:
            assert writer.state == {"rows": 8}
            writer.finish({}, {})


def contents(folder):
    return [(folder / name).read_bytes() for name in ("rows.jsonl", "more.jsonl")]


@pytest.mark.parametrize("victim", ["rows.jsonl.partial", "more.jsonl.partial", "rows.jsonl.progress"])
def test_cut_at_every_byte_it_continues_to_the_same_bytes(tmp_path, victim):
    whole = tmp_path / "whole"
    whole.mkdir()
    write(whole)
    (tmp_path / "begun").mkdir()
    write(tmp_path / "begun", batches=2)
    size = (tmp_path / "begun" / victim).stat().st_size
    for cut in range(size + 1):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        for file in (tmp_path / "begun").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        with open(folder / victim, "r+b") as f:
            f.truncate(cut)
        write(folder)
        assert contents(folder) == contents(whole)
        assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == [
            "more.jsonl",
            "more.jsonl.manifest.json",
            "rows.jsonl",
            "rows.jsonl.manifest.json",
        ]


def test_bytes_beyond_the_last_whole_wave_are_dropped(tmp_path):
    write(tmp_path, batches=1)
    with open(tmp_path / "rows.jsonl.partial", "ab") as f:
        f.write(b'{"half": ')
    write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows == [row for wave in WAVES for row in wave]
