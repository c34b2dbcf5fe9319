"""The KL of a policy from completions that it sampled earlier, by the token ids that their rows carry.

Nothing is sampled or tokenised. The log-probs are this package's own, whatever engine sampled.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import log
from ..data.chats import prompt_of
from ..data.codec import Codec
from ..data.readers import Rows, warn_of_skipped
from ..data.stored import stored_completion
from ..errors import InputError
from ..models.load import Loaded, context_length
from ..models.logprobs import Sequences, policy_kl
from ..outputs.files import sha256_path
from ..outputs.manifests import read_manifest
from ..runtime import sharing
from .policy_evaluation import kl_metrics
from .text_statistics import mean_se

_HINT = "dpoctl sample writes such rows; without --model the file is evaluated without a KL"
_IDS = ("prompt_ids", "completion_ids")
_ALLOWED, _LEAST, _ENOUGH = 5.0, 0.01, 8  # standard errors, nats, and prompts from which chance is ruled out


@dataclass(frozen=True)
class StoredSamples:
    """Rows of a completions file as [(ids, start of the completion)], for a policy that sampled them.

    `no_kl`: why the rows have no KL, empty where they have one; `skipped` counts invalid rows by reason.
    """

    path: str
    rows: list[dict]
    sequences: Sequences
    temperature: float
    no_kl: str
    skipped: dict[str, int]

    @torch.no_grad()
    def measure(self, policy: Loaded, reference: Loaded, tokens_per_batch: int) -> dict[str, Any]:
        """KLs to the reference and the perplexity under it, as `PolicyEvaluation.measure` has them.

        Warns where the samples do not look like the policy's: of a policy's samples, the log-ratio and the KL of each
        step, summed over time, have the same mean.
        """
        plain = not self.no_kl
        log_ratio, exact, ref_logps = values = torch.zeros(3, len(self.rows))
        some = [i for i, (ids, start) in enumerate(self.sequences) if len(ids) > start]  # of no token all are 0
        values[:, some] = torch.stack(
            policy_kl(
                policy.model,
                reference.model,
                [self.sequences[i] for i in some],
                temperature=self.temperature if plain else 1.0,
                tokens_per_batch=tokens_per_batch,
            )
        )
        by_prompt = [row["prompt_id"] for row in self.rows]
        if plain:
            off, error = mean_se((log_ratio - exact).double().tolist(), by_prompt)
            if abs(off) > max(_ALLOWED * error, _LEAST) and len(set(by_prompt)) >= _ENOUGH:
                log.warn(
                    f"{self.path}: its log-ratios and exact KLs differ by {off:.2f} +- {error:.2f} nats on average, "
                    f"more than chance: are these plain samples of --model at temperature {self.temperature:g}?"
                )
        else:
            log.warn(f"{self.path}: no KL: {self.no_kl}")
        return kl_metrics(log_ratio, exact, ref_logps, self.sequences, by_prompt, plain=plain)


def stored_samples(read: Rows, policy_path: str, policy: Loaded, reference: Loaded) -> StoredSamples:
    """The samples of a completions file that a policy is said to have sampled.

    Raises InputError with file and line for a row without ids, with ids of another tokenizer or another text, and for
    one that a model's context does not hold (skipped and counted where invalid rows are); for several temperatures, an
    unknown one, and samples of another model by their manifest.
    """
    source = sharing.on_rank_0(lambda: _sampling(read.path))
    sharing.on_rank_0(lambda: _refuse_another_model(read.path, source, policy_path))
    limit = min((n for n in map(context_length, (policy.model, reference.model)) if n), default=None)
    kept, sequences, reasons = [], [], Counter[str]()
    for i, row in enumerate(read.rows):
        problem, ids = _ids_of(row, policy.codec, limit)
        if problem and not read.skip_bad:
            raise InputError(f"{read.place(i)}: {problem}", hint=_HINT)
        if problem:
            reasons[problem] += 1
        else:
            kept.append(row)
            sequences.append(ids)
    warn_of_skipped(read.path, len(kept), reasons)
    if not kept:
        raise InputError(f"{read.path}: no row can be used: {next(iter(reasons))}", hint=_HINT)
    if all(len(ids) == start for ids, start in sequences):
        raise InputError(f"{read.path}: no completion has a token", hint="check how the file was sampled")
    temperature = _temperature(read.path, kept, source)
    why = _no_kl(kept, sequences, policy.codec, source, temperature)
    return StoredSamples(read.path, kept, sequences, temperature, why, read.skipped | dict(reasons))


def longest(rows: Sequence[dict]) -> tuple[int, int]:
    """(tokens of the longest prompt, of the longest completion) of rows with ids; 1 where none has any."""
    prompt, completion = (max([1, *(len(row.get(name) or ()) for row in rows)]) for name in _IDS)
    return prompt, completion


def _ids_of(row: dict, codec: Codec, limit: int | None) -> tuple[str, tuple[list[int], int]]:
    """(what is wrong with a row, or nothing; its ids and the start of the completion)."""
    nothing: tuple[list[int], int] = ([], 0)
    for name in (*_IDS, "tokenizer", "texts"):
        if row.get(name) is None:
            return f"field '{name}': missing; the KL needs the ids that were sampled", nothing
    if row["tokenizer"] != codec.fingerprint:
        return "field 'tokenizer': the ids are those of another tokenizer than the model's", nothing
    found = stored_completion(row, "completion", codec.fingerprint)
    if found is None:
        return "field 'texts': the text is not the one that was sampled; its ids do not hold", nothing
    prompt, completion = found
    if not prompt:
        return "field 'prompt_ids': empty; a model continues one token at least", nothing
    if limit is not None and len(prompt) + len(completion) > limit:
        return f"field 'completion_ids': longer than a model's context of {limit} tokens, prompt included", nothing
    return "", (prompt + completion, len(prompt))


def _sampling(path: str) -> dict[str, Any] | None:
    """The manifest of the command that sampled the rows of a file, perhaps scored since then; None where unknown."""
    manifest = read_manifest(path)
    if manifest and manifest["stage"] == "score":
        [data] = [described for described in manifest["inputs"] if described["name"] == "data"]
        source = Path(path).parent / data["path"]
        manifest = read_manifest(source) if source.exists() else None
        if manifest and manifest.get("id") != data["manifest"]:
            return None
    return manifest if manifest and manifest["stage"] in ("sample", "make-prefs") else None


def _refuse_another_model(path: str, source: dict[str, Any] | None, policy: str) -> None:
    """Raises InputError where the manifest of samples names a model of other content than the policy."""
    if source is None:
        log.say(f"{path}: without a manifest of its sampling; taken for plain samples of {policy}")
        return
    sampled = next(described for described in source["inputs"] if described["name"] == "model")
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


def _no_kl(
    rows: Sequence[dict], sequences: Sequences, codec: Codec, source: dict[str, Any] | None, temperature: float
) -> str:
    """Why the log-probs of samples give no KL; empty where they do."""
    options = source["options"] if source else {}
    if temperature == 0:
        return "greedy completions have none"
    if options.get("top-p", 1.0) < 1 or options.get("top-k", 0) > 0:
        return "they were sampled with --top-p or --top-k"
    if options.get("best-of") or any(row.get("best_of") for row in rows):
        return "they are the best of several samples"
    for row, (ids, start) in zip(rows, sequences, strict=True):
        if row.get("finish") == "stop" and not codec.stops_of(prompt_of(row)) & set(ids[start:][-1:]):
            return "some were cut at a stop string, and the ids of that string are not in the rows"
    return ""
