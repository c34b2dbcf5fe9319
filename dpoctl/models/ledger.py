"""Models of fake tensors, which have shapes and no memory, and a ledger of the bytes that running them would take.

The functions that train, sample and score run on such models as they do on real ones, so that adapters, activation
checkpointing, precision and caches need no formulas. A plan for a GPU takes the head's tiles and the attention of a
GPU, of which the latter is a stand-in here: FlexAttention and SDPA keep their inputs, their output and one number for
each query, and no scores.
"""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import use_gqa_in_sdpa
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from . import precision, probes, tiled_head

_GPU_ATTENTION = "dpoctl_planned"


class Ledger(TorchDispatchMode):
    """Bytes of all live storages, now and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._note, out)
        return out

    def restart(self) -> int:
        """Forget the peak so far; returns the bytes that are held now."""
        gc.collect()  # cycles of autograd
        self.peak = self.now
        return self.now

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@contextmanager
def _collecting_new_objects_only() -> Iterator[None]:
    """`restart` collects often, and what was imported before is most of what a collection looks at."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def planning(*, gpu: bool) -> Iterator[Ledger]:
    """A context in which new tensors are fake and counted, on a GPU or on the CPU."""
    with ExitStack() as stack:
        stack.enter_context(_collecting_new_objects_only())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # copying a fake tensor
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(tiled_head.as_on("cuda" if gpu else "cpu"))
        yield stack.enter_context(Ledger())


def fake(build: Callable[[], PreTrainedModel], *, gpu: bool) -> PreTrainedModel:
    """The model that `build()` gives on the meta device, of fake tensors; to be called while `planning`.

    What only real weights can show is assumed: that it can be packed, and that its head is plain.
    """
    with torch.device("meta"):
        model = build()
    replace_tensors(model, lambda t: torch.empty_like(t, device="cpu"))
    assume(model, gpu=gpu)
    return model


def assume(model: PreTrainedModel, *, gpu: bool) -> None:
    """Answer the questions that only real weights can answer, and take a GPU's attention on one."""
    probes.assume(model, packs=True, plain_head=True)
    if gpu:
        model.set_attn_implementation(_GPU_ATTENTION)


def held(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights that are not trained in the dtype in which they are held."""
    precision.hold(model, dtype)
    return model


def frozen(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model that is not trained, such as a reference or one that is sampled."""
    return held(model.requires_grad_(False), dtype)


def replace_tensors(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace each weight and buffer by what `change` returns; tied ones stay tied."""
    known: dict[int, Tensor] = {}
    for module in model.modules():
        tables: list[tuple[dict[str, Any], Any]] = [
            (module._parameters, nn.Parameter),
            (module._buffers, lambda tensor, _: tensor),
        ]
        for table, make in tables:
            for name, old in table.items():
                if old is not None:
                    new = known.get(id(old))
                    table[name] = known[id(old)] = make(change(old.detach()), old.requires_grad) if new is None else new


# --- a GPU's attention -----------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """What FlexAttention and SDPA's fused kernels allocate and keep: query, key, value, output, log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:3], value.shape[3])
        ctx.save_for_backward(query, key, value, out, torch.empty(query.shape[:3]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, sums = ctx.saved_tensors
        _delta = torch.empty_like(sums)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attend(  # the signature is transformers' attention interface
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    query, key = query.to(value.dtype), key.to(value.dtype)
    repeats = query.shape[1] // key.shape[1]
    if options.get("tree") is None:
        if repeats > 1 and not use_gqa_in_sdpa(mask, key, value):
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.empty_like(mask, dtype=query.dtype)  # the kernels take it as numbers
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(_GPU_ATTENTION, _attend)
AttentionMaskInterface.register(_GPU_ATTENTION, sdpa_mask)
