"""Tensors on the fake CUDA device: they say that they are on `cuda:0`, and compute on the CPU.

`FakeGPU` is a dispatch mode for the life of a process. It raises where a real device would (tensors of several devices
in one operation), records where the host waits for the device, and counts the bytes that live on it. What comes out of
an operation is right, so the real commands run to their ends: samples, masks and stop conditions have values. With
`backing="meta"` tensors have shapes without memory, for models of any size; what the host reads of them is 0.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _foreach_supported_types
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import dpoctl

CARD = torch.device("cuda", 0)
_PACKAGE = str(Path(dpoctl.__file__).parent)
aten = torch.ops.aten

# Operations that may read CPU tensors beside the device's, and those of which the host needs a value to go on.
_COPIES = {aten.copy_.default, aten._to_copy.default}
# kernels that read tensors of one number from the memory of the device too; others are given their value
_BY_ADDRESS = {aten._fused_adamw_.default, aten._fused_adam_.default}
_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
_WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.is_nonzero.default: "bool",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
}


class CudaTensor(Tensor):
    """A tensor that says it is on the card; its numbers, or with backing `meta` its shape, are in `inner`."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "CudaTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CARD,
            requires_grad=False,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert FakeGPU.current, "the device was switched off"
        return FakeGPU.current.run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.inner})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = self.detach().clone()
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]

    def untyped_storage(self) -> Any:
        """The storage of `inner`, which tells apart what shares memory."""
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: copy it to the CPU first")


