"""A row output that is cut at any byte resumes to the same bytes."""

import json

import pytest

from dpoctl.outputs import claims
from dpoctl.outputs.row_writer import RowWriter

BATCHES = [[{"prompt_id": str(n), "text": "é" * n}, {"prompt_id": f"{n}b", "text": "x"}] for n in range(4)]


pytestmark = pytest.mark.usefixtures("cache")


def write(folder, batches=None):
    """Resume the output; stop after `batches`, as a kill would, or finish it."""
    with claims.claim(claims.Request(str(folder / "rows.jsonl"), "sample", {}, {}, []), overwrite=False) as output:
        writer = RowWriter(output, str(folder / "more.jsonl"))
        for rows in BATCHES[writer.batches_done : batches]:
            writer.write_batch(rows, rows[:1], state={"rows": writer.rows[0] + len(rows)})
        if batches is None:
            assert writer.state == {"rows": 8}
            writer.finish({}, {})


def contents(folder):
    return [(folder / name).read_bytes() for name in ("rows.jsonl", "more.jsonl")]


@pytest.mark.parametrize("damaged", ["rows.jsonl.partial", "more.jsonl.partial", "rows.jsonl.progress"])
def test_an_output_cut_at_any_byte_resumes_to_the_same_bytes(tmp_path, damaged):
    whole = tmp_path / "whole"
    whole.mkdir()
    write(whole)
    (tmp_path / "started").mkdir()
    write(tmp_path / "started", batches=2)
    size = (tmp_path / "started" / damaged).stat().st_size
    assert size > 0
    for cut in range(size + 1):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        for file in (tmp_path / "started").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        with open(folder / damaged, "r+b") as f:
            f.truncate(cut)
        write(folder)
        assert contents(folder) == contents(whole)
        assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == [
            "more.jsonl",
            "more.jsonl.manifest.json",
            "rows.jsonl",
            "rows.jsonl.manifest.json",
        ]


def test_bytes_after_the_last_complete_batch_are_dropped(tmp_path):
    write(tmp_path, batches=1)
    with open(tmp_path / "rows.jsonl.partial", "ab") as f:
        f.write(b'{"half": ')
    write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows == [row for batch in BATCHES for row in batch]


def test_only_damage_is_warned_of(tmp_path, capsys):
    write(tmp_path, batches=2)
    write(tmp_path, batches=3)
    assert "resuming after 4 rows" in (said := capsys.readouterr().err) and "damaged" not in said
    with open(tmp_path / "rows.jsonl.partial", "r+b") as f:
        f.truncate((tmp_path / "rows.jsonl.partial").stat().st_size - 1)
    write(tmp_path)
    assert "rows after batch 2 were damaged" in capsys.readouterr().err


def test_what_still_refers_to_a_writer_does_not_hold_its_files(tmp_path):
    """As the traceback of the error that ended a command does, in a process that lives on."""
    kept = []
    for _ in range(2):
        with (
            pytest.raises(ZeroDivisionError),
            claims.claim(claims.Request(str(tmp_path / "rows.jsonl"), "sample", {}, {}, []), overwrite=False) as output,
        ):
            kept.append(RowWriter(output, str(tmp_path / "more.jsonl")))
            kept[-1].write_batch(BATCHES[0], [], state={})
            raise ZeroDivisionError
    write(tmp_path)
    assert len(kept) == 2 and kept[1].batches_done == 2
