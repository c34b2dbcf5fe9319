"""The heads of implicit language Q-learning (2206.11871) on a policy's trunk, their file, and the policy they give.

V and two Q heads are MLPs d -> 2d -> ReLU -> 1 or vocabulary, and each Q head has a target, a moving average of its
weights. A Q head over a vocabulary is the tiled head's product: neither its values nor their softmax over all tokens
are held at once in training.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError
from ..objectives.ilql import TokenValues, perturbed_logits
from ..outputs.files import sync_file, use_mode_of_new_files, writing
from . import tiled_head
from .logprobs import Sequences, lay_out, response_rows, token_logps, trunk_states
from .perturbation import Perturbation, perturb
from .probes import has_plain_head
from .routing import RoutedTokens

FILE = "ilql.safetensors"
_TARGETS = "target_q."


class QHead(nn.Module):
    """Q(h, .) over a vocabulary; `inner` gives the rows that `out` is applied to."""

    def __init__(self, width: int, vocabulary: int, dtype: torch.dtype | None = None):
        super().__init__()
        self.hidden = nn.Linear(width, 2 * width, dtype=dtype)
        self.out = nn.Linear(2 * width, vocabulary, dtype=dtype)

    def inner(self, states: Tensor) -> Tensor:
        """[N, 2d] of states [N, d]."""
        return self.hidden(states.to(self.hidden.weight.dtype)).relu()

    def at(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(Q [N], log softmax of Q [N]) at `tokens` [N]; differentiable."""
        return tiled_head.target_logits_and_logps(self.inner(states), self.out.weight, self.out.bias, tokens)

    @torch.no_grad()
    def values_at(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Q [N] float32 at `tokens` [N], without gradient: only the rows of these tokens are read."""
        weight, bias = (p.index_select(0, tokens).float() for p in (self.out.weight, self.out.bias))
        return (self.inner(states).float() * weight).sum(-1) + bias

    @torch.no_grad()
    def values(self, states: Tensor) -> Tensor:
        """Q [N, V] float32."""
        return tiled_head.logits(self.out, self.inner(states)).float()


def _q(module: nn.Module) -> QHead:
    """A member of a list of Q heads."""
    assert isinstance(module, QHead)
    return module


class Heads(nn.Module):
    """V, two Q heads, and their targets, which are not trained by gradients.

    All values begin at 0, the mean return: a random Q would stay at the tokens that the data lack, where a large beta
    of decoding makes it KL without reward.
    """

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.v: Any = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 1))
        self.q = nn.ModuleList(QHead(width, vocabulary) for _ in range(2))
        for out in (self.v[-1], *(_q(head).out for head in self.q)):
            for p in out.parameters():
                nn.init.zeros_(p)
        self.target_q = deepcopy(self.q).requires_grad_(False)

    def value(self, states: Tensor) -> Tensor:
        """V [N] float32 of states [N, d]."""
        return self.v(states.to(self.v[0].weight.dtype))[:, 0].float()

    def lower_target_at(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The lower of the two targets' Q [N] at `tokens` [N]."""
        first, second = (_q(head).values_at(states, tokens) for head in self.target_q)
        return torch.minimum(first, second)

    @torch.no_grad()
    def update_targets(self, rate: float) -> None:
        """target <- rate Q + (1 - rate) target."""
        for target, trained in zip(self.target_q.parameters(), self.q.parameters(), strict=True):
            target.lerp_(trained, rate)

    def flops(self) -> int:
        """FLOPs for a completion token: forward and backward, and of the targets the hidden layers forward."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad and p.ndim == 2)
        return 6 * trained + 2 * sum(_q(head).hidden.weight.numel() for head in self.target_q)


class IlqlModel(nn.Module):
    """A policy and the heads on its trunk, whose last hidden states they share."""

    def __init__(self, policy: PreTrainedModel, heads: Heads):
        super().__init__()
        self.policy, self.heads = policy, heads

    def forward(self, sequences: Sequences, routed: RoutedTokens | None = None) -> TokenValues:
        """Values and log-probs at the response tokens of a micro-batch; each is read where the token is predicted."""
        layout = lay_out([self.policy], sequences, routed=routed)
        states = response_rows(self.policy, layout, states=trunk_states(self.policy, layout))
        tokens, heads = layout.targets, self.heads
        logps, _ = token_logps(self.policy, states, tokens, 1.0)
        (first, first_logps), (second, second_logps) = (_q(head).at(states, tokens) for head in heads.q)
        return TokenValues(
            q=(first, second),
            q_logps=(first_logps, second_logps),
            values=heads.value(states),
            target_q=heads.lower_target_at(states, tokens),
            logps=logps,
            owner=layout.owner,
        )

    def target_weights(self) -> dict[str, Tensor]:
        """The weights of the target heads, by name; an assignment to them in place reaches the model."""
        return {f"heads.target_q.{name}": p.detach() for name, p in self.heads.target_q.named_parameters()}


def make_heads(policy: PreTrainedModel, seed: int | None) -> Heads:
    """New heads for a policy, in float32 on its device, random by `seed` (None: by torch's state)."""
    vocabulary, width = policy.get_output_embeddings().weight.shape
    if seed is None:
        return Heads(width, vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = Heads(width, vocabulary)
    return heads.to(next(policy.parameters()).device)


def require_plain_head(policy: PreTrainedModel, path: str) -> None:
    """Raise InputError for a model whose logits are more than a product with its last hidden states."""
    if not has_plain_head(policy):
        raise InputError(
            f"{path}: its logits are scaled or capped after the head, or an adapter is on the head, so that values "
            "cannot be added to them from its hidden states",
            hint="ILQL needs a model with a plain linear head, such as gpt2, Pythia, Llama or Qwen",
        )


# --- the file --------------------------------------------------------------------------------------------------------


def save_heads(heads: Heads, out: Path, dtype: torch.dtype) -> Path:
    """Write `out/ilql.safetensors`, complete or absent. Raises StorageError."""
    path, tmp = out / FILE, out / f".{FILE}.tmp"
    state: dict[str, Tensor] = {name: t.detach().to(dtype).contiguous() for name, t in heads.state_dict().items()}
    with writing(path, sum(t.numel() * t.element_size() for t in state.values())):
        try:
            save_file(state, tmp, metadata={"format": "pt"})
            use_mode_of_new_files(tmp)
            sync_file(tmp)
            tmp.replace(path)
        except Exception:
            tmp.unlink(missing_ok=True)
            raise
    return path


def copy_heads(source: Path, out: Path) -> list[Path]:
    """Copy the file of a run directory, if it has one, to another with the same hidden states. Raises StorageError."""
    if not (source / FILE).is_file():
        return []
    with writing(out / FILE, (source / FILE).stat().st_size):
        tmp = out / f".{FILE}.tmp"
        shutil.copyfile(source / FILE, tmp)
        sync_file(tmp)
        tmp.replace(out / FILE)
    return [out / FILE]


def decode_with_values(policy: PreTrainedModel, folder: Path, beta: float, path: str) -> None:
    """Let a policy be decoded with beta times the target values of `folder/ilql.safetensors`, which are held as it is.

    Only the targets are read. Raises InputError for a file that is damaged or of another model, and as
    `require_plain_head`.
    """
    require_plain_head(policy, path)
    output = policy.get_output_embeddings().weight
    with torch.device("meta"):
        heads = nn.ModuleList(QHead(output.shape[1], output.shape[0]) for _ in range(2))
    state = _read_targets(folder / FILE)
    expected = {name: p.shape for name, p in heads.named_parameters()}
    if {name: t.shape for name, t in state.items()} != expected:
        raise InputError(f"{path}: {FILE} is that of another model: its shapes do not fit", "train it again")
    heads.load_state_dict({n: t.to(output.device, output.dtype) for n, t in state.items()}, assign=True)
    heads.requires_grad_(False)
    _attach(policy, heads, beta)


def count_values(folder: Path) -> int:
    """Weights of the targets of `folder/ilql.safetensors`, by its header. Raises InputError for a damaged file."""
    with _opened(folder / FILE) as found:
        return sum(prod(found.get_slice(name).get_shape()) for name in _names_of_targets(found))


def plan_values(policy: PreTrainedModel, dtype: torch.dtype) -> None:
    """Decode a policy of fake tensors with target heads of fake tensors."""
    vocabulary, width = policy.get_output_embeddings().weight.shape
    heads = nn.ModuleList(QHead(width, vocabulary, dtype) for _ in range(2)).requires_grad_(False)
    _attach(policy, heads, 1.0)


def _attach(policy: PreTrainedModel, heads: nn.ModuleList, beta: float) -> None:
    def logits(rows: Tensor, plain: Tensor) -> Tensor:
        first, second = (_q(head).values(rows) for head in heads)
        return perturbed_logits(plain.float(), torch.minimum(first, second), beta)

    perturb(policy, Perturbation(logits, sum(p.numel() for p in heads.parameters() if p.ndim > 1)))


def _read_targets(file: Path) -> dict[str, Any]:
    with _opened(file) as found:
        return {name.removeprefix(_TARGETS): found.get_tensor(name) for name in _names_of_targets(found)}


def _names_of_targets(found: Any) -> list[str]:
    return [name for name in found.keys() if name.startswith(_TARGETS)]  # noqa: SIM118  (no iterator)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as found:
            yield found
    except Exception as error:  # safetensors raises exceptions of several kinds
        raise InputError(f"{file}: cannot be read ({type(error).__name__})", "copy it again, or train again") from None
