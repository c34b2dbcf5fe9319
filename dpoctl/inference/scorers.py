"""Scorers: rows in, one number per row out. `load_scorer` opens what the SCORER notation names.

A scorer gets text and has its own tokenizer. It computes in the precision of the command's other models, its head in
float32, and a row's score depends on what shares its batch by rounding only. Compare by `keys`: a probability saturates
in float32, which makes ties of texts that differ.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..config.scorer import ScorerSpec, model_revisions, parse_scorer
from ..data.chats import TemplateOptions
from ..data.gaps import sequence_of
from ..errors import InputError
from ..models import rope
from ..models.hub import check_path, resolve
from ..models.load import Loaded, context_length, load_classifier, load_policy
from ..models.logprobs import Sequences, response_logps
from ..models.place import Place
from ..models.tokenizers import require_same_tokenizer
from ..runtime import collectives
from ..runtime.devices import Compute
from ..runtime.sharing import dealt, map_shared
from .combined_scorer import CombinedScorer
from .options import ScoringOptions
from .remote_scorer import RemoteScores
from .scorer_base import Scorer, ScorerOptions, Scores
from .scorer_text import Encoding, PairEncoder, PairTokens, TextEncoder, TruncationWarning, completion_of, describe
from .user_function import imported, location

_POSITIVE = ("positive", "pos")


def scorer_options(options: ScoringOptions, compute: Compute, templates: TemplateOptions) -> ScorerOptions:
    """How a command's options say to open --scorer, which keeps its own chat template."""
    return ScorerOptions(
        compute.device,
        options.scorer_revision,
        options.scorer_trust_remote_code,
        options.score_text,
        tokens_per_batch=options.scorer_tokens_per_batch,
        templates=replace(templates, template=None),
        dtype=compute.dtype,
    )


def load_scorer(spec: str, options: ScorerOptions | None = None) -> Scorer:
    """The scorer that the SCORER notation names.

    Raises InputError for whatever is wrong with notation, models, file or function, and where `text` is not `joined`
    for a scorer that always reads both.
    """
    options = options or ScorerOptions()
    parsed = parse_scorer(spec)
    _check_paths(spec, parsed)
    if parsed.members:
        return CombinedScorer(spec, options, parsed.kind, _members(parsed, options))
    if parsed.kind != "model" and not options.joined:
        raise InputError(f"scorer {spec!r}: it reads prompt and completion, never the completion alone")
    if parsed.kind == "python":
        return PythonScorer(spec, options, *parsed.parts)
    if parsed.kind == "remote":
        return RemoteScorer(spec, options, *parsed.parts)
    if parsed.kind == "implicit":
        return ImplicitScorer(spec, options, parsed)
    path = parsed.parts[0]
    loaded = load_classifier(
        path,
        Place(options.device, options.dtype, options.quantize, apart=options.apart),
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        templates=options.templates,
    )
    if loaded.model.config.num_labels != 1:
        return ClassifierScorer(spec, options, path, loaded, parsed.score_type or options.score_type)
    if parsed.score_type:
        hint = f"leave @{parsed.score_type} out"
        raise InputError(f"{path}: a reward model (one label) has no score type @{parsed.score_type}", hint)
    return RewardModelScorer(spec, options, loaded)


def _members(spec: ScorerSpec, options: ScorerOptions) -> list[Scorer]:
    """The scorers that `spec` combines, each with its own revisions. Raises InputError as `load_scorer` does."""
    revisions = iter(model_revisions(spec, options.revision))
    opened = []
    for part, member in zip(spec.parts, spec.members, strict=True):
        its = [revision for _, revision in zip(member.models, revisions, strict=False) if revision]
        opened.append(load_scorer(part, replace(options, revision=",".join(its) or None)))
    return opened


def _check_paths(spec: str, parsed: ScorerSpec) -> None:
    """Raises InputError for a model or a file that does not exist."""
    for kind, path in parsed.inputs:
        if kind == "model":
            check_path(path)
        elif not Path(path).expanduser().is_file():
            raise InputError(f"scorer {spec!r}: no such file: {path}", hint="check the path")


# --- the kinds of scorer ---------------------------------------------------------------------------------------------


