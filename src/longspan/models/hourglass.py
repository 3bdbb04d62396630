"""Hourglass (Nawrot et al., 2021): a language model whose middle layers see a shorter sequence."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from longspan import hub
from longspan.engines import pool
from longspan.errors import LongspanError
from longspan.mechanisms.hierarchical.hourglass import Hourglass, Lengthening, Shortening
from longspan.models.building import mixer, refuse_leaks
from longspan.models.config import LongspanConfig, Spec
from longspan.models.heads import LongspanForCausalLM
from longspan.models.stack import LongspanModel
from longspan.nn import FeedForward
from longspan.nn.relative import Places, RelativeAttention, RelativeBlock
from longspan.shapes import Inputs, Keep

# By how much each axis is shorter than the whole.
Total = tuple[int, ...]


class HourglassConfig(LongspanConfig):
    """A LongspanConfig of nested levels.

    Args:
        hierarchy: layers@shortening of each stack, down and up again, the same shortenings mirrored
            ("2@1 8@3 2@1", "2@1 2@3 4@9 2@3 2@1"); of rows and columns of an image
            "2@1 8@2x3 2@1", where one number is both.
        columns: tokens in a row of an image, channels included, whose rows and columns are both
            shortened; None for one dimension. Logits follow from what comes before in the raster.
        shorten, lengthen: between any two levels.
        full: mechanisms of the full-length layers, tiled over them, in place of relative attention;
            their position is `position`.

    Raises:
        LongspanError: a hierarchy that is no palindrome of shortenings, each a multiple of the one
            before, from 1.
    """

    model_type = "longspan-hourglass"
    __no_type_check__ = True

    hierarchy: str = "2@1 8@3 2@1"
    columns: int | None = None
    shorten: Shortening = "attention"
    lengthen: Lengthening = "attention"
    full: Sequence[Spec] | None = None
    position: Spec | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.layers = sum(layers for layers, _ in self.stacks())
        self.mixers: Sequence[Spec] = self.full or ["multi-head-attention"]
        super().__post_init__(**kwargs)

    def stacks(self) -> list[tuple[int, Total]]:
        """(layers, shortening of each axis) of each stack in order."""
        axes = 1 if self.columns is None else 2
        try:
            found = [_stack(part, axes) for part in self.hierarchy.split()]
            down = [total for _, total in found[: len(found) // 2 + 1]]
            fits = (
                len(found) % 2 == 1
                and down[0] == (1,) * axes
                and [total for _, total in found] == down + down[-2::-1]
                and all(
                    below != above and all(b % a == 0 for a, b in zip(above, below, strict=True))
                    for above, below in pairwise(down)
                )
                and min(layers for layers, _ in found) >= 0
                and min(min(total) for total in down) >= 1
            )
        except (ValueError, IndexError, ZeroDivisionError):
            fits = False
        if not fits:
            raise LongspanError(
                f"hierarchy is {self.hierarchy!r}; expected layers@shortening down and up again, "
                "each shortening a multiple of the one before, from 1, as in '2@1 8@3 2@1', or "
                "with columns '2@1 8@2x3 2@1'."
            )
        return found  # pyright: ignore[reportPossiblyUnbound]

    def tiled(self) -> list[Spec]:
        """None: the levels hold all layers."""
        return []


def _stack(part: str, axes: int) -> tuple[int, Total]:
    layers, total = part.split("@", 1)
    sizes = tuple(map(int, total.split("x")))
    sizes = sizes * axes if len(sizes) == 1 else sizes
    if len(sizes) != axes:
        raise ValueError(part)
    return int(layers), sizes


class LevelState(NamedTuple):
    """The layers before and after the shorter level, the shortening, and the shorter level."""

    before: Any
    length: Any
    inner: Any
    after: Any


class HourglassLayer(GradientCheckpointingLayer, RelativeBlock):
    """Relative attention and a feed-forward, which transformers may recompute."""


class FullLayer(hub.Layer):
    """A layer of any mechanism, which counts its tokens itself."""

    def forward(self, x: Inputs, at: Places, state: Any = None, *, keep: Keep | None = None) -> Any:
        return super().forward(x, state, keep=keep)


class Stack(nn.Module):
    """Layers of one level, and a norm behind them."""

    def __init__(
        self, config: HourglassConfig, layers: int, total: Total, *, normed: bool = True
    ) -> None:
        super().__init__()
        causal, full = bool(config.causal), config.full if max(total) == 1 else None
        self.layers = nn.ModuleList(
            HourglassLayer(
                width=config.width,
                heads=config.heads,
                inner=config.inner,
                causal=causal,
                dropout=config.dropout,
            )
            if full is None
            else FullLayer(
                mixer(full[i % len(full)], config=config, causal=causal),
                FeedForward(config.width, inner=config.inner, dropout=config.dropout),
                width=config.width,
                dropout=config.dropout,
            )
            for i in range(layers)
        )
        self.norm = nn.LayerNorm(config.width) if normed else nn.Identity()

    def forward(
        self, x: Inputs, at: Places, states: Any = None, *, keep: Keep | None = None
    ) -> tuple[Inputs, Any]:
        carried = []
        for layer, state in zip(self.layers, states or (None,) * len(self.layers), strict=True):
            x, state = layer(x, at, state, keep=keep)
            carried.append(state)
        return self.norm(x), tuple(carried)


class Level(nn.Module):
    """before; x ← x + LN(lengthen(inner(shorten(x)))); after: the stacks at one shortening."""

    def __init__(
        self,
        config: HourglassConfig,
        stacks: Sequence[tuple[int, Total]],
        columns: int | None,
        *,
        normed: bool = True,
    ) -> None:
        super().__init__()
        (layers, total), inner = stacks[0], stacks[1:-1]
        self.before = Stack(config, layers, total, normed=normed or bool(inner))
        self.inner = None
        if inner:
            factor = tuple(b // a for a, b in zip(total, inner[0][1], strict=True))
            self.length = Hourglass(
                width=config.width,
                heads=config.heads,
                factor=factor if columns else factor[0],
                columns=columns,
                causal=bool(config.causal),
                shorten=config.shorten,
                lengthen=config.lengthen,
                inner=config.inner,
                dropout=config.dropout,
                unit=total if columns else total[0],
            )
            fewer = None if columns is None else -(-columns // factor[1])
            self.inner, self.norm = Level(config, inner, fewer), nn.LayerNorm(config.width)
            self.after = Stack(config, stacks[-1][0], total, normed=normed)

    def forward(
        self, x: Inputs, at: Places, state: LevelState | None = None, *, keep: Keep | None = None
    ) -> tuple[Inputs, LevelState]:
        old = LevelState(None, None, None, None) if state is None else state
        x, before = self.before(x, at, old.before, keep=keep)
        if self.inner is None:
            return x, LevelState(before, None, None, None)
        y, has, plan = self.length.shorten(x, old.length, keep=keep)
        inner = old.inner
        if y.shape[1]:
            y, inner = self.inner(y, plan.at_groups, inner, keep=has)
        u, length = self.length.lengthen(y, x, plan)
        x, after = self.after(x + self.norm(u), at, old.after, keep=keep)
        return x, LevelState(before, length, inner, after)


class WholeState(NamedTuple):
    """The levels, and how many tokens each row has seen."""

    levels: LevelState
    seen: Int[Tensor, "B"]


class Whole(nn.Module):
    """All levels, as one layer: kept tokens first in each row while inside."""

    def __init__(self, config: HourglassConfig) -> None:
        super().__init__()
        self.causal = bool(config.causal)
        self.level = Level(config, config.stacks(), config.columns, normed=False)

    def forward(
        self,
        x: Inputs,
        state: WholeState | None = None,
        *,
        keep: Keep | None = None,
        marks: Tensor | None = None,
        encoded: Tensor | None = None,
        encoded_keep: Tensor | None = None,
    ) -> tuple[Inputs, WholeState | None]:
        if marks is not None or encoded is not None:
            raise LongspanError("an hourglass treats all tokens alike and has no encoder.")
        back, new = None, torch.full_like(x[:, 0, 0], x.shape[1], dtype=torch.long)
        if keep is not None:
            new = keep.sum(1)
            order, back = pool.align(keep)
            x, keep = pool.rows(x.masked_fill(~keep[..., None], 0), order), keep.gather(1, order)
        at: Places = range(x.shape[1])
        if state is not None:
            at = state.seen[:, None] + torch.arange(x.shape[1], device=x.device)
        x, levels = self.level(x, at, state and state.levels, keep=keep)
        if back is not None and keep is not None:
            x = pool.rows(x.masked_fill(~keep[..., None], 0), back)
        if not self.causal:
            return x, None
        return x, WholeState(levels, new if state is None else state.seen + new)


class HourglassModel(LongspanModel):
    """Embedding, levels and a final norm; bidirectional unless `config.causal`.

    The global biases u and v of relative attention are those of its first layer in all others.
    """

    config: HourglassConfig

    def __init__(self, config: HourglassConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([hub.settled(Whole(config))])
        found = [(n, m) for n, m in self.named_modules() if isinstance(m, RelativeAttention)]
        for _, other in found[1:]:
            other.biases = found[0][1].biases
        self._tied_weights_keys = {
            f"{name}.biases.{one}": f"{found[0][0]}.biases.{one}"
            for name, _ in found[1:]
            for one in "uv"
        }
        self.post_init()


class HourglassForCausalLM(LongspanForCausalLM):
    """An Hourglass with its next-token head; logits at i follow from tokens up to i.

    >>> model = HourglassForCausalLM(HourglassConfig(hierarchy="2@1 8@3 2@1", width=512, heads=8))
    """

    config: HourglassConfig

    def __init__(self, config: HourglassConfig) -> None:
        config = config.alone(causal=True)  # pyright: ignore[reportAssignmentType]
        super(LongspanForCausalLM, self).__init__(config)
        refuse_leaks(config)
        self.model = HourglassModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()


hub.register(
    HourglassConfig, {"AutoModel": HourglassModel, "AutoModelForCausalLM": HourglassForCausalLM}
)
