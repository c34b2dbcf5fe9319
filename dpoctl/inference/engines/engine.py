"""What generates completions: token ids in, token ids out.

Templates, truncation and seeds before an engine, and texts, stop strings and rows after it, are one code for all of
them. What an engine outside this process gives becomes a completion by `completion_of`, whoever made the ids.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ...data.codec import Codec
from ...errors import InputError
from ...outputs.claims import Output
from ...outputs.manifests import ENGINE_SETTING
from ..generate import Completion, PromptTokens, Sampling, as_completion, ends_at, limits_of

_LOWEST = 0.01  # temperature of vLLM and SGLang, which raise lower ones to it


class Engine(ABC):
    """Completes prompts with one model.

    `codec`: tokenizer and templates of the model that is sampled. `context`: tokens that prompt and completion may have
    together, None without a limit. `before_scorer`: it holds a device's memory, so that it is closed before scorers and
    reference models are opened. `logps`: completions are wanted with their log-probs, where the engine has them.
    `alternatives`: they are wanted with so many of the most probable tokens at each place; a server gives none.
    `on_finished` is called with the number of completions that have just been finished, where it knows of each.
    """

    codec: Codec
    context: int | None
    before_scorer = False
    logps = False
    alternatives = 0
    on_finished: Callable[[int], None] | None = None

    def settings(self) -> dict[str, str]:
        """Version and whatever else may change the tokens and is no option: an output keeps them from its start."""
        return {}

    @abstractmethod
    def cost(self) -> dict[str, Any]:
        """Of the manifest's `cost`: `flops_per_token`, `peak_memory_bytes` of this process, and `device`."""

    @abstractmethod
    def complete(self, prompts: list[PromptTokens], ks: list[int], sampling: Sampling) -> list[list[Completion]]:
        """Completions number `ks` of every prompt: result[i][j] is prompt i's completion ks[j].

        The length is bounded by `sampling.max_new_tokens`, the end token counted, and by the end of the context.
        Raises InputError for an empty prompt, one that leaves no room in the context, and whatever the engine refuses;
        Interrupted where the work stops and may be resumed.
        """

    def keep_answers(self, output: Output) -> None:  # noqa: B027  # an engine in this process has none
        """Keep what the engine is given beside the output until it is written, and use what an earlier call left.

        Raises InputError where that is of another model.
        """

    def close(self) -> None:  # noqa: B027  # an engine that holds nothing has nothing to free
        """Free what the engine holds; it completes nothing afterwards. May be called again."""

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Sampled:
    """What an engine outside this process gives for one completion.

    `ids` with the token at which it stopped; `stopped`: by an end token or a stop string, not by the length. `logps`:
    the engine's own log-prob of each id, at the temperature that was sampled; empty where it gives none.
    `alternatives`: as a Completion's.
    """

    ids: list[int]
    stopped: bool
    logps: Sequence[float] = ()
    alternatives: Sequence[dict[int, float]] = ()


class Row(NamedTuple):
    """One completion that an engine outside this process is asked for, of at most `limit` tokens."""

    prompt: PromptTokens
    limit: int
    seed: int


class OutsideEngine(Engine):
    """An engine outside this process, called `named`: every completion is a request of its own with its own seed."""

    named: str

    @abstractmethod
    def sample(self, rows: list[Row], sampling: Sampling) -> list[Sampled]:
        """What the engine gives for each of one row or more. Raises as `complete` does."""

    def complete(self, prompts: list[PromptTokens], ks: list[int], sampling: Sampling) -> list[list[Completion]]:
        if 0 < sampling.temperature < _LOWEST:
            said = f"--temperature {sampling.temperature:g}: {self.named} would sample at {_LOWEST:g}, its lowest"
            raise InputError(said, "--temperature 0 is greedy")
        limits = limits_of(prompts, self.context, sampling.max_new_tokens)
        rows = [
            Row(prompt, limit, seed_of(sampling.seed, prompt.key, k))
            for prompt, limit in zip(prompts, limits, strict=True)
            for k in ks
        ]
        found = self.sample(rows, sampling) if rows else []
        completions = iter(
            [
                completion_of(self.codec.tokenizer, row.prompt, sampled, sampling)
                for row, sampled in zip(rows, found, strict=True)
            ]
        )
        return [[next(completions) for _ in ks] for _ in prompts]


def completion_of(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptTokens, sampled: Sampled, sampling: Sampling
) -> Completion:
    """The completion of what an engine gave, cut at the token at which the transformers engine would have stopped.

    Engines look for stop strings in texts that they decode themselves: one may stop a token later, or not look at all.
    """
    end = ends_at(tokenizer, prompt, sampled.ids, sampling.stop)
    ids = sampled.ids if end is None else sampled.ids[:end]
    finish = "stop" if end is not None or sampled.stopped else "length"
    completion = as_completion(tokenizer, prompt, ids, finish, sampling.stop)
    if sampled.logps and len(sampled.logps) >= len(completion.ids):
        completion.logp = float(sum(sampled.logps[: len(completion.ids)]))
    if sampled.alternatives:
        completion.alternatives = list(sampled.alternatives[: len(completion.ids)])
    return completion


def fix_settings(output: Output, engine: Engine) -> None:
    """Record the engine's settings with the output, or refuse those that differ from the ones of its start.

    They belong to the identity in the manifest, so that shards with different ones are not merged. Raises InputError.
    """
    for name, value in engine.settings().items():
        before = output.fix(f"{ENGINE_SETTING}{name}", value)
        if before != value:
            raise InputError(
                f"{output.out}: was started with engine {name} {before}, now it is {value}",
                hint=f"generate with {before}, use --overwrite to restart, or another --out to keep both",
            )


def seed_of(seed: int, prompt_key: str, k: int) -> int:
    """The seed of sample `k` of a prompt for an engine that draws its own numbers: 63 bits of SHA-256 over the three.

    It does not depend on how many samples of the prompt there are.
    """
    digest = hashlib.sha256(f"{seed}\0{k}\0{prompt_key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
