"""What sample and make-prefs share: prompts in, batches of completion rows out, seconds and tokens counted."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from types import TracebackType
from typing import Any, NamedTuple

import torch

from .. import log
from ..data.readers import Rows, load_rows
from ..errors import InputError
from ..models.pretrained import silence_transformers
from ..outputs.claims import Output
from ..outputs.row_writer import KeptRows
from ..outputs.shards import ShardRange, shard_range, slices
from ..runtime.devices import Compute, open_compute
from .completions import completion_rows, prompt_set
from .engines.engine import fix_settings
from .engines.opening import open_engine
from .generate import batch_slices, sampling_of
from .options import SamplerOptions, ScoringOptions, template_options
from .scorers import Scorer, load_scorer, scorer_options


class Batch(NamedTuple):
    """Prompts that are completed together, at a temperature."""

    temperature: float
    prompts: slice


class Work(NamedTuple):
    """What a command samples: its shard, and the batches of that."""

    shard: ShardRange
    batches: list[Batch]


def divide(options: SamplerOptions, prompts: int, n: int, temperatures: Sequence[float]) -> Work:
    """The batches of `n` completions of each of the prompts at each temperature that --shard selects.

    In this process rounding depends on what shares a batch, so that shards are cut between batches; those of other
    engines anywhere, and are then as even as prompts allow.
    """
    local = options.engine == "transformers"
    units = batch_slices(prompts, n, options.generation_batch_size) if local else slices(prompts, 1)
    every = [Batch(temperature, unit) for temperature in temperatures for unit in units]
    shard = shard_range(options.shard, [batch.prompts for batch in every])
    selected = every[shard.batches]
    return Work(shard, selected if local else _joined(selected, max(1, options.engine_batch_size // n)))


def _joined(batches: list[Batch], size: int) -> list[Batch]:
    """Batches of at most `size` prompts from batches of one, of consecutive prompts at one temperature."""
    found: list[Batch] = []
    for batch in batches:
        (temperature, prompts), last = batch, found[-1] if found else None
        follows = last and (last.temperature, last.prompts.stop) == (temperature, prompts.start)
        if last and follows and prompts.start - last.prompts.start < size:
            found[-1] = Batch(temperature, slice(last.prompts.start, prompts.stop))
        else:
            found.append(batch)
    return found


class Sampler:
    """An engine with its prompts, ready to complete them batch by batch."""

    def __init__(
        self,
        options: SamplerOptions,
        n: int,
        temperatures: Sequence[float],
        *,
        output: Output,
        few_shot: str | None = None,
        stop: tuple[str, ...] = (),
    ):
        """`n` completions of every prompt; `few_shot` is a file of examples that precede each prompt.

        Raises InputError for whatever is wrong with device, prompts or model.
        """
        self.options, self.n, self.stop, self.few_shot, self.output = options, n, stop, few_shot, output
        self.templates = template_options(options, output)
        silence_transformers()
        if options.engine == "transformers":
            _ = self.compute  # a device that is not there is refused first
        self.prompts = load_rows(
            options.prompts, "prompts", skip_bad=options.skip_bad_rows, columns=options.columns, limit=options.limit
        )
        self.engine = open_engine(options, self.templates, options.model, lambda: self.compute, options.ilql_beta)
        fix_settings(output, self.engine)
        self.engine.keep_answers(output)
        asked = with_examples(options, self.prompts, few_shot) if few_shot else self.prompts  # rows keep the original
        self.prompt_set = prompt_set(asked, self.engine.codec, self.engine.context, options.max_prompt_length)
        if few_shot:
            original = {row["prompt_id"]: row for row in self.prompts.rows}
            self.prompt_set = replace(
                self.prompt_set, rows=[original[row["prompt_id"]] for row in self.prompt_set.rows]
            )
        self.shard, self.batches = divide(options, len(self.prompt_set), n, temperatures)
        self.kept: KeptRows | None = None
        self.seconds = 0.0
        self.tokens = 0

    @cached_property
    def compute(self) -> Compute:
        """The device of models in this process: a scorer, and by default the policy."""
        return open_compute(self.options.device, self.options.dtype)

    def open_scorer(self, spec: str, options: ScoringOptions) -> Scorer:
        """The scorer; an engine that takes the device's memory samples all batches first, and is closed.

        Their rows are kept beside the output until that is complete: a command that is stopped resumes after the last
        batch of them, and without the engine where it was scoring already. A scorer that cannot be used is refused
        before, since another one would start the output anew.
        """
        if self.engine.before_scorer:
            self.sample_ahead(spec, options)
        return load_scorer(spec, scorer_options(options, self.compute, self.templates))

    def sample_ahead(self, scorer: str | None, options: ScoringOptions) -> None:
        """Sample all batches and close the engine; see `open_scorer`.

        Raises InputError, before anything is sampled, for a scorer that cannot be used.
        """
        self.kept = KeptRows(self.output)
        total, done = self.shard.count * self.n, self.kept.rows[0]
        if self.kept.batches_done < len(self.batches):
            if scorer:
                on_cpu = Compute(torch.device("cpu"), torch.bfloat16)  # loaded, and never run
                load_scorer(scorer, scorer_options(options, on_cpu, self.templates))
            with log.progress("sample", total, "completions", done) as meter:
                for batch in self.batches[self.kept.batches_done :]:
                    self.kept.write_batch(self._sample(batch, meter), state={})
        self.engine.close()

    def rows(self, done: int, meter: log.Progress) -> Iterator[list[dict]]:
        """The completion rows of each batch after the first `done`."""
        left = self.batches[done:]
        if self.kept is None:
            yield from (self._sample(batch, meter) for batch in left)
            return
        sizes = [(batch.prompts.stop - batch.prompts.start) * self.n for batch in self.batches]
        rows = self.kept.read(sum(sizes[:done]))
        for size in sizes[done:]:
            yield list(islice(rows, size))
            meter.advance(size)

    def _sample(self, batch: Batch, meter: log.Progress) -> list[dict]:
        prompts = self.prompt_set.part(range(len(self.prompt_set))[batch.prompts])
        sampling = sampling_of(self.options, batch.temperature, self.options.seed, self.stop)
        start, shown = time.monotonic(), meter.done
        self.engine.on_finished = meter.advance
        sampled = self.engine.complete(prompts.tokens(), list(range(self.n)), sampling)
        self.seconds += time.monotonic() - start
        self.tokens += sum(len(c.ids) for completions in sampled for c in completions)
        speed = f"{self.tokens / max(self.seconds, 1e-9):.0f}"
        meter.advance(shown + len(prompts) * self.n - meter.done, **{"tok/s": speed})
        return completion_rows(prompts, sampled, with_ids=self.few_shot is None)

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.close()

    def cost(self) -> dict[str, Any]:
        """The `cost` of the manifest: generated tokens, FLOPs, peak memory and device."""
        found = self.engine.cost()
        flops = found.pop("flops_per_token") * self.tokens
        return {"tokens": self.tokens, "flops": flops} | found


def with_examples(options: SamplerOptions, prompts: Rows, few_shot: str) -> Rows:
    """The prompts that the model sees, with the examples of a file before each. Raises InputError for messages."""
    examples = load_rows(few_shot, "completions", skip_bad=options.skip_bad_rows, columns=options.columns).rows
    for row in [*examples, *prompts.rows]:
        if not isinstance(row["prompt"], str):
            raise InputError(f"{few_shot}: examples can precede text prompts only, not messages")
    shown = "".join(f"{e['prompt']}{e['completion'].rstrip()}\n\n" for e in examples)
    asked = [{"prompt_id": row["prompt_id"], "prompt": shown + row["prompt"]} for row in prompts.rows]
    return replace(prompts, rows=asked)
