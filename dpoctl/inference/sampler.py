"""What sample and make-prefs share: prompts in, waves of completion rows out, seconds and tokens counted."""

import time
from dataclasses import dataclass

from .. import log
from ..data.schema import load_rows
from ..errors import InputError
from ..models.load import context_length, count_weights
from ..outputs.shards import share_of
from ..runtime import devices
from ..training import setup
from . import policy_evaluation
from .generate import batch_slices, generate


@dataclass
class Sampler:
    """A model with its prompts, ready to complete them wave by wave (waves are fixed by row index)."""

    config: object
    n: int

    def __post_init__(self) -> None:
        config = self.config
        self.device, self.dtype = setup.open_device(config)
        self.prompts = load_rows(config.prompts, "prompts", skip_bad=config.skip_bad_rows, limit=config.limit)
        self.model, self.tokenizer = setup.open_model(config, config.model, self.device)
        asked = self._after_examples(self.prompts.rows) if getattr(config, "few_shot", None) else self.prompts.rows
        self.ids = policy_evaluation.prompt_ids(
            asked,
            self.tokenizer,
            context_length(self.model),
            self.prompts.path,
            self.prompts.lines,
            getattr(config, "max_prompt_length", None),
        )
        self.batches = batch_slices(len(self.ids), self.n, config.generation_batch_size)
        self.seconds = 0.0
        self.tokens = 0

    def rows(self, batch: slice, meter: log.Progress, temperature: float | None = None) -> list[dict]:
        """The completion rows of a wave of prompts; `temperature` where the config names several."""
        sampling = policy_evaluation.sampling_of(self.config, getattr(self.config, "stop", ()), temperature)
        start = time.monotonic()
        rows = self.prompts.rows[batch]
        with devices.autocast(self.device, self.dtype):
            drawn = generate(
                self.model,
                self.tokenizer,
                self.ids[batch],
                [r["prompt_id"] for r in rows],
                list(range(self.n)),
                sampling,
                self.config.seed,
            )
        self.seconds += time.monotonic() - start
        self.tokens += sum(len(c.ids) + (c.finish == "stop") for cs in drawn for c in cs)
        meter.advance(len(rows) * self.n, **{"tok/s": f"{self.tokens / max(self.seconds, 1e-9):.0f}"})
        return policy_evaluation.completion_rows(self.tokenizer, rows, self.ids[batch], drawn)

    def _after_examples(self, rows: list[dict]) -> list[dict]:
        """The prompts as they are asked, behind the examples; the rows written keep their own prompt."""
        examples = load_rows(self.config.few_shot, "completions", skip_bad=self.config.skip_bad_rows).rows
        for row in [*examples, *rows]:
            if not isinstance(row["prompt"], str):
                raise InputError(f"{self.config.few_shot}: examples stand before texts, not before messages")
        shown = "".join(f"{e['prompt']}{e['completion'].rstrip()}\n\n" for e in examples)
        return [{"prompt_id": row["prompt_id"], "prompt": shown + row["prompt"]} for row in rows]

    def cost(self) -> dict:
        weights = sum(p.numel() for p in self.model.parameters())
        return {
            "tokens": self.tokens,
            "flops": 2 * weights * self.tokens,
            "peak_memory_bytes": devices.peak_memory_bytes(self.device),
            "device": devices.device_name(self.device),
        }


def plan_of_sampling(config, n: int, temperatures: int = 1) -> dict:
    """What --dry-run shows of a sampling stage, or of a shard of it: `n` completions of a prompt at each temperature."""
    rows = load_rows(config.prompts, "prompts", skip_bad=config.skip_bad_rows, limit=config.limit)
    share = share_of(config.shard, batch_slices(len(rows.rows), n, config.generation_batch_size) * temperatures)
    tokens = share.count * n * config.max_new_tokens
    weights = count_weights(config.model, config.revision)
    return {
        "prompts": len(rows.rows),
        "completions": share.count * n,
        "tokens at most": tokens,
        "parameters": weights,
        "FLOPs at most": f"{2 * weights * tokens:.2e}",
    }
