"""Options of the engine that generates completions: sample, make-prefs and evaluate."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .conditions import one_of
from .schema import option
from .shared import ENGINE, address_problem

LOCAL, VLLM, SERVER = (one_of("engine", name) for name in ("transformers", "vllm", "server"))
OUTSIDE = one_of("engine", "vllm", "server")


@dataclass(frozen=True, kw_only=True)
class Engines:
    """A command that generates with an engine of the user's choice."""

    engine: str = option(
        "transformers",
        "What generates: this process, vLLM in it (pip install 'dpoctl[vllm]'), or a server that holds the model; "
        "see dpoctl docs generation.",
        ENGINE,
        choices=("transformers", "vllm", "server"),
    )
    engine_batch_size: int = option(
        4096,
        "Completions generated between two writes: what a kill loses at most.",
        ENGINE,
        at_least=1,
        when=OUTSIDE,
    )
    tensor_parallel_size: int = option(1, "GPUs that share one copy of the model.", ENGINE, at_least=1, when=VLLM)
    gpu_memory_utilization: float = option(
        0.9, "Share of a GPU's memory that vLLM takes.", ENGINE, above=0, at_most=1, identity=False, when=VLLM
    )
    max_model_len: int | None = option(
        None,
        "Most tokens of prompt and completion together (default: the model's context).",
        ENGINE,
        at_least=2,
        when=VLLM,
    )
    engine_arg: tuple[str, ...] = option(
        (),
        "Another argument of vllm.LLM, such as quantization=fp8 or kv_cache_dtype=fp8; may be given several times.",
        ENGINE,
        metavar="KEY=VALUE",
        when=VLLM,
    )
    base_url: str | None = option(
        None, "The server, such as http://localhost:8000/v1.", ENGINE, identity=False, metavar="URL", when=SERVER
    )
    served_model: str | None = option(
        None, "Name of the model on the server (default: the one that it serves).", ENGINE, metavar="NAME", when=SERVER
    )
    concurrency: int = option(64, "Requests in flight.", ENGINE, at_least=1, identity=False, when=SERVER)
    timeout: float = option(600.0, "Seconds to wait for an answer.", ENGINE, above=0, identity=False, when=SERVER)
    retries: int = option(
        6,
        "Retries after transient failures (exponential backoff, or what the server asks for).",
        ENGINE,
        at_least=0,
        identity=False,
        when=SERVER,
    )

    def check_base_url(self) -> Iterator[str]:
        if self.engine == "server" and self.base_url is None:
            yield "--base-url is required with --engine server (the server, such as http://localhost:8000/v1)"
        yield from address_problem("--base-url", self.base_url)

    def check_engine_arg(self) -> Iterator[str]:
        yield from engine_argument_mistakes(self.engine_arg)


_OPTIONS = {  # arguments of vllm.LLM that have an option
    **{"model": "--model", "tokenizer": "--model", "revision": "--revision", "tokenizer_revision": "--revision"},
    **{"trust_remote_code": "--trust-remote-code", "dtype": "--dtype", "device": "--device"},
    **{name: f"--{name.replace('_', '-')}" for name in ("tensor_parallel_size", "max_model_len")},
    **{"gpu_memory_utilization": "--gpu-memory-utilization", "seed": "--seed"},
}
_OURS = ("generation_config", "skip_tokenizer_init", "logprobs_mode", "enable_lora", "max_lora_rank", "runner")


def engine_argument_mistakes(given: tuple[str, ...]) -> Iterator[str]:
    """What is wrong with the values of `--engine-arg`."""
    try:
        engine_arguments(given)
    except InputError as e:
        yield f"{e.message}\nhint: {e.hint}"


def engine_arguments(given: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of `--engine-arg KEY=VALUE` by name; a value is a YAML (or JSON) value.

    Raises InputError for one that is malformed, given twice, or that an option or this package sets.
    """
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not (equals and key.isidentifier()):
            raise InputError(f"--engine-arg {text}: expected KEY=VALUE", "for example --engine-arg enforce_eager=true")
        if key in found:
            raise InputError(f"--engine-arg {key}: given twice", "give it once")
        if key in _OPTIONS:
            raise InputError(f"--engine-arg {key}: has an option of its own", f"use {_OPTIONS[key]}")
        if key in _OURS:
            raise InputError(f"--engine-arg {key}: is set by dpoctl, which relies on its value", "leave it out")
        found[key] = _value(text, value)
    return found


def _value(argument: str, text: str) -> Any:
    """A value as JSON, else as YAML, which does not read 1e-6 as a number."""
    import yaml  # late: --help imports this module

    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--engine-arg {argument}: not a valid value", "write it as in YAML or JSON") from None
