"""StateCache: what a model carries between calls, as a cache that transformers accepts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan.errors import LongspanError
from longspan.hub.rewinding import Rewinding
from longspan.nn import detach, state_bytes
from longspan.nn.state import State


class Carried(NamedTuple):
    """What a model carries between calls: the layers' states and how many tokens each row saw.

    `seen` (B) counts kept tokens, `columns` (B) all of them, padding included.
    """

    layers: State
    seen: Tensor
    columns: Tensor


class StateCache(Rewinding):
    """The states of all layers, under the interface by which `generate` handles a cache.

    Filled by the model, in place; what each layer's state holds, and whether it grows, is the
    mechanism's own affair. A fresh one stands for nothing seen.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    @classmethod
    def of(cls, carried: Carried) -> "StateCache":
        """A cache holding what `carried` gave."""
        cache = cls()
        cache.update_states(carried.layers, carried.seen, int(carried.columns.max()))
        return cache

    def carried(self) -> Carried | None:
        """The contents as one state, for saving, forking or resetting; None while empty.

        Raises:
            LongspanError: after a rollback, before the call that feeds again what waits for it.
        """
        self._refuse_waiting("give the state")
        if self.seen is None:
            return None
        return Carried(self.states, self.seen, torch.full_like(self.seen, self.length))

    def update_states(self, states: State, seen: Tensor, columns: int) -> None:
        """Take the states after `columns` more positions; `seen` is the new count of each row."""
        self.states, self.seen = states, seen
        self.length += columns

    def detach(self) -> "StateCache":
        """A new cache of the same states without their history."""
        self._refuse_waiting("detach the state")
        cache = StateCache()
        if self.seen is not None:
            cache.update_states(detach(self.states), self.seen, self.length)
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes the states hold."""
        return state_bytes(self.states)

    @property
    def batch_size(self) -> int:
        return -1 if self.seen is None else self.seen.shape[0]

    def __len__(self) -> int:
        return 0 if self.states is None else len(self.states)

    def __repr__(self) -> str:
        return f"StateCache(layers={len(self)}, length={self.length}, bytes={self.nbytes})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length + self.waiting

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reset(self) -> None:
        self.states: State = None
        self.seen: Tensor | None = None
        self.length = self.waiting = 0
        if self.depth is not None:
            self.record(self.depth)

    def contents(self) -> State:
        return self.states, self.seen

    def refill(self, contents: State, columns: int) -> None:
        (self.states, self.seen), self.length = contents, columns

    def update(self, *_: Any, **__: Any) -> Any:
        raise LongspanError(
            "StateCache holds states, not keys and values: it serves longspan models only."
        )


def cache_of(past: Any, batch: int) -> StateCache:
    """`past` itself, or a fresh cache.

    Raises:
        LongspanError: a cache of another kind, or of another number of rows.
    """
    if past is None:
        return StateCache()
    if not isinstance(past, StateCache):
        raise LongspanError(
            f"past_key_values is a {type(past).__name__}; expected a longspan.hub.StateCache, "
            "as a longspan model returns it."
        )
    if past.batch_size not in (-1, batch):
        raise LongspanError(
            f"the carried state holds {past.batch_size} rows and the input has {batch}: "
            "keep the batch as it was, or start from a fresh StateCache."
        )
    return past
