"""The process that vLLM runs in, `python -m dpoctl.inference.engines.vllm_worker FROM TO ALIVE`; see vllm_process.

vLLM is imported here alone: its settings, signal handlers and output stay out of the command's process. The process
leads a group of its own. When the command ends, however it ends, the pipe ALIVE closes, and the group with all
of vLLM's processes is killed: a GPU's memory is free for the rerun. Standard library and vLLM only.

Messages are (name, value). In: ("start", arguments), ("generate", (rows, adapter)); out: ("ready", facts),
("finished", n), ("sampled", rows) and ("failed", text).
"""

import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any


def main(incoming: int, outgoing: int, alive: int) -> None:
    """Serve requests until the command closes the connection or ends."""
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the command decides what a signal means
        signal.signal(number, signal.SIG_IGN)
    asked, answers = Connection(incoming, writable=False), Connection(outgoing, readable=False)
    llm: Any = None
    while True:
        name, value = asked.recv()
        try:
            if name == "start":
                llm, facts = _start(value)
                answers.send(("ready", facts))
            else:
                answers.send(("sampled", _generate(llm, value, answers)))
        except Exception as e:
            print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
            answers.send(("failed", f"{type(e).__name__}: {e}"))


def _end_with(alive: int) -> None:
    """Wait until the command has ended, then kill the group of this process."""
    os.read(alive, 1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _start(arguments: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """(vllm.LLM, its device and dtype); `device` among the arguments is what --device says."""
    from vllm import LLM
    from vllm.platforms import current_platform as platform

    wanted, kind = arguments.pop("device"), platform.device_type
    if wanted != "auto" and wanted.split(":")[0] != kind:
        raise ValueError(f"--device {wanted}: the vLLM that is installed computes on {kind}")
    if arguments["dtype"] == "auto":  # as for models that dpoctl runs itself
        capable = kind != "cpu" and (not platform.is_cuda() or platform.has_device_capability(80))
        arguments["dtype"] = "bfloat16" if capable else "float32"
    name = "cpu" if kind == "cpu" else platform.get_device_name()
    return LLM(**arguments), {"device": name, "dtype": arguments["dtype"]}


def _generate(llm: Any, asked: Any, answers: Connection) -> list[Any]:
    """(ids, stopped, log-probs, alternatives) of each row; see engine.Sampled.

    `asked`: the rows, each the ids of a prompt and the arguments of its vllm.SamplingParams; and name, number and path
    of an adapter, or None.
    """
    from tqdm import tqdm
    from vllm import SamplingParams

    class Meter(tqdm):
        """Tells the command of finished rows."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs, file=sys.stderr, mininterval=3600)

        def update(self, n: float | None = 1) -> bool | None:
            answers.send(("finished", int(n or 0)))
            return super().update(n)

    rows, lora = asked
    request = None
    if lora:
        from vllm.lora.request import LoRARequest

        request = LoRARequest(*lora)
    prompts = [{"prompt_token_ids": ids} for ids, _ in rows]
    parameters = [SamplingParams(**given) for _, given in rows]
    outputs = llm.generate(prompts, parameters, use_tqdm=Meter, lora_request=request)
    return [_sampled(output, given.get("logprobs")) for output, (_, given) in zip(outputs, rows, strict=True)]


def _sampled(output: Any, alternatives: int | None) -> tuple[list[int], bool, list[float], list[dict[int, float]]]:
    (found,) = output.outputs
    ids = list(found.token_ids)
    entries = found.logprobs or []
    logps = [entry[id].logprob for entry, id in zip(entries, ids, strict=False)]
    probable = [{id: each.logprob for id, each in entry.items()} for entry in entries] if alternatives else []
    return ids, found.finish_reason == "stop", logps, probable


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
