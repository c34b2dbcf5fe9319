"""From prompt rows to token ids, and from sampled tokens to completion rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from .. import log
from ..data.encode import truncate
from ..data.readers import Rows
from ..data.tokens import bos_length, encode_prompts, fingerprint
from ..models.load import Loaded
from .generate import Completion, Sampling, batch_slices, generate


@dataclass(frozen=True)
class PromptSet:
    """Prompt rows with the token ids of each."""

    rows: Sequence[dict]
    ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, batch: slice) -> "PromptSet":
        """The prompts of a slice."""
        return PromptSet(self.rows[batch], self.ids[batch])


def prompt_ids(
    prompts: Rows, tokenizer: PreTrainedTokenizerBase, context: int | None, longest: int | None = None
) -> list[list[int]]:
    """Token ids of prompt rows, each with room for an answer within the model's context.

    Ids stored in a row are used where they are this tokenizer's. Prompts over `longest`, and those that leave no room
    in the context, which are cut to half of it, keep their BOS and their end; they are counted in a warning.
    """
    name = fingerprint(tokenizer)
    stored = [row.get("prompt_ids") if row.get("tokenizer") == name else None for row in prompts.rows]
    missing = [i for i, ids in enumerate(stored) if not ids]
    encoded = encode_prompts(
        tokenizer,
        [prompts.rows[i]["prompt"] for i in missing],
        lambda j: prompts.place(missing[j]),
    )
    fresh = dict(zip(missing, encoded, strict=True))
    bos = bos_length(tokenizer)
    whole = [fresh.get(i) or ids or [] for i, ids in enumerate(stored)]
    return truncated_prompts(prompts.path, whole, context, longest, bos)


def truncated_prompts(
    path: str, prompts: list[list[int]], context: int | None, longest: int | None, bos: int
) -> list[list[int]]:
    """Prompts of at most `longest` tokens that leave room in the context; a warning counts those that were cut."""
    result = []
    cut = 0
    for ids in prompts:
        shorter, _, is_cut = truncate(ids, [], None, longest, bos)
        if context is not None and len(shorter) >= context:
            shorter, _, is_cut = truncate(shorter, [], None, max(1, context // 2), bos)
        result.append(shorter)
        cut += is_cut
    if cut:
        limit = f"--max-prompt-length {longest}" if longest else f"the model's context of {context} tokens"
        log.warn(f"{path}: {cut} of {len(prompts)} prompts are too long for {limit}: truncated from the left")
    return result


def complete(
    policy: Loaded,
    prompts: PromptSet,
    n: int,
    sampling: Sampling,
    batch_size: int,
    meter: log.Progress | None = None,
) -> list[dict]:
    """`n` completions of every prompt as completion rows, at most `batch_size` completions at a time."""
    rows: list[dict] = []
    for batch in batch_slices(len(prompts), n, batch_size):
        part = prompts.part(batch)
        keys = [row["prompt_id"] for row in part.rows]
        sampled = generate(*policy, part.ids, keys, list(range(n)), sampling)
        rows.extend(completion_rows(policy.tokenizer, part, sampled))
        if meter:
            meter.advance(sum(len(completions) for completions in sampled))
    return rows


def completion_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: PromptSet, sampled: list[list[Completion]]
) -> list[dict]:
    """Completion rows with their token ids; other fields of a prompt row are carried along.

    Ids are left out where they do not decode to the text of prompt and completion.
    """
    name = fingerprint(tokenizer)
    result = []
    for row, ids, completions in zip(prompts.rows, prompts.ids, sampled, strict=True):
        carried = {k: v for k, v in row.items() if k not in ("prompt_ids", "tokenizer")}
        for k, c in enumerate(completions):
            new = carried | {"completion": c.text, "k": k, "finish": c.finish}
            if not isinstance(row["prompt"], str) or tokenizer.decode(ids + c.ids) == row["prompt"] + c.text:
                new |= {"prompt_ids": ids, "completion_ids": c.ids, "tokenizer": name}
            result.append(new)
    return result


def sequences_of(completions: Sequence[dict], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], int]]:
    """(ids, start) of sampled completion rows, with the EOS of those that ended with it."""
    eos = [tokenizer.eos_token_id]
    pairs = [(c["prompt_ids"], c["completion_ids"] + (eos if c["finish"] == "stop" else [])) for c in completions]
    return [(prompt + completion, len(prompt)) for prompt, completion in pairs]
