"""What a call costs, counted rather than timed: FLOPs and bytes written."""

from collections.abc import Callable
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


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    batch, heads, length, width = q
    return 2 * batch * heads * length * k[2] * (width + v[3])


def _attention_backward(_: Any, q: Any, k: Any, v: Any, *__: Any, **___: Any) -> int:
    return _attention(q, k, v) * 5 // 2


def _transform(x: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    count = 1
    for size in x:
        count *= size
    return 5 * count * max(1, x[-1].bit_length())


# Operators that torch's counter does not know.
_EXTRA = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._fft_r2c: _transform,
    aten._fft_c2r: _transform,
    aten._fft_c2c: _transform,
}


def count(call: Callable[[], Any]) -> Cost:
    """The cost of one call, on whatever device it runs."""
    flops = FlopCounterMode(display=False, custom_mapping=_EXTRA)
    written = _Written()
    with flops, written:
        call()
    return Cost(flops.get_total_flops(), written.total)
