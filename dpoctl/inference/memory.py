"""The memory of sampling, scoring and comparing policies, found by running them on fake tensors (`models.ledger`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config.scorer import model_revisions, parse_scorer
from ..data.chats import prompt_of
from ..data.codec import Codec
from ..data.stored import stored_prompt
from ..models import ledger
from ..models.ilql import plan_values
from ..models.ledger import Ledger
from ..models.load import context_length, untrained
from ..models.logprobs import Sequences, policy_kl, response_logps
from ..models.perturbation import next_logits, perturbation_of
from ..models.probes import vocabulary
from ..runtime import devices, hardware
from ..runtime.hardware import Hardware
from .decoding import Mode, assume_mode, open_decoding
from .scorer_text import Encoding
from .scorers import classifier_logits
from .values import require_values

_CANDIDATES = 64  # prompts with the most characters, among which the one with the most tokens is looked for


@dataclass(frozen=True)
class Phase:
    """A part of a command's work: bytes by what holds them at its peak."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Target:
    """The device that a plan is for, and its compute dtype; `device`: it is this machine's."""

    hardware: Hardware
    dtype: torch.dtype
    device: torch.device | None = None

    @property
    def gpu(self) -> bool:
        """Whether the memory is a GPU's."""
        return self.hardware.gpu

    def process_bytes(self) -> int:
        """Bytes of the device that interpreter and libraries take; found best after the work on fake tensors."""
        return devices.process_bytes(self.device) if self.device else 0

    def autocast(self, *, cached: bool = True) -> Any:
        """The context of forward passes on fake tensors."""
        return devices.autocast(torch.device("cpu"), self.dtype, cached=cached)


class PlannedOptions(Protocol):
    """The device of a plan."""

    @property
    def device(self) -> str: ...
    @property
    def plan_device(self) -> str | None: ...


