"""vLLM's offline engine, in processes of its own that end when the engine is closed.

A row is one request with one seed, so that it does not depend on how many samples its prompt has. That costs nothing:
vLLM runs `n` samples as `n` requests too, and in both cases they share the prompt's keys and values. Where a text ends
is decided by `completion_of`.
"""

from typing import Any

from ... import log
from ...config.engines import engine_arguments
from ...data.codec import Codec
from ...errors import InputError
from ...models.hub import resolve, resolve_base
from ...models.load import count_weights
from ...models.tokenizers import has_tokenizer
from ..generate import Sampling
from ..options import EngineOptions
from .adapters import AdapterPlan, adapter_plan
from .engine import OutsideEngine, Row, Sampled
from .vllm_process import VllmProcess, environment, installed_version

_SEED = 0  # of what no request's seed decides
_DONE = "the batches before, which are kept"


class VllmEngine(OutsideEngine):
    """A model in vLLM; started by the first call of `complete`, so that an output that has its samples needs none."""

    before_scorer = True
    named = "vLLM"

    def __init__(self, options: EngineOptions, model: str, codec: Codec, context: int | None):
        """Raises InputError where vLLM is missing or too old, and for an adapter that it cannot apply."""
        self.options, self.model, self.codec = options, model, codec
        self.version = installed_version()
        self.context = _length(options, model, context)
        self.folder = resolve(model, options.revision, with_code=options.trust_remote_code)
        self.adapter: AdapterPlan | None = adapter_plan(model, self.folder)
        self.process: VllmProcess | None = None
        self.facts: dict[str, str] = {}
        self.with_tokenizer = False

    def settings(self) -> dict[str, str]:
        return {"version": f"vllm {self.version}"}

    def cost(self) -> dict[str, Any]:
        cost: dict[str, Any] = {"flops_per_token": 2 * count_weights(self.model, self.options.revision)}
        return cost | ({"device": self.facts["device"]} if self.facts else {})

    def sample(self, rows: list[Row], sampling: Sampling) -> list[Sampled]:
        asked = [(row.prompt.ids, self._parameters(row, sampling)) for row in rows]
        found = self._generate(self._started(with_tokenizer=bool(sampling.stop)), asked)
        return [Sampled(*output) for output in found]

    def _parameters(self, row: Row, sampling: Sampling) -> dict[str, Any]:
        """Of the vllm.SamplingParams of a row. The end tokens are the codec's, not those that vLLM would look for."""
        greedy = sampling.temperature == 0
        random = {} if greedy else {"top_p": sampling.top_p, "top_k": sampling.top_k or -1}
        return {
            **{"temperature": sampling.temperature, "max_tokens": row.limit},
            **random,
            "seed": None if greedy else row.seed,
            **{"stop_token_ids": sorted(row.prompt.stops), "ignore_eos": True},
            **{"stop": list(sampling.stop) or None, "detokenize": bool(sampling.stop)},
            **{"skip_special_tokens": False, "spaces_between_special_tokens": False},
            "logprobs": self.alternatives or (0 if self.logps else None),
        }

    def _generate(self, process: VllmProcess, rows: list) -> list[tuple]:
        """What a Sampled holds of each row. Raises Interrupted on a signal, InputError where vLLM fails."""
        lora = self.adapter.request() if self.adapter else None
        for kind, found in process.ask("generate", (rows, lora), _DONE):
            if kind == "sampled":
                return found
            if self.on_finished:
                self.on_finished(found)
        raise AssertionError("the last message of vLLM's process holds the samples")

    def _started(self, *, with_tokenizer: bool) -> VllmProcess:
        """vLLM with the model, and with its tokenizer where vLLM has to look for stop strings."""
        if self.process is not None and self.with_tokenizer == with_tokenizer:
            return self.process
        self.close()
        self.with_tokenizer = with_tokenizer
        log.say(f"{self.model}: starting vLLM {self.version}")
        process = self.process = VllmProcess(self.model, environment(self.options))
        log.detail(f"{self.model}: vLLM's log is {process.log}")
        for _, facts in process.ask("start", self._arguments(), _DONE):
            self.facts = facts
        log.detail(f"{self.model}: vLLM computes on {self.facts['device']} in {self.facts['dtype']}")
        return process

    def _arguments(self) -> dict[str, Any]:
        """What vllm.LLM is given. Options of --engine-arg come last, and may replace what is only a default here."""
        options, folder, holder = self.options, self.folder, self.folder
        found: dict[str, Any] = {"use_tqdm_on_load": False}
        if self.adapter:
            base = self.adapter.base
            folder = resolve_base(self.model, base.path, base.revision, with_code=options.trust_remote_code)
            holder = self.folder if has_tokenizer(self.folder) else folder
            found |= {"enable_lora": True, "max_lora_rank": self.adapter.rank, "max_loras": 1}
        found |= {
            "model": folder,
            "tokenizer": holder,
            "trust_remote_code": options.trust_remote_code,
            **{"device": options.device, "dtype": options.dtype},
            "tensor_parallel_size": options.tensor_parallel_size,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "seed": _SEED,
            "generation_config": "vllm",  # no sampling parameters of the model's own
            "skip_tokenizer_init": not self.with_tokenizer,
            "logprobs_mode": "processed_logprobs",  # those of the distribution that is sampled
        }
        if self.context is not None:
            found["max_model_len"] = self.context
        return found | engine_arguments(options.engine_arg)

    def close(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None


def _length(options: EngineOptions, model: str, context: int | None) -> int | None:
    """Tokens of prompt and completion together. Raises InputError for a --max-model-len beyond the model's context."""
    asked = options.max_model_len
    if asked is not None and context is not None and asked > context:
        raise InputError(
            f"--max-model-len {asked}: {model} has a context of {context} tokens", f"--max-model-len {context} at most"
        )
    return asked or context
