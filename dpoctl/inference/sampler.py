"""What sample and make-prefs share: prompts in, batches of completion rows out, seconds and tokens counted."""

import time
from dataclasses import replace
from typing import Any

from .. import log
from ..data.readers import Rows, load_rows
from ..errors import InputError
from ..models import quantized
from ..models.load import context_length, load_policy
from ..models.place import Place
from ..models.pretrained import silence_transformers
from ..outputs.claims import Output
from ..runtime.devices import open_compute
from .completions import completion_rows, prompt_set
from .generate import batch_slices, generate, sampling_of
from .options import SamplerOptions, template_options


class Sampler:
    """A model with its prompts, ready to complete them batch by batch; the row indices alone define the batches."""

    def __init__(
        self,
        options: SamplerOptions,
        n: int,
        *,
        output: Output,
        few_shot: str | None = None,
        stop: tuple[str, ...] = (),
    ):
        """`n` completions of every prompt; `few_shot` is a file of examples that precede each prompt.

        Raises InputError for whatever is wrong with device, prompts or model.
        """
        self.options, self.n, self.stop, self.few_shot = options, n, stop, few_shot
        self.templates = template_options(options, output)
        silence_transformers()
        self.compute = open_compute(options.device, options.dtype)
        self.prompts = load_rows(
            options.prompts, "prompts", skip_bad=options.skip_bad_rows, columns=options.columns, limit=options.limit
        )
        self.policy = load_policy(
            options.model,
            Place(self.compute.device, self.compute.dtype),
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            templates=self.templates,
        )
        asked = with_examples(options, self.prompts, few_shot) if few_shot else self.prompts  # rows keep the original
        context = context_length(self.policy.model)
        self.prompt_set = prompt_set(asked, self.policy.codec, context, options.max_prompt_length)
        if few_shot:
            original = {row["prompt_id"]: row for row in self.prompts.rows}
            self.prompt_set = replace(
                self.prompt_set, rows=[original[row["prompt_id"]] for row in self.prompt_set.rows]
            )
        self.batches = batch_slices(len(self.prompt_set), n, options.generation_batch_size)
        self.seconds = 0.0
        self.tokens = 0

    def rows(self, batch: slice, meter: log.Progress, temperature: float) -> list[dict]:
        """The completion rows of a batch of prompts at a temperature."""
        prompts = self.prompt_set.part(range(len(self.prompt_set))[batch])
        sampling = sampling_of(self.options, temperature, self.options.seed, self.stop)
        start = time.monotonic()
        with self.compute.autocast():
            sampled = generate(
                self.policy.model, self.policy.tokenizer, prompts.tokens(), list(range(self.n)), sampling
            )
        self.seconds += time.monotonic() - start
        self.tokens += sum(len(c.ids) for completions in sampled for c in completions)
        meter.advance(len(prompts) * self.n, **{"tok/s": f"{self.tokens / max(self.seconds, 1e-9):.0f}"})
        return completion_rows(prompts, sampled, with_ids=self.few_shot is None)

    def cost(self) -> dict[str, Any]:
        """The `cost` of the manifest: generated tokens, FLOPs, peak memory and device."""
        weights = quantized.count(self.policy.model)
        return {
            "tokens": self.tokens,
            "flops": 2 * weights * self.tokens,
            "peak_memory_bytes": self.compute.peak_memory_bytes(),
            "device": self.compute.name,
        }


def with_examples(options: SamplerOptions, prompts: Rows, few_shot: str) -> Rows:
    """The prompts that the model sees, with the examples of a file before each. Raises InputError for messages."""
    examples = load_rows(few_shot, "completions", skip_bad=options.skip_bad_rows, columns=options.columns).rows
    for row in [*examples, *prompts.rows]:
        if not isinstance(row["prompt"], str):
            raise InputError(f"{few_shot}: examples can precede text prompts only, not messages")
    shown = "".join(f"{e['prompt']}{e['completion'].rstrip()}\n\n" for e in examples)
    asked = [{"prompt_id": row["prompt_id"], "prompt": shown + row["prompt"]} for row in prompts.rows]
    return replace(prompts, rows=asked)