def target_of(options: PlannedOptions) -> Target:
    """The device of --plan-device, else that of --device, with the precision of --dtype on it."""
    dtype = getattr(options, "dtype", "auto")
    if options.plan_device is not None:
        planned = hardware.named(options.plan_device)
        assert planned is not None  # `Planned.check_plan_device`
        auto = torch.bfloat16 if planned.bfloat16 else torch.float32
        return Target(planned, auto if dtype == "auto" else devices.torch_dtype(dtype))
    device = devices.pick_device(options.device)
    return Target(hardware.of_device(device), devices.pick_dtype(dtype, device), device)


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A model of fake tensors, and the bytes of its weights."""

    model: Any
    size: int


def open_frozen(counted: Ledger, path: str, kind: str, revision: str | None, target: Target) -> Held:
    """A model that is not trained; `kind` as for `untrained`. Raises InputError."""
    before = counted.restart()
    model = ledger.fake(lambda: untrained(path, kind, revision=revision), gpu=target.gpu)
    ledger.frozen(model, target.dtype)
    return Held(model, counted.restart() - before)


def open_sampled(counted: Ledger, path: str, revision: str | None, target: Target, ilql_beta: float | None) -> Held:
    """A policy that is sampled, with the values of train-ilql where they count. Raises InputError."""
    policy = open_frozen(counted, path, "policy", revision, target)
    if ilql_beta is None:
        return policy
    require_values(path, revision)
    if ilql_beta == 0:
        return policy
    before = counted.restart()
    plan_values(policy.model, target.dtype)
    return Held(policy.model, policy.size + counted.restart() - before)


@dataclass(frozen=True)
class PlannedScorer:
    """The models of a SCORER: a classifier or reward model, the two of an implicit reward, none of a function, those of
    all its parts; `kinds` says of each whether it is a `classifier` or, of an implicit reward, a `policy`."""

    models: list[Held]
    target: Target
    tokens_per_batch: int
    kinds: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        return sum(held.size for held in self.models)

    def run(self, texts: int, tokens: int) -> None:
        """Score `texts` of up to `tokens` tokens."""
        for held, kind in zip(self.models, self.kinds, strict=True):
            width = min(tokens, context_length(held.model) or tokens)
            count = min(texts, max(1, self.tokens_per_batch // width))
            with self.target.autocast():
                if kind == "policy":
                    response_logps(held.model, [([1] * width, 1)] * count, tokens_per_batch=self.tokens_per_batch)
                else:
                    padding = SimpleNamespace(pad_token_id=getattr(held.model.config, "pad_token_id", None) or 0)
                    classifier_logits(held.model, padding, [Encoding([1] * width)] * count, self.tokens_per_batch)


def open_scorer(
    counted: Ledger, scorer: str, revision: str | None, target: Target, tokens_per_batch: int
) -> PlannedScorer:
    """The models that the SCORER notation names. Raises InputError."""
    spec = parse_scorer(scorer)
    kinds = tuple("policy" if each.kind == "implicit" else "classifier" for each in spec.each for _ in each.models)
    found = zip(spec.models, kinds, model_revisions(spec, revision), strict=True)
    models = [open_frozen(counted, path, kind, each, target) for path, kind, each in found]
    return PlannedScorer(models, target, tokens_per_batch, kinds)


# --- work ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A generation batch: `rows` completions of up to `steps` tokens, of `prompts` prompts of up to `width` tokens."""

    prompts: int
    rows: int
    width: int
    steps: int

    @property
    def tokens(self) -> int:
        """Tokens of the longest text."""
        return self.width + self.steps

    def within(self, context: int | None) -> "Batch":
        """The batch, cut to a model's context as sampling cuts it."""
        if context is None or self.tokens <= context:
            return self
        width = self.width if self.width < context else max(1, context // 2)
        return Batch(self.prompts, self.rows, width, min(self.steps, context - width))

    def sequences(self, tokens: int) -> Sequences:
        """As many of its texts as `tokens` tokens hold, one at least."""
        texts = max(1, min(self.rows, tokens // self.tokens))
        return [([1 + i % 7] * self.tokens, self.width) for i in range(texts)]


@torch.no_grad()
def generate(model: Any, batch: Batch) -> int:
    """Run the prompts and one step of decoding; returns the bytes of the key cache. Under the caller's autocast."""
    assume_mode(model, Mode.PADDED)
    names = vocabulary(model)
    prompts = [[i % names, i // names % names, *([1] * (batch.width - 2))][: batch.width] for i in range(batch.prompts)]
    per_prompt = max(1, batch.rows // batch.prompts)
    rows = [i for i in range(batch.prompts) for _ in range(per_prompt)]
    decoding = open_decoding(model, prompts, rows, batch.steps)
    _sample(model, decoding.prefill())
    cache = _cache_bytes(decoding.batches[0])
    if batch.steps > 1:
        states = decoding.step([1] * len(rows), set(range(len(rows))))
        grown = _repeated_bytes(model, len(rows) * (batch.steps - 1), states.dtype)  # by the last step
        _room = torch.empty(grown, dtype=torch.uint8)
        _sample(model, states)
    return cache


def _sample(model: Any, states: Tensor) -> None:
    """What drawing a token from the whole vocabulary allocates."""
    logits = next_logits(model, states) if perturbation_of(model) else model.get_output_embeddings()(states)
    logits = logits.float()
    logits.sub_(logits.amax(-1, keepdim=True)).exp_()


def _cache_bytes(batch: Any) -> int:
    """Bytes of the storages of a decoding batch's cache."""
    cache = getattr(batch, "cache", None)
    held = [t for layer in getattr(cache, "layers", []) for t in vars(layer).values() if isinstance(t, Tensor)]
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in held)}.values())


def _repeated_bytes(model: Any, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of a layer's keys and values of `tokens` where masked attention repeats them for the query heads."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0) or 0
    if getattr(config, "num_key_value_heads", heads) == heads:
        return 0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * tokens * heads * width * dtype.itemsize


@torch.no_grad()
def compare(policy: Any, reference: Any, batch: Batch, tokens_per_batch: int) -> None:
    """The KL of a policy's samples to a reference. Under the caller's autocast."""
    policy_kl(policy, reference, batch.sequences(tokens_per_batch), tokens_per_batch=tokens_per_batch)


def work(counted: Ledger, name: str, held: dict[str, int], run: Any) -> Phase:
    """The phase in which `run()` is called, beside what is `held`; it returns the bytes of its key cache."""
    start = counted.restart()
    cache = run() or 0
    parts = held | {"key cache": cache, "temporary": counted.peak - start - cache}
    return Phase(name, {part: size for part, size in parts.items() if size})


def longest_prompt(rows: Sequence[dict], codec: Codec, limit: int | None) -> int:
    """Tokens of the longest prompt, at most `limit`; looked for among the prompts with the most characters."""
    likely = sorted(rows, key=lambda row: -len(str(row["prompt"])))[:_CANDIDATES]
    refused: list[int] = []
    ids = codec.encode_prompts([prompt_of(row) for row in likely], lambda n, error: refused.append(n))
    known = [stored_prompt(row, codec.fingerprint) or found for row, found in zip(likely, ids, strict=True)]
    longest = max(map(len, known), default=1)
    return max(1, min(longest, limit or longest))
