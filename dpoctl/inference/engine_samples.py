"""Completions of models that an engine samples before scorers and references are opened, kept beside the output."""

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch

from .. import log
from ..data.chats import TemplateOptions
from ..data.readers import Rows
from ..models.load import Loaded
from ..models.logprobs import response_logps
from ..outputs.claims import Output
from ..outputs.row_writer import KeptRows
from ..runtime import collectives, sharing, signals
from .completions import PromptSet, completion_rows, prompt_set, sequences_of
from .engines.engine import Engine, fix_settings
from .engines.opening import open_engine
from .generate import batch_slices, sampling_of
from .options import EngineOptions, GenerationOptions
from .policy_evaluation import kl_temperature

_LOGP = "engine_logp"  # of a kept row: the sum of the engine's own log-probs
_COMPARED = 64  # completions whose log-probs are compared


class SampledModels(EngineOptions, GenerationOptions, Protocol):
    """How several models are sampled from the same prompts."""

    @property
    def seed(self) -> int: ...

    @property
    def n(self) -> int: ...

    @property
    def max_prompt_length(self) -> int | None: ...


class EngineSamples:
    """The completion rows of each model; what is kept is not sampled again, and then no engine is started."""

    def __init__(
        self, config: SampledModels, output: Output, templates: TemplateOptions, prompts: Rows, models: Sequence[str]
    ):
        """Sample what is not kept yet, on all ranks together: each has an engine, and rank 0 writes.

        Raises InputError as `open_engine` and `prompt_set` do, and Interrupted on a signal.
        """
        self.config, self.output, self.templates, self.prompts = config, output, templates, prompts
        self.models = list(dict.fromkeys(models))
        self.kept = KeptRows(output) if collectives.rank() == 0 else None
        state, written = collectives.from_rank_0((self.kept.state, self.kept.rows[0]) if self.kept else None)
        # rows of each complete model
        self.counts: list[int] = list(state.get("counts", []))
        self.written: int = written
        for number in range(len(self.counts), len(self.models)):
            self._sample(self.models[number])

    def _sample(self, model: str) -> None:
        """Sample a model, from where an earlier run stopped."""
        config = self.config
        with open_engine(config, self.templates, model) as engine:
            fix_settings(self.output, engine)
            engine.keep_answers(self.output)
            engine.logps = True
            chosen = prompt_set(self.prompts, engine.codec, engine.context, config.max_prompt_length)
            total, done = len(chosen) * config.n, self.written - sum(self.counts)
            world = collectives.world_size()
            with log.progress(f"sample {model}", total, "completions", done) as meter:
                batches = batch_slices(len(chosen), config.n, config.engine_batch_size)
                batches = [batch for batch in batches if batch.start * config.n >= done]
                for start in range(0, len(batches), world):
                    shared = batches[start : start + world]
                    found = sharing.map_shared(shared, partial(self._rows, engine, chosen, meter))
                    last = start + world >= len(batches)
                    self._keep([row for rows in found for row in rows], [*self.counts, total] if last else self.counts)

    def _rows(self, engine: Engine, chosen: PromptSet, meter: log.Progress, mine: Sequence[slice]) -> list[list[dict]]:
        """The rows of this rank's batches."""
        config, found = self.config, []
        sampling = sampling_of(config, config.temperature, config.seed)
        for batch in mine:
            part = chosen.part(range(len(chosen))[batch])
            shown = meter.done
            engine.on_finished = meter.advance
            sampled = engine.complete(part.tokens(), list(range(config.n)), sampling)
            meter.advance(shown + len(part) * config.n - meter.done)
            logps = [completion.logp for completions in sampled for completion in completions]
            rows = completion_rows(part, sampled)
            found.append([row | {_LOGP: logp} for row, logp in zip(rows, logps, strict=True)])
        return found

    def _keep(self, rows: list[dict], counts: list[int]) -> None:
        """Write rows on rank 0. Raises Interrupted on all ranks where a signal has arrived on one."""
        stopping = collectives.any_rank(bool(signals.stop.signal))
        self.written += len(rows)
        self.counts = counts
        if self.kept:
            self.kept.write_batch(rows, state={"counts": counts})
        if stopping:
            raise sharing.stopped(f"{self.written} samples, which are kept")

    def rows_of(self, model: str) -> list[dict]:
        """The completion rows of a model, on every rank, with the engine's log-probs."""
        number = self.models.index(model)
        first, count = sum(self.counts[:number]), self.counts[number]
        return collectives.from_rank_0(list(islice(self.kept.read(first), count)) if self.kept else None)


def compared(rows: list[dict], policy: Loaded, options: Any) -> list[dict]:
    """The rows without the engine's log-probs, once these have been compared with this package's own.

    What is told is the mean over some completions of |difference of their summed log-probs| / tokens.
    """
    plain = kl_temperature(options) is not None
    some = [row for row in rows if row.get(_LOGP) is not None][:_COMPARED] if plain else []
    rows = [{name: value for name, value in row.items() if name != _LOGP} for row in rows]
    if some:
        sequences = sequences_of(some)
        ours = response_logps(
            policy.model, sequences, tokens_per_batch=options.tokens_per_batch, temperature=options.temperature
        )
        theirs = torch.tensor([row[_LOGP] for row in some])
        tokens = torch.tensor([len(ids) - start for ids, start in sequences])
        difference = ((ours - theirs).abs() / tokens).mean().item()
        log.say(
            f"log-probs of the engine differ from those of the KL by {difference:.2g} nats per token "
            f"({len(some)} completions)"
        )
    return rows
