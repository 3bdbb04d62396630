"""What a mechanism carries between calls: a tensor, None, or a (named) tuple of these.

Every tensor has the batch as its first axis, and a row of zeros (False) is the state of a row
that has seen nothing. On these two rules saving, forking, reordering and resetting are written
once, for every mechanism.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from longspan.errors import LongspanError

State = Any  # Tensor | None | tuple[State, ...]: PEP 484 has no recursive alias at run time


def map_tensors(change: Callable[[Tensor], Tensor], state: State) -> State:
    """The same structure with `change` applied to every tensor."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, tuple):
        parts = [map_tensors(change, part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    raise LongspanError(
        f"a state holds a {type(state).__name__}; expected tensors, None and (named) tuples."
    )


def tensors(state: State) -> list[Tensor]:
    """Every tensor of a state, in order."""
    found: list[Tensor] = []
    map_tensors(lambda t: found.append(t) or t, state)
    return found


def state_bytes(state: State) -> int:
    """Bytes that the state's tensors hold, counted by elements (shared storage counts anew)."""
    return sum(t.numel() * t.element_size() for t in tensors(state))


def detach(state: State) -> State:
    """The state without its history, as between training segments."""
    return map_tensors(Tensor.detach, state)


def to(state: State, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
    """The state on another device, or its floating-point tensors in another dtype."""
    return map_tensors(
        lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None), state
    )


def select(state: State, rows: Tensor) -> State:
    """The given rows in the given order, as beam search reorders them. `rows`: int, (B',)."""
    return map_tensors(lambda t: t.index_select(0, rows.to(t.device)), state)


def fork(state: State, copies: int) -> State:
    """Each row `copies` times, the copies side by side."""
    return map_tensors(lambda t: t.repeat_interleave(copies, dim=0), state)


def reset(state: State, rows: Tensor) -> State:
    """Rows where `rows` (bool, B) is True forget everything; the others are untouched."""

    def clear(t: Tensor) -> Tensor:
        where = rows.to(t.device).view(-1, *(1,) * (t.dim() - 1))
        return t.masked_fill(where, 0)

    return map_tensors(clear, state)


def save_state(state: State, path: str | Path) -> None:
    """Write a state as one safetensors file: whole or not at all."""
    path = Path(path)
    flat: dict[str, Tensor] = {}

    def describe(part: State, name: str) -> Any:
        if part is None:
            return None
        if isinstance(part, Tensor):
            flat[name] = part.detach().contiguous().clone()
            return name
        kind = type(part)
        return {
            "type": f"{kind.__module__}:{kind.__qualname__}"
            if hasattr(part, "_fields")
            else "tuple",
            "parts": [describe(p, f"{name}.{i}") for i, p in enumerate(part)],
        }

    structure = json.dumps(describe(state, "state"))
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(flat, temporary, metadata={"longspan_state": structure})
    temporary.replace(path)


def load_state(path: str | Path, *, device: str = "cpu") -> State:
    """Read what `save_state` wrote.

    Raises:
        LongspanError: not such a file, or its state's type is not among the imported modules
            (build the mechanism first: loading imports nothing).
    """
    with safe_open(path, framework="pt", device=device) as file:
        structure = (file.metadata() or {}).get("longspan_state")
        if structure is None:
            raise LongspanError(f"{path} is no saved state; expected a file by save_state.")

        def restore(part: Any) -> State:
            if part is None:
                return None
            if isinstance(part, str):
                return file.get_tensor(part)
            parts = [restore(p) for p in part["parts"]]
            if part["type"] == "tuple":
                return tuple(parts)
            return _named_tuple(part["type"])(*parts)

        return restore(json.loads(structure))


def _named_tuple(name: str) -> type:
    module, _, attribute = name.partition(":")
    kind = getattr(sys.modules.get(module), attribute, None)
    if not (isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")):
        raise LongspanError(
            f"the saved state is a {name}, which is not imported: build its mechanism, then load."
        )
    return kind
