"""The process of the fake device: it imports everything once, and forks a child for each command line that it is given.

A request is a line of JSON on stdin: `argv` of dpoctl; `report`, the file that the child writes; `log`, the file of its
output; `cwd` and `env`; `backing` of the tensors; `faults`, names in `faults.py`; `updates`, after which it is stopped.
"""

import json
import os
import sys
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from fake_gpu import device


class Stopped(BaseException):
    """The command has made the updates that were asked for."""


def serve() -> None:
    """Answer each request with the exit code of its child."""
    import transformers.models.gemma3.modeling_gemma3
    import transformers.models.gpt_neox.modeling_gpt_neox
    import transformers.models.llama.modeling_llama  # noqa: F401

    from helpers import faults_warm  # noqa: F401  (imports what commands import late)

    with suppress(ImportError):
        import peft  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(request: dict[str, Any]) -> None:
    """Run a command line on the device, write the report, and end the process."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from dpoctl.cli.app import run
    from dpoctl.inference import captured
    from fake_gpu import faults, hollow
    from fake_gpu.tensors import FakeGPU

    os.chdir(request["cwd"])
    with open(request["log"], "w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    card = FakeGPU(request["backing"])
    captured.capture = lambda step: (step(), step)  # no graphs here; a wait inside of a step is counted at each
    if request["backing"] == "meta":
        hollow.install()
    for name in request["faults"]:
        faults.FAULTS[name]()
    updates: list[dict[str, int]] = []
    before: Counter = Counter()

    def after_update(*_: Any) -> None:
        new = card.waits - before
        before.update(new)
        updates.append(_by_name(new))
        if len(updates) == request["updates"]:
            raise Stopped

    register_optimizer_step_post_hook(after_update)
    error, code = "", None
    card.switch_on()
    try:
        code = run(request["argv"])
    except Stopped:
        code = 0
    except Exception as e:
        error = _told(e)
    report = {"code": code, "error": error, "updates": updates, "peak": card.memory.peak}
    report["waits"] = _by_name(card.waits)
    with open(request["report"], "w") as file:
        json.dump(report, file)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _told(error: Exception) -> str:
    """An error with the lines of dpoctl that led to it, and the last one."""
    frames = traceback.extract_tb(error.__traceback__)
    shown = [f for f in frames if "/dpoctl/" in f.filename] + frames[-1:]
    lines = [f"  {'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} {f.line}" for f in shown]
    return "\n".join([*lines, f"{type(error).__name__}: {str(error)[:500]}"])


def _by_name(waits: Counter) -> dict[str, int]:
    return {" ".join(key): n for key, n in waits.items()}


if __name__ == "__main__":
    device.install()
    from fake_gpu import attention

    attention.install()
    serve()
