"""Commands on several gloo ranks, each a process of this machine."""

import json
import socket
import subprocess
import sys

from .chain import ROOT


def torchrun(world, *commands: list[str], ranks: int = 2) -> str:
    """Run command lines one after the other on the ranks of one torchrun; returns the output of all."""
    worker = ROOT / "tests" / "helpers" / "ranks_worker.py"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*start, str(worker), json.dumps(commands)],
        cwd=world.folder,
        env=world.env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(world, *args: str, command: list[str], ranks: int = 2, **env: str) -> list[subprocess.Popen]:
    """The ranks without torchrun, which would hide their exit codes; `env` is added to their environment."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        processes.append(
            subprocess.Popen(
                [*command, *args],
                cwd=world.folder,
                env=world.env | variables | env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes
