"""What a call costs, counted rather than timed: FLOPs, bytes written and bytes held."""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """FLOPs of matrix products, convolutions and transforms, and bytes of every result."""

    flops: int
    bytes: int


class _Written(TorchDispatchMode):
    """Adds up the bytes of every tensor that an operator makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and _storage(t) not in given:  # views and in-place results
                self.total += t.numel() * t.element_size()
        return out


class _Held(TorchDispatchMode):
    """Follows the storages that operators make until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not isinstance(t, Tensor) or _storage(t) in given:
                continue
            storage = t.untyped_storage()
            key = storage._cdata
            if key not in self.alive:
                self.alive[key] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, key, None)
        self.most = max(self.most, sum(self.alive.values()))
        return out


def held(call: Callable[[], object]) -> int:
    """The most bytes that tensors made by a call hold at one time, its results included.

    Of tensors alone: what an allocator keeps beside them is its own affair.
    """
    watched = _Held()
    with watched:
        call()
    return watched.most


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> int:
    rows, keys = q.shape[2], k.shape[2]
    full = 2 * q.shape[0] * q.shape[1] * rows * keys * (q.shape[3] + v.shape[3])
    return full // 2 if causal and rows == keys else full


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, **_: Any
) -> int:
    return _flash(q, k, v, causal)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, sums: Tensor, dropout: float,
    causal: bool, **_: Any,
) -> int:  # fmt: skip
    # Five products of the same size against the forward's two.
    return _flash(q, k, v, causal) * 5 // 2


def _fft(x: Tensor, dims: Sequence[int], *_: Any, out_val: Tensor, **__: Any) -> int:
    points = math.prod(max(x.shape[d], out_val.shape[d]) for d in dims)
    rows = x.numel() // math.prod(x.shape[d] for d in dims)
    complex_both = x.is_complex() and out_val.is_complex()
    return int((5.0 if complex_both else 2.5) * rows * points * math.log2(max(points, 2)))


for _formula in (_flash_forward, _flash_backward, _fft):
    _formula._get_raw = True  # FlopCounterMode then hands over the tensors, not their shapes
# Operators that torch's counter does not know.
_FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _flash_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
    aten._fft_r2c: _fft,
    aten._fft_c2r: _fft,
    aten._fft_c2c: _fft,
}


class _Nowhere:
    """Stands for FlopCounterMode's tracker of modules: all counts are of the whole call."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def flops(call: Callable[[], object]) -> int:
    """Floating-point operations of one call: matrix products, convolutions, attention and FFTs.

    A product of an m×k by a k×n matrix counts 2mkn, causal attention half of full, a real FFT of
    n points 2.5 n log2 n. Elementwise work is not counted.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    # Its own follows modules by hooks on the graph, which crashed the process on removal.
    counter.mod_tracker = _Nowhere()  # pyright: ignore[reportAttributeAccessIssue]
    with counter:
        call()
    return counter.get_total_flops()


def count(call: Callable[[], object]) -> Cost:
    """The cost of one call, on whatever device it runs."""
    written = _Written()

    def watched() -> None:
        with written:
            call()

    return Cost(flops(watched), written.total)
