"""The small protocols: what an attention, a mixer and a position must offer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from longspan.errors import LongspanError
from longspan.nn.state import State
from longspan.shapes import Context, Inputs, Keep, Keys, Marks, Outputs, Queries, Values

# Added to the scaled scores: (q: B H L D, k: B H S D, pos_q: L, pos_k: S) → (B|1) H L S.
Bias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module, ABC):
    """(q, k, v, state) → (o, state): who attends to whom, without projections.

    `state=None` starts anew. A causal attention aligns the last query with the last key, so that
    keys before the queries (a memory) need no state. `keep` marks the keys of this call that may
    be seen; masked keys and values may hold anything, NaN too, and the state remembers the mask.
    A row with nothing to see gives 0. Bidirectional and cross forms return None for the state.

    Attributes:
        shared: keys are the queries (Reformer): the caller passes k = q and owns one projection.
        extra: further projections it wants, name → the one it starts as a copy of; each is
            handed to `forward` by name.
        takes_bias: `forward` has a `bias` argument and adds it to its scores.
        takes_marks: `forward` has a `marks` argument, a bool mask of tokens singled out by the
            caller (Longformer's global tokens).
        grouped: accepts fewer key-value heads than query heads as they are.
    """

    shared: ClassVar[bool] = False
    extra: ClassVar[Mapping[str, Literal["q", "k", "v"]]] = {}
    takes_bias: ClassVar[bool] = False
    takes_marks: ClassVar[bool] = False
    grouped: ClassVar[bool] = False

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    @abstractmethod
    def forward(
        self, q: Queries, k: Keys, v: Values, state: Any = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, Any]: ...

    def start(self, state: State) -> None:
        """Refuse a state where there is none to carry."""
        if state is not None and not self.causal:
            raise LongspanError(
                f"{type(self).__name__} got a state, but only a causal attention carries one: "
                "build it with causal=True."
            )


class Mixer(nn.Module, ABC):
    """(x, state) → (y, state): mixes positions of a sequence of vectors.

    `context` holds what may be attended to in place of x: another sequence (cross-attention), or,
    for a causal mixer, a memory followed by x itself. `keep` marks what may be seen: positions of
    `context` where given, else of x; outputs at masked positions of x are 0. `marks` singles out
    tokens of x for the mixers that treat some apart.
    """

    @abstractmethod
    def forward(
        self,
        x: Inputs,
        state: Any = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, Any]: ...

    def take_norm(self, norm: nn.Module) -> nn.Module:
        """Hand over the block's pre-norm; returns what the block still applies itself.

        A mixer with a memory of its inputs keeps the norm, to apply it after joining memory and
        segment (Transformer-XL under pre-norm).
        """
        return norm


class Position(nn.Module):
    """What tells positions apart; a position offers any of three hooks, named in `acts`.

    embed: (x: B L E, pos: B L) → x with positions added, before the first layer.
    rotate: (x: B H L D, pos: L or B L) → the same, for queries and keys alike.
    bias: (q, k, pos_q: L, pos_k: S) → (B|1) H L S, added to the scaled scores.
    """

    acts: ClassVar[frozenset[Literal["embed", "rotate", "bias"]]]

    def embed(self, x: Tensor, pos: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} acts by {sorted(self.acts)}, not embed.")

    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} acts by {sorted(self.acts)}, not rotate.")

    def bias(self, q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} acts by {sorted(self.acts)}, not bias.")
