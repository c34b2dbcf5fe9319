"""Engines for tests: the local sampler under the conditions of vLLM, and a package that tells what vLLM is asked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpoctl.inference import engine_samples, sampler
from dpoctl.inference.engines import opening
from dpoctl.inference.engines.engine import Engine


@dataclass
class VllmOptions:
    """What VllmEngine reads."""

    engine_arg: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None


@dataclass
class ServerOptions:
    """What ServerEngine reads."""

    base_url: str
    served_model: str | None = None
    concurrency: int = 8
    timeout: float = 0.8
    retries: int = 4
    revision: str | None = None
    trust_remote_code: bool = False


class Ahead(Engine):
    """The local sampler as an engine that has to be closed before a scorer is opened, with a version of its own."""

    before_scorer = True
    version = "1"
    opened: list["Ahead"] = []

    def __init__(self, local: Engine):
        self.local, self.codec, self.context = local, local.codec, local.context
        self.calls, self.closed = 0, False
        self.opened.append(self)

    def settings(self):
        return {"version": f"ahead {self.version}"}

    def cost(self):
        return {"flops_per_token": 1, "device": "cpu"}

    def complete(self, prompts, ks, sampling):
        assert not self.closed
        self.calls += 1
        return self.local.complete(prompts, ks, sampling)

    def close(self):
        self.closed = True


class _Local:
    """Options with the local engine in place of another."""

    engine = "transformers"

    def __init__(self, options):
        self._options = options

    def __getattr__(self, name):
        return getattr(self._options, name)


def use_ahead(set_attribute: Callable[[Any, str, Any], None]) -> type[Ahead]:
    """Make `--engine vllm` an `Ahead` in this process; returns the class."""
    plain = opening.open_engine

    def open_engine(options, templates, model, compute=None, ilql_beta=None):
        if options.engine != "vllm":
            return plain(options, templates, model, compute, ilql_beta)
        return Ahead(plain(_Local(options), templates, model, compute, ilql_beta))

    set_attribute(Ahead, "opened", [])
    for module in (sampler, engine_samples):
        set_attribute(module, "open_engine", open_engine)
    return Ahead


_PACKAGE = """
import json, os, time

TOLD = os.path.join(os.path.dirname(__file__), "told.jsonl")


def tell(name, value):
    with open(TOLD, "a") as f:
        f.write(json.dumps([name, value]) + chr(10))


class SamplingParams:
    def __init__(self, **given):
        self.given = given


class _Token:
    logprob = -0.5


class _Completion:
    def __init__(self, params):
        stop = params["stop_token_ids"][0]
        self.token_ids = [5] * (params["max_tokens"] - 1) + [stop]
        self.finish_reason = "stop"
        self.logprobs = [{5: _Token, stop: _Token}] * len(self.token_ids) if params["logprobs"] == 0 else None


class _Output:
    def __init__(self, params):
        self.outputs = [_Completion(params.given)]


class LLM:
    def __init__(self, **given):
        tell("start", given)
        if os.environ.get("FAKE_VLLM") == "refuse":
            raise ValueError("Model architectures ['Odd'] are not supported for now.")
        if os.environ.get("FAKE_VLLM") == "die":
            os.kill(os.getpid(), 9)

    def generate(self, prompts, params, use_tqdm, lora_request):
        tell("generate", [[p["prompt_token_ids"], s.given] for p, s in zip(prompts, params)])
        meter = use_tqdm(total=len(prompts))
        if os.environ.get("FAKE_VLLM") == "hang":
            tell("pid", os.getpid())
            time.sleep(600)
        meter.update(len(prompts))
        return [_Output(s) for s in params]
"""
_PLATFORMS = """
class current_platform:
    device_type = "cpu"
"""


def fake_vllm(folder: Path) -> Path:
    """A package `vllm` in a folder, which tells in told.jsonl what it was asked."""
    package = folder / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(_PACKAGE)
    (package / "platforms.py").write_text(_PLATFORMS)
    return package / "told.jsonl"
