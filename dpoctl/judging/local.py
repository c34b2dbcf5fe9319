"""A judge in this process: a model that vLLM or transformers runs, asked by its own chat template."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .. import log
from ..config.judging import Judge
from ..data.chats import Prompt, Refusal
from ..errors import InputError
from ..inference.engines.engine import Engine, fix_settings
from ..inference.engines.opening import open_engine
from ..inference.engines.vllm_process import installed_version
from ..inference.generate import Completion, PromptTokens, Sampling
from ..inference.options import template_options
from ..models.pretrained import silence_transformers
from ..outputs.claims import Output
from ..runtime import signals
from .answer_cache import AnswerCache, digest_of
from .chat_judge import ChatJudge
from .comparisons import Comparison
from .probabilities import Token, tokens_of
from .replies import CUT, NO_ANSWER, TOO_LONG_FOR_JUDGE, Answer, Reply

_COUNTS = ("asked", "from_cache", "prompt_tokens", "completion_tokens")
_OPENED_THOUGHT = re.compile(r"<(?:think|thought|thinking|reasoning)>\s*$")
_TAIL = 16  # tokens of a prompt's end
_ALTERNATIVES = 20  # of each token: the most that vLLM gives


@dataclass(frozen=True)
class _EngineOptions:
    """What an engine reads, from the options of judge. A judge in this process asks no server."""

    engine: str
    engine_batch_size: int
    tensor_parallel_size: int
    gpu_memory_utilization: float
    max_model_len: int | None
    engine_arg: tuple[str, ...]
    revision: str | None
    trust_remote_code: bool
    device: str
    dtype: str
    base_url: None = None
    served_model: None = None
    concurrency: int = 1
    timeout: float = 0.0
    retries: int = 0


def _options_of(config: Judge) -> _EngineOptions:
    return _EngineOptions(
        config.backend,
        config.engine_batch_size,
        config.tensor_parallel_size,
        config.gpu_memory_utilization,
        config.max_model_len,
        config.engine_arg,
        config.revision,
        config.trust_remote_code,
        config.device,
        config.dtype,
    )


def _of_judge(text: str) -> str:
    """What an engine says, with the flags of this command."""
    return text.replace("--engine ", "--backend ").replace("--temperature ", "--judge-temperature ")


@dataclass(frozen=True)
class _Asked:
    """A request as the model sees it, and the digest by which its answer is cached."""

    prompt: PromptTokens
    digest: str


class LocalJudge(ChatJudge):
    """Greedy unless there is a temperature. An answer is cached by the model's weights, the prompt's token ids and how
    it was sampled; what is cached is not asked for again, and then vLLM is not started."""

    def __init__(self, config: Judge, state: dict[str, Any], output: Output):
        """Raises InputError for a model that cannot be loaded, or that has no chat template, and where vLLM is missing.

        `state` holds the counts of an earlier call of the command.
        """
        super().__init__(config)
        self.options, self.model = config, str(config.judge_model)
        self.cache = AnswerCache(config)
        self.counts: dict[str, int] = {name: state.get(name, 0) for name in _COUNTS}
        silence_transformers()
        if config.backend == "vllm":
            installed_version("--backend vllm")
        self.engine: Engine = open_engine(_options_of(config), template_options(config, output), self.model)
        fix_settings(output, self.engine)
        weights = next(each["sha256"] for each in output.described if each["name"] == "model")
        self._identity = {"engine": config.backend, "weights": weights, "dtype": config.dtype} | self.engine.settings()
        if config.judge_verdict == "logprobs":
            self.engine.alternatives = _ALTERNATIVES
            self._identity |= {"alternatives": _ALTERNATIVES}
        self.sampling = Sampling(
            temperature=config.judge_temperature or 0.0, max_new_tokens=config.judge_max_tokens, seed=config.seed
        )
        self._digests: dict[str, str] = {}  # of requests that were asked
        self._fresh: set[str] = set()  # answered in this call of the command, and not counted yet
        self._too_long: dict[str, int] = {}  # digests of requests beyond the context, and their tokens

    def ahead(self, comparisons: Sequence[Comparison]) -> None:
        """Answer all comparisons in large batches, then free what the engine holds.

        Raises InputError where the engine fails, Interrupted on a signal; the batches before are cached.
        """
        requests = list(dict.fromkeys(self.requests(comparisons)))
        try:
            with log.progress("judge", len(requests), "answers") as meter:
                for part in self._parts(requests):
                    shown = meter.done
                    self.engine.on_finished = meter.advance
                    self._answer(part)
                    meter.advance(shown + len(part) - meter.done)
                    signals.at_boundary(f"{meter.done} answers, which are cached")
        finally:
            self.engine.close()

    def replies(self, requests: list[str]) -> list[Reply | None]:
        """Raises as `ahead` does."""
        for part in self._parts([request for request in requests if request not in self._digests]):
            self._answer(part)
        return [self._reply(request) for request in requests]

    def _parts(self, requests: list[str]) -> Iterator[list[str]]:
        config = self.options
        size = config.generation_batch_size if config.backend == "transformers" else config.engine_batch_size
        yield from (requests[i : i + size] for i in range(0, len(requests), size))

    def _answer(self, requests: list[str]) -> None:
        """Cache the answers to requests, those that are not."""
        asked = self._encoded(requests)
        self._digests |= {request: each.digest for request, each in zip(requests, asked, strict=True)}
        context = self.engine.context
        self._too_long |= {e.digest: len(e.prompt.ids) for e in asked if context and len(e.prompt.ids) >= context}
        left = [e for e in asked if e.digest not in self._too_long and self.cache.read(e.digest) is None]
        if not left:
            return
        try:
            found = self.engine.complete([each.prompt for each in left], [0], self.sampling)
        except InputError as e:
            raise InputError(_of_judge(e.message), _of_judge(e.hint)) from None
        for each, (completion,) in zip(left, found, strict=True):
            self.cache.write(each.digest, self._answer_of(each.prompt, completion))
            self._fresh.add(each.digest)

    def _encoded(self, requests: list[str]) -> list[_Asked]:
        """Raises InputError where the model has no chat template, or its template refuses a request."""
        codec = self.engine.codec
        prompts = [Prompt([{"role": "user", "content": request}]) for request in requests]
        try:
            encoded = codec.encode_prompts(prompts)
        except Refusal as e:
            hint = "give a model with a chat template as --model, or --chat-template FILE"
            raise InputError(f"{self.model}: cannot be asked as a judge: {e.message}", hint) from None
        found = []
        for prompt, ids in zip(prompts, encoded, strict=True):
            stops, lead = codec.stops_of(prompt), codec.lead_of(prompt)
            sampled = self.sampling
            how = {"temperature": sampled.temperature, "max_tokens": sampled.max_new_tokens, "stops": sorted(stops)}
            how |= {"seed": sampled.seed} if sampled.temperature else {}
            digest = digest_of(self._identity | how | {"prompt": ids, "context": self.engine.context})
            found.append(_Asked(PromptTokens(digest, ids, stops, lead), digest))
        return found

    def _answer_of(self, prompt: PromptTokens, completion: Completion) -> Answer:
        text = completion.text
        opened = _OPENED_THOUGHT.search(self.engine.codec.tokenizer.decode(prompt.ids[-_TAIL:]))
        if opened:  # the template has begun the thought
            text = opened[0] + text
        reason = CUT if completion.finish == "length" else "" if completion.text.strip() else NO_ANSWER
        text = text.encode("utf-8", "replace").decode()
        return Answer(text, len(prompt.ids), len(completion.ids), reason, self._tokens(prompt, completion))

    def _tokens(self, prompt: PromptTokens, completion: Completion) -> list[Token] | None:
        """The tokens with their log-probabilities, as a server sends them; None where they were not asked for."""
        if completion.alternatives is None:
            return None
        texts = self.engine.codec.tokenizer.decode
        content = []
        for id, listed in zip(completion.ids, completion.alternatives, strict=True):
            if id in prompt.stops:
                break
            top = [{"token": texts([other]), "logprob": logp} for other, logp in listed.items()]
            content.append({"token": texts([id]), "logprob": listed[id], "top_logprobs": top})
        return tokens_of({"content": content})

    def _reply(self, request: str) -> Reply | None:
        digest = self._digests[request]
        if tokens := self._too_long.get(digest):
            return Answer(f"{tokens} tokens, for a context of {self.engine.context}", 0, 0, TOO_LONG_FOR_JUDGE)
        answer = self.cache.read(digest)
        if answer is None:
            self.last_failure = f"{self.cache.folder} has lost an answer"
            return None
        self.counts["asked" if digest in self._fresh else "from_cache"] += 1
        self._fresh.discard(digest)
        self.counts["prompt_tokens"] += answer.prompt_tokens
        self.counts["completion_tokens"] += answer.completion_tokens
        return answer

    def state(self) -> dict[str, Any]:
        return dict(self.counts)

    def metrics(self) -> dict[str, str]:
        return {"cached": str(self.counts["from_cache"])}

    def cost(self) -> dict[str, Any]:
        """Answers by source, tokens, FLOPs and the device."""
        found = self.engine.cost()
        flops = found.pop("flops_per_token") * (self.counts["prompt_tokens"] + self.counts["completion_tokens"])
        return dict(self.counts) | {"flops": flops} | found
