"""The small protocols: what an attention, a mixer and a position must offer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from longspan.errors import LongspanError
from longspan.shapes import Context, Inputs, Keep, Keys, Marks, Outputs, Queries, Values

# Added to the scaled scores: (q: B H L D, k: B H S D, pos_q: L, pos_k: S) → (B|1) H L S.
Bias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Added to the outputs: (weights: B H L S, pos_q: L, pos_k: S) → B H L V.
Spread = Callable[[Tensor, Tensor, Tensor], Tensor]
# Turns features of queries or keys by their positions: B H L M → B H L M.
Turn = Callable[[Tensor], Tensor]
Act = Literal["embed", "enter", "infuse", "rotate", "bias", "spread"]


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
        takes_spread: `forward` has a `spread` argument, which reads its weights, and adds what it
            gives to its outputs.
        takes_turns: `forward` has a `turns` argument, one `Turn` of queries and one of keys: it
            rotates its own features instead of being given rotated q and k.
        takes_marks: `forward` has a `marks` argument, a bool mask of tokens singled out by the
            caller (Longformer's global tokens).
        grouped: accepts fewer key-value heads than query heads as they are.
        one_form: the only value of `causal` it can be built with, and what to do for the other.
    """

    shared: ClassVar[bool] = False
    extra: Mapping[str, Literal["q", "k", "v"]] = {}
    takes_bias: ClassVar[bool] = False
    takes_spread: ClassVar[bool] = False
    takes_turns: bool = False
    takes_marks: ClassVar[bool] = False
    grouped: ClassVar[bool] = False
    one_form: ClassVar[tuple[bool, str] | None] = None

    def __init__(self, *, causal: bool | None = None) -> None:
        super().__init__()
        only, instead = self.one_form or (None, "")
        self.causal = bool(only) if causal is None else causal
        if only is not None and self.causal != only:
            form = "is causal only" if only else "has no causal form"
            raise LongspanError(f"{type(self).__name__} {form}: {instead}.")
        self.register_forward_pre_hook(_check_attention, with_kwargs=True)

    @abstractmethod
    def forward(
        self, q: Queries, k: Keys, v: Values, state: Any = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, Any]: ...


class Mixer(nn.Module, ABC):
    """(x, state) → (y, state): mixes positions of a sequence of vectors.

    `context` holds what may be attended to in place of x: another sequence (cross-attention), or,
    for a causal mixer, a memory followed by x itself. `keep` marks what may be seen: positions of
    `context` where given, else of x; outputs at masked positions of x are 0. `marks` singles out
    tokens of x for the mixers that treat some apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(_check_mixer, with_kwargs=True)

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
    """What tells positions apart; a position offers any of these hooks, named in `acts`.

    embed: (x: B L E, pos: B L) → x with positions added, before the first layer.
    enter: (x: B L E, pos: B L, layer) → the same before each layer, 0 being the first; what is
        added flows on from layer to layer.
    infuse: (x: B L E, pos: B L) → what queries and keys are projected from, but not values.
    rotate: (x: B H L D, pos: L or B L) → the same, for queries and keys alike.
    bias: (q, k, pos_q: L, pos_k: S) → (B|1) H L S, added to the scaled scores.
    spread: (weights: B H L S, pos_q: L, pos_k: S) → B H L V, added to the outputs.

    Attributes:
        causal: knows no keys after the query, and is refused by an attention that is not causal.
    """

    acts: frozenset[Act]
    causal: bool = False

    def embed(self, x: Tensor, pos: Tensor) -> Tensor:
        raise self._lacks("embed")

    def enter(self, x: Tensor, pos: Tensor, layer: int) -> Tensor:
        raise self._lacks("enter")

    def infuse(self, x: Tensor, pos: Tensor) -> Tensor:
        raise self._lacks("infuse")

    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        raise self._lacks("rotate")

    def bias(self, q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        raise self._lacks("bias")

    def spread(self, weights: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        raise self._lacks("spread")

    def _lacks(self, hook: Act) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__} acts by {sorted(self.acts)}, not {hook}."
        )


def _check_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse inputs that do not fit each other, before any compute."""
    assert isinstance(module, Attention)
    name = type(module).__name__
    given = dict(zip(("q", "k", "v", "state"), args, strict=False)) | kwargs
    q, k, v = given["q"], given["k"], given["v"]
    if not q.dim() == k.dim() == v.dim() == 4:
        raise LongspanError(
            f"{name} got q, k, v with {q.dim()}, {k.dim()}, {v.dim()} axes: expected 4, "
            "batch × heads × tokens × width."
        )
    heads_fit = k.shape[1] == v.shape[1] and (
        q.shape[1] == k.shape[1] or (module.grouped and k.shape[1] and not q.shape[1] % k.shape[1])
    )
    if not (heads_fit and q.shape[0] == k.shape[0] == v.shape[0] and k.shape[2] == v.shape[2]):
        raise LongspanError(
            f"{name} got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: batch, heads "
            "and the number of keys and values must agree."
        )
    if q.shape[3] != k.shape[3]:
        raise LongspanError(
            f"{name} got queries of width {q.shape[3]} and keys of width {k.shape[3]}: "
            "give both the same width."
        )
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise LongspanError(
            f"{name} got q, k, v as {q.dtype}, {k.dtype}, {v.dtype}: cast them to one float dtype."
        )
    _check_keep(name, given.get("keep"), (k.shape[0], k.shape[2]))
    if given.get("state") is not None and not module.causal:
        raise LongspanError(
            f"{name} got a state, but only a causal attention carries one: build it causal=True."
        )


def _check_mixer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    given = dict(zip(("x", "state"), args, strict=False)) | kwargs
    x, context = given["x"], given.get("context")
    for what, t in (("x", x), ("context", context)):
        if t is not None and (t.dim() != 3 or not t.is_floating_point()):
            raise LongspanError(
                f"{name} got {what} of shape {tuple(t.shape)} and {t.dtype}: expected floats, "
                "batch × tokens × width."
            )
    if context is not None and context.shape[0] != x.shape[0]:
        raise LongspanError(
            f"{name} got {x.shape[0]} rows of x and {context.shape[0]} of context: they must agree."
        )
    source = x if context is None else context
    _check_keep(name, given.get("keep"), tuple(source.shape[:2]))
    if (marks := given.get("marks")) is not None:
        _check_keep(name, marks, tuple(x.shape[:2]), what="marks")


def _check_keep(name: str, keep: Any, shape: tuple[int, ...], *, what: str = "keep") -> None:
    if keep is not None and (keep.dtype != torch.bool or tuple(keep.shape) != shape):
        raise LongspanError(
            f"{name} got {what} of shape {tuple(keep.shape)} and {keep.dtype}: expected bool "
            f"{shape}, True where a token may be seen."
        )
