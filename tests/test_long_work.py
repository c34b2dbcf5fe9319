"""Two gloo ranks of which one works alone for longer than --rank-timeout: the other waits while it lives."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from helpers.chain import ROOT, wait_until
from test_ranks import RUNS, SHORT, start_ranks

SLOW = [sys.executable, str(ROOT / "tests" / "helpers" / "slow_rank.py")]
LIMIT = ["--rank-timeout", "0.1"]  # 6 s: on a busy machine ranks are seconds apart without any work
LONGER = 9.0


def start(world, out: str, *args: str, kind: str, **seconds: float):
    world.env["SLOW"] = json.dumps(seconds)
    for part in seconds:
        (world.folder / f"slow-{part}").unlink(missing_ok=True)
    return start_ranks(world, *RUNS["dpo"], *SHORT, *LIMIT, "--parallel", kind, "--out", out, *args, command=SLOW)


def end(ranks, seconds: float = 120) -> tuple[list[int], list[str]]:
    said = [rank.communicate(timeout=seconds)[1] for rank in ranks]
    return [rank.returncode for rank in ranks], said


SLOW_CASES = pytest.mark.slow  # each waits longer than --rank-timeout


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        pytest.param("ddp", ("load",), marks=SLOW_CASES),
        pytest.param("ddp", ("hash",), marks=SLOW_CASES),
        pytest.param("fsdp", ("load", "probe", "save"), marks=SLOW_CASES),
    ],
)
def test_long_work_of_one_rank_does_not_count_as_its_death(here, kind, parts):
    args = ["--max-steps", "2", "--save-every", "1"]
    codes, said = end(start(here, f"slow-{kind}", *args, kind=kind, **dict.fromkeys(parts, LONGER)))
    assert codes == [0, 0], said
    assert all((here.folder / f"slow-{part}").exists() for part in parts)


@SLOW_CASES
def test_long_verification_of_a_checkpoint_does_not_count_as_death(here):
    args = ["--max-steps", "5000", "--save-every", "2"]
    ranks = start(here, "verified", *args, kind="ddp")
    wait_until(lambda: newest(here, "verified"), *ranks)
    ranks[1].send_signal(signal.SIGKILL)
    assert end(ranks)[0] == [75, -signal.SIGKILL]
    before = newest(here, "verified")
    ranks = start(here, "verified", *args, kind="ddp", verify=LONGER)
    wait_until((here.folder / "slow-verify").exists, *ranks)
    wait_until(lambda: newest(here, "verified") > before, *ranks)
    for rank in ranks:
        rank.kill()
    end(ranks)


def newest(world, run: str) -> str:
    """The name of the last checkpoint; empty where there is none."""
    return max((folder.name for folder in (world.folder / run / "checkpoints").glob("step-*")), default="")


@pytest.mark.slow
def test_a_store_that_is_frozen_before_it_answers_is_lost(tmp_path):
    """Its host accepts the connection, and says nothing."""
    script = """if True:
        from dpoctl.errors import RankLost
        from dpoctl.runtime import rendezvous
        try:
            rendezvous.wait("key", 0.05)
        except RankLost as e:
            print(e.message)
        rendezvous.exit_without_teardown(75)
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        environment = os.environ | place | {"RANK": "1", "WORLD_SIZE": "2"}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 75 and "another rank died, or did not answer" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("part", ["hash", "load"])
def test_a_rank_that_dies_in_long_work_is_lost(here, how, part):
    ranks = start(here, f"died-{part}-{how.name}", kind="fsdp", **{part: 600.0})
    wait_until((here.folder / f"slow-{part}").exists, *ranks)
    time.sleep(1.0)  # until the other rank waits
    ranks[0].send_signal(how)
    said = ranks[1].communicate(timeout=120)[1]
    ranks[0].kill()
    ranks[0].communicate()
    assert ranks[1].returncode == 75, said
    assert "another rank died, or did not answer" in said and "Traceback" not in said