class FakeGPU(TorchDispatchMode):
    """The device. `waits`: how often the host waited, by (kind, place in dpoctl)."""

    current: "FakeGPU | None" = None

    def __init__(self, backing: str = "cpu"):
        super().__init__()
        self.backing = torch.device(backing)
        self.waits: Counter[tuple[str, str]] = Counter()
        self.memory = Memory()

    def switch_on(self) -> None:
        """Enter for the rest of the process."""
        FakeGPU.current = self
        self.__enter__()
        torch._C._set_only_lift_cpu_tensors(True)  # numbers of Python become CPU tensors, then are copied to the card
        torch.cuda.memory_allocated = lambda device=None: self.memory.now
        torch.cuda.max_memory_allocated = lambda device=None: self.memory.peak
        torch.cuda.reset_peak_memory_stats = lambda device=None: self.memory.reset()
        nn.Module.to = _module_to
        for known in (_foreach_supported_types, _foreach_utils._foreach_supported_types):
            known.append(CudaTensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an operation: computed on `backing` where an argument or the device asked for is the card."""
        flat, spec = tree_flatten((args, kwargs))
        on_card = [x for x in flat if isinstance(x, CudaTensor)]
        to_card = _is_card(kwargs.get("device"))
        if not on_card and not to_card:
            if self.backing.type == "meta" and func is aten._to_copy.default and args[0].is_meta:
                kwargs = kwargs | {"device": "meta"}  # the host has no numbers of such a model either
            return func(*args, **kwargs)
        self._check(func, args, kwargs, flat, bool(on_card))
        if self.backing.type == "meta" and func in _WAITS:
            return self._unknown(func, on_card[0])
        leaves = "device" in kwargs and not to_card and kwargs["device"] is not None
        if leaves or func is aten.copy_.default and not isinstance(args[0], CudaTensor):
            return self._download(func, args, kwargs)
        known = {id(x.inner): x for x in on_card}
        inner_args, inner_kwargs = tree_unflatten([self._inner(x) for x in flat], spec)
        if to_card:
            inner_kwargs["device"] = self.backing
        inner_kwargs.pop("pin_memory", None)
        out = func(*inner_args, **inner_kwargs)
        return tree_map(lambda x: self._wrap(x, known) if isinstance(x, Tensor) else x, out)

    # --- what a real device would say

    def _check(self, func: Any, args: Any, kwargs: dict[str, Any], flat: list[Any], reads_card: bool) -> None:
        """Raise RuntimeError for a mix of devices; record where the host waits."""
        away = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, CudaTensor)]
        if not (func in _BY_ADDRESS and reads_card):
            away = [x for x in away if x.dim() > 0]
        if func in _COPIES:
            self._note_copy(func, args, kwargs)
            return
        if func in _INDEXED and isinstance(args[0], CudaTensor):
            for index in filter(None.__ne__, args[1]):
                if not isinstance(index, CudaTensor):
                    self.note("upload")
                elif index.dtype in (torch.bool, torch.uint8):
                    self.note("mask")
            away = [x for x in args[2:3] if isinstance(x, Tensor) and not isinstance(x, CudaTensor) and x.dim() > 0]
        if away and reads_card:
            shapes = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in flat if isinstance(x, Tensor))
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {shapes}")
        if func in _WAITS and not (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None):
            self.note(_WAITS[func])

    def _note_copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A copy to the device waits for all work before it, unless it is `non_blocking`; one from it always does.

        (What a non-blocking copy from the device gives may be read only after another wait.)
        """
        in_place = func is aten.copy_.default
        source = args[1] if in_place else args[0]
        target = isinstance(args[0], CudaTensor) if in_place else _goes_to_card(source, kwargs)
        waits_not = kwargs.get("non_blocking") or (in_place and len(args) > 2 and args[2])
        if source.numel() == 0 or isinstance(source, CudaTensor) == target:
            return
        if isinstance(source, CudaTensor):
            self.note("download")
        elif not waits_not:
            self.note("upload")

    def note(self, kind: str) -> None:
        """Record that the host waits, here."""
        self.waits[kind, _place()] += 1

    # --- in and out

    def _inner(self, x: Any) -> Any:
        if isinstance(x, CudaTensor):
            return x.inner
        # an operation on the meta device takes no index of another one
        return x.to(self.backing) if isinstance(x, Tensor) and self.backing.type == "meta" else x

    def _wrap(self, inner: Tensor, known: dict[int, CudaTensor]) -> Tensor:
        if id(inner) in known:  # an operation in place
            return known[id(inner)]
        return self.put(inner)

    def put(self, inner: Tensor) -> CudaTensor:
        """A tensor on the device that holds `inner`."""
        self.memory.hold(inner)
        return CudaTensor(inner)

    def _download(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        source = args[1] if func is aten.copy_.default else args[0]
        held = source.inner if self.backing.type == "cpu" else torch.zeros(source.shape, dtype=source.dtype)
        return func(args[0], held, *args[2:]) if func is aten.copy_.default else func(held, *args[1:], **kwargs)

    def _unknown(self, func: Any, source: CudaTensor) -> Any:
        """What the host reads from memory that is not there."""
        if func is aten._local_scalar_dense.default:
            return source.dtype is torch.bool or torch.zeros((), dtype=source.dtype).item()
        if func in (aten.is_nonzero.default, aten.equal.default):
            return True
        raise RuntimeError(f"{func}: its shape depends on numbers, and tensors on the meta device have none")


class Memory:
    """Bytes of the storages that live on the device, now and at the peak."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        self.counts = True

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is made here is not counted."""
        before, self.counts = self.counts, False
        yield
        self.counts = before

    def hold(self, inner: Tensor) -> None:
        """Count a tensor's storage, until it is freed."""
        storage = inner.untyped_storage()
        key = storage._cdata
        if self.counts and key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def reset(self) -> None:
        """Forget the peak."""
        self.peak = self.now

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _is_card(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _goes_to_card(source: Any, kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return isinstance(source, CudaTensor) if device is None else _is_card(device)


def _place() -> str:
    """The innermost line of dpoctl that is being run; `backward` in a thread of autograd's."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            return f"{frame.f_code.co_filename.removeprefix(_PACKAGE + '/')}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "backward"


def _module_to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`Module.to`, where a weight becomes a tensor of another class: each once, so that tied ones stay tied."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    known: dict[int, Tensor] = {}
    for each in module.modules():
        for held in (each._parameters, each._buffers):
            for name, old in held.items():
                if old is None:
                    continue
                if id(old) not in known:
                    floating = dtype if old.is_floating_point() else None
                    moved = old.detach().to(device or old.device, floating or old.dtype)
                    is_weight = isinstance(old, nn.Parameter)
                    known[id(old)] = nn.Parameter(moved, old.requires_grad) if is_weight else moved
                held[name] = known[id(old)]
    return module
