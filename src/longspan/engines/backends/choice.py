"""Which kernel serves an engine: by device, dtype, head widths and what is installed."""

import importlib
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from longspan.errors import LongspanError, nearest

Task = Literal["pattern", "scan", "tiles"]


class _Kernel(NamedTuple):
    """What a kernel needs: packages (`on_cpu`: for a check of its values there), head widths."""

    name: str
    at: str
    packages: frozenset[str]
    on_cpu: frozenset[str] | None
    least: int
    most: int
    most_float32: int


_TRITON = frozenset({"triton"})
_INTERPRETED = frozenset({"triton", "interpreter"})
_HERE = "longspan.engines.backends."
# In order of preference. Wider heads spill registers, by the compiler's own report.
_KERNELS: dict[Task, tuple[_Kernel, ...]] = {
    "pattern": (_Kernel("flex", _HERE + "flex:attend", _TRITON, frozenset(), 16, 256, 256),),
    "scan": (
        _Kernel("triton", _HERE + "triton_scan:outer", _TRITON, _INTERPRETED, 1, 128, 64),
        _Kernel("fla", _HERE + "fla:outer", _TRITON | {"fla"}, None, 1, 256, 256),
    ),
    "tiles": (_Kernel("triton", _HERE + "triton_tiles:Tiles", _TRITON, _INTERPRETED, 1, 128, 64),),
}
_NAMES = {kernel.name: kernel for kernels in _KERNELS.values() for kernel in kernels}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Of the process, not of a thread: backward passes run in threads of their own.
_asked: str | None = None


def choose(
    task: Task,
    *,
    device: str,
    dtype: torch.dtype,
    widths: tuple[int, ...],
    installed: Collection[str],
    asked: str | None = None,
) -> str:
    """The name of the kernel for one call, "plain" where the engine's own form serves.

    Args:
        widths: head widths, of keys and of values.
        installed: of "triton", "fla" and "interpreter" (Triton's, which runs on a CPU).
        asked: a kernel preferred wherever it serves; a CPU runs one only where it is asked for.
    """
    kernels = _KERNELS[task]
    if asked == "plain" or dtype not in _DTYPES:
        return "plain"
    for kernel in [k for k in kernels if k.name == asked] or kernels:
        needed = kernel.packages
        if device != "cuda":
            if device != "cpu" or kernel.on_cpu is None or kernel.name != asked:
                continue
            needed = kernel.on_cpu
        most = kernel.most_float32 if dtype == torch.float32 else kernel.most
        if needed <= set(installed) and kernel.least <= min(widths) <= max(widths) <= most:
            return kernel.name
    return "plain"


@contextmanager
def use(name: str) -> Iterator[None]:
    """Prefers one kernel ("flex", "triton", "fla"), or none ("plain"), within the block.

    Where it cannot serve (another engine, float64, a wide head), the usual choice stays.

    Raises:
        LongspanError: an unknown name; a kernel whose package is not installed.

    >>> with use("plain"):
    ...     pass
    """
    global _asked
    if name != "plain" and name not in _NAMES:
        names = ["plain", *_NAMES]
        raise LongspanError(
            f"no kernel {name!r}{nearest(name, names)}; expected one of {', '.join(names)}."
        )
    if name != "plain":
        kernel = _NAMES[name]
        # The eager form of flex_attention, on a CPU, needs PyTorch alone.
        packages = kernel.packages if torch.cuda.is_available() else kernel.on_cpu
        packages = kernel.packages if packages is None else packages - {"interpreter"}
        if missing := sorted(packages - _installed()):
            raise LongspanError(
                f"kernel {name!r} needs {' and '.join(missing)}, which is not installed: "
                'install it (pip install "longspan[triton]" brings triton), or use("plain").'
            )
    before, _asked = _asked, name
    try:
        yield
    finally:
        _asked = before


def for_device(task: Task, q: Tensor, v: Tensor) -> Any:
    """The kernel that serves heads as wide as q's and v's, or None where the plain form does."""
    if (q.device.type == "cpu" and _asked is None) or not q.numel() or not v.numel():
        return None
    return _eager(task, q.device.type, q.dtype, (q.shape[-1], v.shape[-1]))


def _chosen(task: Task, device: str, dtype: torch.dtype, widths: tuple[int, int]) -> Any:
    name = choose(
        task, device=device, dtype=dtype, widths=widths, installed=_installed(), asked=_asked
    )
    return None if name == "plain" else _loaded(task, name)


# Looks packages up, which dynamo cannot trace.
_eager: Any = torch.compiler.disable(_chosen)


def _installed() -> frozenset[str]:
    """Read at every call where it may change: the interpreter is switched by the environment."""
    on = {"interpreter"} if os.environ.get("TRITON_INTERPRET") == "1" else set()
    return frozenset({name for name in ("triton", "fla") if _found(name)} | on)


@cache
def _found(package: str) -> bool:
    return find_spec(package) is not None


@cache
def _loaded(task: Task, name: str) -> Callable[..., Any]:
    module, function = next(k.at for k in _KERNELS[task] if k.name == name).split(":")
    return getattr(importlib.import_module(module), function)
