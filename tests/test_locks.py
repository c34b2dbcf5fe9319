"""Locks of outputs: held by a live process, left by a dead node, missing on a file system; and hashing in turn."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time

import pytest

from dpoctl.cli.app import run
from dpoctl.errors import Interrupted, OutputInUse
from dpoctl.outputs import claims, files, locks
from dpoctl.runtime import signals
from helpers.chain import ROOT

pytestmark = pytest.mark.usefixtures("cache")
HOLD = """if True:
    import sys, time
    from dpoctl.outputs import claims
    with claims.claim(claims.Request(sys.argv[1], "sft", {}, {}, []), overwrite=False):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setattr(locks, "_warned", False)
    monkeypatch.setattr(locks, "_EVERY_S", 0.05)


def claim(out):
    return claims.claim(claims.Request(str(out), "sft", {}, {}, []), overwrite=False)


def holder(out, seconds: float) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out), str(seconds)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_once(tmp_path, monkeypatch, capsys, number):
    def no_locks(fd, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for name in ("one", "two"):
        with claim(tmp_path / name) as output:
            assert output.holds_claim
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("its file system has no locks") == 1 and os.strerror(number) in said


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_held_lock_ends_in_75_without_waiting(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", lambda fd, how: (_ for _ in ()).throw(OSError(number, "held")))
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: pytest.fail("it waits"))
    with pytest.raises(OutputInUse, match="another dpoctl process is writing it") as refused, claim(tmp_path / "run"):
        pass
    assert refused.value.exit_code == 75
    assert not (tmp_path / "run" / ".plan.json").exists()


def test_the_command_line_ends_in_75_where_a_live_process_holds_the_output(tmp_path, capsys):
    process = holder(tmp_path / "run", 60)
    (tmp_path / "d.jsonl").write_text('{"text": "a b"}\n')
    code = run(["sft", "--model", "m/m", "--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "run")])
    process.kill()
    process.wait()
    assert code == 75 and "another dpoctl process" in capsys.readouterr().err


def test_a_requeued_job_waits_for_the_lock_of_the_node_that_died(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    process = holder(tmp_path / "run", 600)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: (process.kill(), process.wait()))
    with claim(tmp_path / "run") as output:
        assert output.resuming and process.poll() is not None
    assert "waiting up to 3 minutes" in capsys.readouterr().err


def test_a_requeued_job_waits_in_vain_no_longer_than_its_limit_or_a_signal(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setattr(locks, "_WAIT_S", 0.3)
    process = holder(tmp_path / "run", 600)
    started = time.monotonic()
    with pytest.raises(OutputInUse), claim(tmp_path / "run"):
        pass
    assert time.monotonic() - started >= 0.3
    monkeypatch.setattr(locks, "_WAIT_S", 60.0)
    monkeypatch.setattr(signals.stop, "signal", "SIGUSR1")
    with pytest.raises(Interrupted, match="SIGUSR1"), claim(tmp_path / "run"):
        pass
    process.kill()
    process.wait()


def test_processes_that_want_the_hash_of_a_large_file_compute_it_once(tmp_path, monkeypatch):
    """As the ranks of a node do: here threads, each with a file description, and so a lock, of its own."""
    monkeypatch.setattr(files, "_HASH_IN_TURN_FROM", 1 << 20)
    path, computed = tmp_path / "weights", []
    path.write_bytes(b"a" * (1 << 20))
    hash_file = files._hash

    def slow(path):
        computed.append(path)
        time.sleep(0.3)
        return hash_file(path)

    monkeypatch.setattr(files, "_hash", slow)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(files.sha256_file(path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(computed) == 1 and found == [hash_file(path)] * 3
    assert not list((tmp_path / "cache/dpoctl/sha256").glob("*.lock"))


def test_a_hash_is_computed_where_its_turn_never_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_HASH_IN_TURN_FROM", 1 << 20)
    path = tmp_path / "weights"
    path.write_bytes(b"a" * (1 << 20))
    monkeypatch.setattr(fcntl, "flock", lambda fd, how: (_ for _ in ()).throw(OSError(errno.ENOLCK, "none")))
    assert files.sha256_file(path) == files._hash(path)