class ClassifierScorer(Scorer):
    """A sequence classifier with one positive label.

    With z its logits and z+ that of the positive label, `logit` is z+, `log-odds` is z+ - logsumexp(the others), and
    `prob` is the logistic function of the log-odds. With independent labels (multi-label) the log-odds are z+.
    """

    def __init__(self, name: str, options: ScorerOptions, path: str, loaded: Loaded, score_type: str):
        """Raises InputError unless exactly one label is called positive."""
        super().__init__(name, options)
        self.score_type = score_type
        self.model, self.tokenizer, codec = loaded
        labels = {int(i): label for i, label in self.model.config.id2label.items()}
        positive = [i for i, label in labels.items() if str(label).lower() in _POSITIVE]
        if len(positive) != 1:
            names = ", ".join(map(str, labels.values()))
            raise InputError(
                f"{path}: no label of this classifier is called positive; it has {names}",
                hint="name it POSITIVE in config.json (id2label, label2id), or write a python:FILE.py:FUNCTION scorer",
            )
        self.positive = positive[0]
        self.others = [i for i in labels if i != self.positive]
        self.encoder = TextEncoder(path, self.model, codec, options.joined)

    def _score(self, rows: list[dict]) -> Scores:
        logits = classifier_logits(self.model, self.tokenizer, self.encoder.encode(rows), self.options.tokens_per_batch)
        positive = logits[:, self.positive]
        if self.model.config.problem_type == "multi_label_classification":
            log_odds = positive
        else:
            log_odds = positive - logits[:, self.others].logsumexp(-1)
        values = {"prob": torch.sigmoid(log_odds), "logit": positive, "log-odds": log_odds}[self.score_type]
        return Scores(values.tolist(), log_odds.tolist())


class RewardModelScorer(Scorer):
    """A model with one label: (logit - reward_shift) / reward_scale, both of its config.json, 0 and 1 where absent.

    train-rm's models have them; they get prompt and completion as in training. Others get what they were trained on:
    a conversation exactly as their chat template renders it, a text as their tokenizer encodes it.
    """

    score_type = "reward"

    def __init__(self, name: str, options: ScorerOptions, loaded: Loaded):
        super().__init__(name, options)
        self.model, self.tokenizer, codec = loaded
        config = self.model.config
        self.shift, self.scale = getattr(config, "reward_shift", 0.0), getattr(config, "reward_scale", 1.0)
        encoder: type[PairEncoder] | type[TextEncoder] = PairEncoder if is_own(self.model) else TextEncoder
        self.encoder = encoder(config.name_or_path, self.model, codec, options.joined)

    def _score(self, rows: list[dict]) -> Scores:
        logits = classifier_logits(self.model, self.tokenizer, self.encoder.encode(rows), self.options.tokens_per_batch)
        values = ((logits[:, 0] - self.shift) / self.scale).tolist()
        return Scores(values, list(values))


class ImplicitScorer(Scorer):
    """DPO's reward: beta times the sum over the completion of log policy - log reference (2305.18290, section 4).

    beta is that of the policy's config.yaml.
    """

    score_type = "implicit"

    def __init__(self, name: str, options: ScorerOptions, spec: ScorerSpec):
        """Raises InputError as `load_policy` and `model_revisions` do, for different tokenizers, and without a beta."""
        super().__init__(name, options)
        policy, reference = spec.parts
        revisions = model_revisions(spec, options.revision)
        self.policy, self.reference = (
            load_policy(
                path,
                Place(options.device, options.dtype),
                revision=revision,
                trust_remote_code=options.trust_remote_code,
                templates=options.templates,
            )
            for path, revision in zip(spec.parts, revisions, strict=True)
        )
        require_same_tokenizer(self.policy.tokenizer, self.reference.tokenizer, policy, reference)
        self.beta = _beta(policy, revisions[0])
        contexts = [context_length(loaded.model) for loaded in (self.policy, self.reference)]
        limit = min((n for n in contexts if n), default=None)
        self.tokens = PairTokens(self.policy.codec, limit)
        self.warning = TruncationWarning(policy, limit)

    def _score(self, rows: list[dict]) -> Scores:
        pairs = [self.tokens.ids(row) for row in rows]
        for row, (prompt, *_) in zip(rows, pairs, strict=True):
            if not prompt:
                raise InputError(f"the implicit reward needs a prompt: {describe(row)} has none")
        self.warning.add(sum(truncated for *_, truncated in pairs))
        sequences = [sequence_of(prompt, completion, gaps) for prompt, completion, gaps, _ in pairs]
        policy, reference = (self._logps(loaded, sequences) for loaded in (self.policy, self.reference))
        values = (self.beta * (policy - reference)).tolist()
        return Scores(values, list(values))

    @torch.inference_mode()
    def _logps(self, loaded: Loaded, sequences: Sequences) -> Tensor:
        """Summed log-probs [N] float64 of the completions."""
        return response_logps(loaded.model, sequences, tokens_per_batch=self.options.tokens_per_batch).double()


