"""vLLM's offline engine, in processes of its own that end when the engine is closed.

A row is one request with one seed, so that it does not depend on how many samples its prompt has. That costs nothing:
vLLM runs `n` samples as `n` requests too, and in both cases they share the prompt's keys and values. Where a text ends
is decided by `completion_of`.
"""

import atexit
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ... import log
from ...config.engines import engine_arguments
from ...data.codec import Codec
from ...errors import InputError, Interrupted
from ...models.hub import resolve, resolve_base
from ...models.load import count_weights
from ...models.tokenizers import has_tokenizer
from ...runtime import signals
from ..generate import Completion, PromptTokens, Sampling, limits_of
from ..options import EngineOptions
from .adapters import AdapterPlan, adapter_plan
from .engine import Engine, Sampled, completion_of, seed_of
from .vllm_process import Log, Place, engine_environment, installed_version, refusal

_SEED = 0  # of what no request's seed decides


class VllmEngine(Engine):
    """A model in vLLM; started by the first call of `complete`, so that an output that has its samples needs none."""

    before_scorer = True

    def __init__(self, options: EngineOptions, model: str, codec: Codec, context: int | None):
        """Raises InputError where vLLM is missing or too old, and for an adapter that it cannot apply."""
        self.options, self.model, self.codec = options, model, codec
        self.version = installed_version()
        self.context = _length(options, model, context)
        self.folder = resolve(model, options.revision, with_code=options.trust_remote_code)
        self.adapter: AdapterPlan | None = adapter_plan(model, self.folder)
        self.place: Place | None = None
        self.log = Log()
        self.llm: Any = None
        self.with_tokenizer = False

    def settings(self) -> dict[str, str]:
        return {"version": f"vllm {self.version}"}

    def cost(self) -> dict[str, Any]:
        cost: dict[str, Any] = {"flops_per_token": 2 * count_weights(self.model, self.options.revision)}
        return cost | ({"device": self.place.name} if self.place else {})

    def complete(self, prompts: list[PromptTokens], ks: list[int], sampling: Sampling) -> list[list[Completion]]:
        limits = limits_of(prompts, self.context, sampling.max_new_tokens)
        asked = [(prompt, k, limit) for prompt, limit in zip(prompts, limits, strict=True) for k in ks]
        if not asked:
            return [[] for _ in prompts]
        self._start(with_tokenizer=bool(sampling.stop))
        found = self._generate(
            [{"prompt_token_ids": prompt.ids} for prompt, _, _ in asked],
            [self._parameters(prompt, k, limit, sampling) for prompt, k, limit in asked],
        )
        completions = iter(
            [
                completion_of(self.codec.tokenizer, prompt, _sampled(output), sampling)
                for (prompt, _, _), output in zip(asked, found, strict=True)
            ]
        )
        return [[next(completions) for _ in ks] for _ in prompts]

    def _parameters(self, prompt: PromptTokens, k: int, limit: int, sampling: Sampling) -> Any:
        """The vllm.SamplingParams of a row. The end tokens are ours, not those that vLLM finds in the model's files."""
        from vllm import SamplingParams

        greedy = sampling.temperature == 0
        random = {} if greedy else {"top_p": sampling.top_p, "top_k": sampling.top_k or -1}
        return SamplingParams(
            temperature=sampling.temperature,
            **random,
            seed=None if greedy else seed_of(sampling.seed, prompt.key, k),
            max_tokens=limit,
            stop_token_ids=sorted(prompt.stops),
            ignore_eos=True,
            stop=list(sampling.stop) or None,
            detokenize=bool(sampling.stop),
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
            logprobs=0 if self.logps else None,
        )

    def _generate(self, prompts: Sequence[dict[str, list[int]]], parameters: Sequence[Any]) -> list[Any]:
        """vLLM's outputs of the requests in order. Raises Interrupted on a signal, InputError where vLLM fails."""
        lora = self.adapter.request() if self.adapter else None
        try:
            return self.llm.generate(prompts, parameters, use_tqdm=self._meter(), lora_request=lora)
        except Interrupted:
            raise
        except Exception as e:
            if signals.stop.signal:  # it reached vLLM's processes too
                signals.at_boundary("the batches before, which are kept")
            raise refusal(self.model, e, self.log, "generating") from e

    def _meter(self) -> Any:
        """What vLLM calls as a tqdm: it counts finished rows for the progress line, and stops the work on a signal."""
        from tqdm import tqdm

        on_finished = self.on_finished

        class Meter(tqdm):
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **kwargs, file=open(os.devnull, "w"))

            def update(self, n: float | None = 1) -> bool | None:
                signals.at_boundary("the batches before, which are kept")
                if on_finished:
                    on_finished(int(n or 0))
                return super().update(n)

        return Meter

    def _start(self, *, with_tokenizer: bool) -> None:
        """Load the model, with its tokenizer where vLLM has to look for stop strings."""
        if self.llm is not None and self.with_tokenizer == with_tokenizer:
            return
        self.close()
        self.with_tokenizer = with_tokenizer
        log.say(f"{self.model}: starting vLLM {self.version}")
        atexit.register(self.close)
        with engine_environment(self.options, self.log) as place:
            self.place = place
            try:
                from vllm import LLM

                self.llm = LLM(**self._arguments(place))
            except Exception as e:
                error = refusal(self.model, e, self.log, "starting")
        if self.llm is None:
            self.close()
            raise error
        log.detail(f"{self.model}: vLLM runs on {place.name} in {place.dtype}; its log is {self.log.path}")

    def _arguments(self, place: Place) -> dict[str, Any]:
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
            "dtype": place.dtype,
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
        if self.llm is not None:
            llm, self.llm = self.llm, None
            with suppress(Exception), self.log.captured():
                llm.llm_engine.engine_core.shutdown()
            del llm
            atexit.unregister(self.close)
        self.log.remove()


def _length(options: EngineOptions, model: str, context: int | None) -> int | None:
    """Tokens of prompt and completion together. Raises InputError for a --max-model-len beyond the model's context."""
    asked = options.max_model_len
    if asked is not None and context is not None and asked > context:
        raise InputError(
            f"--max-model-len {asked}: {model} has a context of {context} tokens", f"--max-model-len {context} at most"
        )
    return asked or context


def _sampled(output: Any) -> Sampled:
    """The one completion of a request."""
    (found,) = output.outputs
    ids = list(found.token_ids)
    logps = [entry[id].logprob for entry, id in zip(found.logprobs or [], ids, strict=False)]
    return Sampled(ids, found.finish_reason == "stop", logps)
