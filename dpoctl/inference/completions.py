"""From prompt rows to token ids, and from sampled tokens to completion rows."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from .. import log
from ..data.chats import Refusal, prompt_of
from ..data.codec import Codec
from ..data.counts import in_words
from ..data.encode import Limits, truncate
from ..data.readers import Rows, warn_of_skipped
from ..data.stored import carried, has_ids, stored_prompt, text_key
from ..errors import InputError
from ..models.load import Loaded
from ..runtime import collectives
from ..runtime.fsdp_root import with_gathered_weights
from ..runtime.sharing import in_step, map_shared
from .decoding import forward_shortest
from .generate import Completion, PromptTokens, Sampling, batch_slices, generate


@dataclass(frozen=True)
class PromptSet:
    """Prompt rows with the token ids of each, by a codec.

    `skipped` counts the rows that were left out, by reason; `counts` those that are truncated, refused (by the chat
    template), special_text, from_ids, ids_not_used and duplicates.
    """

    rows: Sequence[dict]
    ids: list[list[int]]
    codec: Codec
    skipped: dict[str, int]
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, members: Sequence[int]) -> "PromptSet":
        """The prompts of some indices."""
        return PromptSet([self.rows[i] for i in members], [self.ids[i] for i in members], self.codec, {})

    def tokens(self) -> list[PromptTokens]:
        """What `generate` samples from."""
        return [
            PromptTokens(row["prompt_id"], ids, self.codec.stops_of(prompt), self.codec.lead_of(prompt))
            for prompt, row, ids in zip(map(prompt_of, self.rows), self.rows, self.ids, strict=True)
        ]


def prompt_set(prompts: Rows, codec: Codec, context: int | None, longest: int | None = None) -> PromptSet:
    """The prompts of a file as token ids, each with room for an answer within the model's context.

    Stored ids are used where they are this tokenizer's and this text's. Prompts over `longest`, and those that leave no
    room in the context, which are cut to half of it, keep their BOS and their end; they are counted in a warning.
    Raises InputError with file and line for an empty prompt and a chat that the template refuses, which are skipped and
    counted where invalid rows are; and where no prompt is left.
    """
    ids = [stored_prompt(row, codec.fingerprint) or [] for row in prompts.rows]
    bad: dict[int, Refusal] = {}
    missing = [i for i, found in enumerate(ids) if not found]
    encoded = codec.encode_prompts(
        [prompt_of(prompts.rows[i]) for i in missing], lambda n, error: bad.update({missing[n]: error})
    )
    refused = len(bad)
    for i, found in zip(missing, encoded, strict=True):
        ids[i] = found
        if not found:
            bad.setdefault(i, Refusal("it has no tokens", "a model continues one token at least (a BOS is enough)"))
    if bad and not prompts.skip_bad:
        i, error = min(bad.items())
        raise InputError(f"{prompts.place(i)}: prompt: {error.message}", error.hint)
    reasons = Counter(error.message for error in bad.values())
    warn_of_skipped(prompts.path, len(ids) - len(bad), reasons)
    kept = [i for i in range(len(ids)) if i not in bad]
    if not kept:
        raise InputError(f"{prompts.path}: no prompt can be answered: {next(iter(reasons))}", "check the rows")
    cut, truncated = truncated_prompts([ids[i] for i in kept], context, longest, codec.bos_of)
    counts = {
        "truncated": truncated,
        "refused": refused,
        "special_text": codec.count_special([prompt_of(prompts.rows[i])] for i in missing),
        "from_ids": len(ids) - len(missing),
        "ids_not_used": sum(has_ids(prompts.rows[i], codec.fingerprint) for i in missing),
        "duplicates": len(kept) - len(set(map(tuple, cut))),
    }
    if told := in_words(counts):
        log.say(f"{prompts.path}: {told}")
    if truncated:
        limit = f"--max-prompt-length {longest}" if longest else f"the model's context of {context} tokens"
        log.warn(f"{prompts.path}: {truncated} of {len(cut)} prompts are too long for {limit}: truncated from the left")
    return PromptSet([prompts.rows[i] for i in kept], cut, codec, prompts.skipped | dict(reasons), counts)


def truncated_prompts(
    prompts: list[list[int]], context: int | None, longest: int | None, bos_of: Callable[[list[int]], int]
) -> tuple[list[list[int]], int]:
    """(prompts of at most `longest` tokens that leave room in the context, how many were cut).

    `bos_of` gives the number of ids at a prompt's start that are kept.
    """
    result = []
    cut = 0
    for ids in prompts:
        bos = bos_of(ids)
        shorter, _, is_cut = truncate(ids, [], Limits(prompt=longest), bos)
        if context is not None and len(shorter) >= context:
            shorter, _, is_cut = truncate(shorter, [], Limits(prompt=max(1, context // 2)), bos)
        result.append(shorter)
        cut += is_cut
    return result, cut


def complete(
    policy: Loaded,
    prompts: PromptSet,
    n: int,
    sampling: Sampling,
    batch_size: int,
    meter: log.Progress | None = None,
) -> list[dict]:
    """`n` completions of every prompt as completion rows, at most `batch_size` completions at a time.

    The ranks of a process group share the batches, which do not depend on their number, and every rank gets all rows.
    A sharded policy's ranks run its forward passes together.
    """
    slices = batch_slices(len(prompts), n, batch_size)
    parts = [prompts.part(range(len(prompts))[batch]) for batch in slices]
    world = collectives.world_size()

    def sample(mine: Sequence[PromptSet]) -> list[list[list[Completion]]]:
        found = []
        with in_step(policy.model, partial(forward_shortest, policy.model)):
            for round_, part in enumerate(mine):
                found.append(generate(policy.model, policy.tokenizer, part.tokens(), list(range(n)), sampling))
                if meter:
                    meter.advance(n * sum(map(len, parts[round_ * world : (round_ + 1) * world])))
        return found

    sampled = with_gathered_weights(policy.model, partial(map_shared, parts, sample))
    return [row for part, found in zip(parts, sampled, strict=True) for row in completion_rows(part, found)]


def completion_rows(prompts: PromptSet, sampled: list[list[Completion]], *, with_ids: bool = True) -> list[dict]:
    """Completion rows with their token ids, the end token included; a prompt row's other fields are carried along.

    Without ids where the model saw another prompt than the row's.
    """
    name = prompts.codec.fingerprint
    result = []
    for row, ids, completions in zip(prompts.rows, prompts.ids, sampled, strict=True):
        prompt = prompt_of(row)
        for k, c in enumerate(completions):
            new = carried(row) | {"completion": c.text, "k": k, "finish": c.finish}
            if with_ids:
                new |= {"prompt_ids": ids, "completion_ids": c.ids, "tokenizer": name}
                new["texts"] = [text_key(prompt, ids, c.text, c.ids)]
            result.append(new)
    return result


def sequences_of(completions: Sequence[dict]) -> list[tuple[list[int], int]]:
    """(ids, start of the completion) of sampled completion rows."""
    return [(c["prompt_ids"] + c["completion_ids"], len(c["prompt_ids"])) for c in completions]