class PythonScorer(Scorer):
    """A user's function: a list of {"prompt", "completion"} in, a list of numbers out."""

    score_type = "python"

    def __init__(self, name: str, options: ScorerOptions, file: str, function: str):
        """Raises InputError for a file that cannot be imported or does not define the function."""
        super().__init__(name, options)
        self.label, self.path = f"scorer {file}:{function}", Path(file).expanduser()
        self.function = imported(file, self.path, function)

    def _score(self, rows: list[dict]) -> Scores:
        values = map_shared(rows, self._values)
        return Scores(values, list(values))

    def _values(self, rows: Sequence[dict]) -> list[float]:
        if not rows:
            return []
        try:
            values = self._call(rows)
        except Exception as e:
            raise InputError(f"{self.label} failed: {location(e, self.path)}{self._culprit(rows)}") from e
        if len(values) != len(rows):
            raise InputError(
                f"{self.label} returned {len(values)} numbers for {len(rows)} texts, the first of them "
                f"{describe(rows[0])}",
                hint="return one number for each text, in order",
            )
        return values

    def _call(self, rows: Sequence[dict]) -> list[float]:
        pairs = [{"prompt": row.get("prompt", ""), "completion": completion_of(row)} for row in rows]
        return [float(x) for x in self.function(pairs)]

    def _culprit(self, rows: Sequence[dict]) -> str:
        """The first row with which the function fails alone, for the message; empty without one."""
        for row in rows:
            try:
                self._call([row])
            except Exception:
                return f", on {describe(row)}"
        return ""


class RemoteScorer(Scorer):
    """A server of the user's: see remote_scorer.py."""

    score_type = "remote"

    def __init__(self, name: str, options: ScorerOptions, url: str):
        """Raises InputError for a malformed address."""
        super().__init__(name, options)
        self.remote = RemoteScores(url)

    def _score(self, rows: list[dict]) -> Scores:
        values = map_shared(rows, self.remote.of)
        return Scores(values, list(values))


def is_own(model: Any) -> bool:
    """Whether train-rm saved a model of one label: its configuration says how rewards are shifted."""
    return hasattr(model.config, "reward_shift")


# --- parts -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def classifier_logits(model: Any, tokenizer: Any, encoded: list[Encoding], tokens_per_batch: int) -> Tensor:
    """Logits [texts, labels] float64, in the order of `encoded`.

    Batches hold texts of similar length, at most `tokens_per_batch` tokens with the padding; ranks share them.
    """
    sequences = [encoding.ids for encoding in encoded]
    batches: list[list[int]] = []
    for group in rope.groups([model], [len(ids) for ids in sequences]):
        order = sorted(group, key=lambda n: -len(sequences[n]))
        while order:
            size = max(1, tokens_per_batch // max(1, len(sequences[order[0]])))
            batches.append(order[:size])
            order = order[size:]
    logits = torch.zeros(len(sequences), model.config.num_labels, dtype=torch.float64)
    # a decoder would keep keys and values of all layers for tokens that nothing generates
    known = inspect.signature(model.forward).parameters
    cacheless = {"use_cache": False} if "use_cache" in known else {}
    typed = "token_type_ids" in known and _has_types(model, encoded)
    for batch in dealt(batches):
        width = max(1, len(sequences[batch[0]]))
        ids = torch.full((len(batch), width), _padding(model, tokenizer, [sequences[n][-1:] for n in batch]))
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for line, n in enumerate(batch):
            ids[line, : len(sequences[n])] = torch.tensor(sequences[n], dtype=torch.long)
            mask[line, : len(sequences[n])] = 1
            if typed:
                types[line, : len(sequences[n])] = torch.tensor(encoded[n].types or [0] * len(sequences[n]))
        rope.reset(model)
        more = cacheless | ({"token_type_ids": types.to(model.device)} if typed else {})
        output = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **more)
        logits[batch] = output.logits.double().cpu()
    return collectives.sum_over_ranks(logits)


def _has_types(model: Any, encoded: list[Encoding]) -> bool:
    """Whether tokens are of different types, and of types that the model knows; without them all have type 0."""
    highest = max((max(encoding.types, default=0) for encoding in encoded if encoding.types), default=0)
    known = getattr(model.config, "type_vocab_size", None)
    return 0 < highest and (known is None or highest < known)


def _padding(model: Any, tokenizer: Any, ends: list[list[int]]) -> int:
    """The id to pad with; where neither tokenizer nor model has one, any with which no sequence ends.

    A decoder looks for the last token that is not padding.
    """
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    pad = next(n for n in range(len(ends) + 1) if [n] not in ends)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad
    return pad


def _beta(path: str, revision: str | None) -> float:
    """The beta of a train-dpo run. Raises InputError without a config.yaml that has one."""
    config = Path(resolve(path, revision)) / "config.yaml"
    try:
        beta = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("beta")
    except (OSError, yaml.YAMLError, AttributeError) as e:
        raise InputError(f"{config}: cannot be read, and the implicit reward needs its beta") from e
    if not isinstance(beta, int | float) or isinstance(beta, bool) or not beta > 0:
        raise InputError(f"{config}: beta: expected a number above 0, got {beta!r}", "is it a train-dpo run directory?")
    return float(beta)
