"""Completions that a policy sampled earlier, by the token ids that their rows carry, and what has no KL and why."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import log
from ..data.chats import prompt_of
from ..data.codec import Codec
from ..data.readers import Rows, warn_of_skipped
from ..data.stored import stored_completion
from ..errors import InputError
from ..models.load import Loaded, context_length
from ..outputs.files import sha256_path
from ..outputs.manifests import inputs_of, sampling_manifest
from ..runtime import sharing

_HINT = "dpoctl sample writes such rows; without --model the file is evaluated without a KL"
_IDS = ("prompt_ids", "completion_ids")


@dataclass(frozen=True)
class StoredSamples:
    """The rows of a completions file that hold, for a policy that sampled them.

    Only `plain` samples have a KL. `skipped` counts invalid rows by reason.
    """

    rows: list[dict]
    temperature: float
    plain: bool
    skipped: dict[str, int]


def stored_samples(read: Rows, policy_path: str, policy: Loaded, reference: Loaded) -> StoredSamples:
    """The samples of a completions file that a policy is said to have sampled.

    Raises InputError with file and line for a row without ids, with ids of another tokenizer or another text, and for
    one that a model's context does not hold (skipped and counted where invalid rows are); for several temperatures, an
    unknown one, and samples of another model by their manifest.
    """
    source = sharing.on_rank_0(lambda: sampling_manifest(read.path))
    sharing.on_rank_0(lambda: _refuse_another_model(read.path, source, policy_path))
    limit = min((n for n in map(context_length, (policy.model, reference.model)) if n), default=None)
    kept, reasons = [], Counter[str]()
    for i, row in enumerate(read.rows):
        problem = _problem(row, policy.codec, limit)
        if problem and not read.skip_bad:
            raise InputError(f"{read.place(i)}: {problem}", hint=_HINT)
        if problem:
            reasons[problem] += 1
        else:
            kept.append(row)
    warn_of_skipped(read.path, len(kept), reasons)
    if not kept:
        raise InputError(f"{read.path}: no row can be used: {next(iter(reasons))}", hint=_HINT)
    if not any(row["completion_ids"] for row in kept):
        raise InputError(f"{read.path}: no completion has a token", hint="check how the file was sampled")
    temperature = _temperature(read.path, kept, source)
    why = not_plain(kept, source, temperature) or _cut(kept, policy.codec)
    if why:
        log.warn(f"{read.path}: no KL: {why}")
    return StoredSamples(kept, temperature, not why, read.skipped | dict(reasons))


def longest(rows: Sequence[dict]) -> tuple[int, int]:
    """(tokens of the longest prompt, of the longest completion) of rows with ids; 1 where none has any."""
    prompt, completion = (max([1, *(len(row.get(name) or ()) for row in rows)]) for name in _IDS)
    return prompt, completion


def _problem(row: dict, codec: Codec, limit: int | None) -> str:
    """What is wrong with a row; empty where its ids hold."""
    for name in (*_IDS, "tokenizer", "texts"):
        if row.get(name) is None:
            return f"field '{name}': missing; the KL needs the ids that were sampled"
    if row["tokenizer"] != codec.fingerprint:
        return "field 'tokenizer': the ids are those of another tokenizer than the model's"
    found = stored_completion(row, "completion", codec.fingerprint)
    if found is None:
        return "field 'texts': the text is not the one that was sampled; its ids do not hold"
    prompt, completion = found
    if not prompt:
        return "field 'prompt_ids': empty; a model continues one token at least"
    if limit is not None and len(prompt) + len(completion) > limit:
        return f"field 'completion_ids': longer than a model's context of {limit} tokens, prompt included"
    return ""


def _refuse_another_model(path: str, source: dict[str, Any] | None, policy: str) -> None:
    """Raises InputError where the manifest of samples names a model of other content than the policy."""
    if source is None:
        log.say(f"{path}: without a manifest of its sampling; taken for plain samples of {policy}")
        return
    sampled = inputs_of(source, "model")[0]
    if os.path.exists(policy) and sampled.get("size") is not None and sampled["sha256"] != sha256_path(policy):
        raise InputError(
            f"{path}: by its manifest these are samples of {source['options']['model']}, not of {policy}",
            hint="give the model that sampled them as --model, or leave --model out: then there is no KL",
        )


def _temperature(path: str, rows: Sequence[dict], source: dict[str, Any] | None) -> float:
    """The temperature of all rows; where they do not tell, that of the command that sampled them."""
    known = {row["temperature"] for row in rows if row.get("temperature") is not None}
    unknown = any(row.get("temperature") is None for row in rows)
    if unknown and source is not None:
        given = source["options"].get("temperature", 1.0)
        known |= set(given) if isinstance(given, list) else {given}
        unknown = False
    if unknown:
        hint = "add the temperature with which the rows were sampled, such as 1.0"
        raise InputError(f"{path}: field 'temperature': missing; the KL depends on it", hint=hint)
    if len(known) > 1:
        values = ", ".join(f"{value:g}" for value in sorted(known))
        raise InputError(f"{path}: several temperatures ({values}); a KL belongs to one", hint="one file for each")
    return known.pop()


def not_plain(rows: Sequence[dict], source: dict[str, Any] | None, temperature: float | None) -> str:
    """Why samples are not plain ones of a model's distribution, by `sampling_manifest` and rows; else empty."""
    options = source["options"] if source else {}
    if temperature == 0:
        return "they are greedy"
    if options.get("top-p", 1.0) < 1 or options.get("top-k", 0) > 0:
        return "they were sampled with --top-p or --top-k"
    if options.get("best-of") or any(row.get("best_of") for row in rows):
        return "they are the best of several samples"
    return ""


def _cut(rows: Sequence[dict], codec: Codec) -> str:
    """Why samples that a stop string ended have no KL; empty where there are none."""
    cut = (r.get("finish") == "stop" and not codec.stops_of(prompt_of(r)) & set(r["completion_ids"][-1:]) for r in rows)
    return "some were cut at a stop string, and the ids of that string are not in the rows" if any(cut) else ""
