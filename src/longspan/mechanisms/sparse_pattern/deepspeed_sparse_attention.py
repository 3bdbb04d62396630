"""DeepSpeed sparse attention (DeepSpeed team, 2020): block-sparse patterns by configuration."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from longspan.card import Card
from longspan.engines import pattern
from longspan.engines.dense import additive
from longspan.engines.pattern import Cells, Chance, Hubs, Pattern, PerHead, Stripes, Window
from longspan.engines.pattern import causal as earlier
from longspan.errors import LongspanError, nearest
from longspan.nn import Attention, Bias
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values

NOTHING = Hubs(())


class Alike(PerHead):
    """Every head follows what the first would."""

    def head(self, h: int) -> Pattern:
        return super().head(0)


@dataclass(frozen=True)
class LastHubs(Hubs):
    """Hubs where the last window of `local` tokens holds some, but fewer than `most`."""

    local: int = 1
    most: int = 0

    def places(self, keys: int) -> list[int]:
        return super().places(keys) if 0 < keys % self.local < self.most else []


def dense(causal: bool, ended: bool) -> PerHead:
    """Every block sees every block."""
    return Alike((pattern.everything,))


def fixed(
    causal: bool,
    ended: bool,
    *,
    local: int = 4,
    hubs: int = 1,
    patterns: int = 1,
    horizontal: bool = False,
) -> PerHead:
    """Windows of `local` blocks, `hubs` of each of which all see, counted from its end.

    Head h takes those that end (h mod `patterns`)·`hubs` before the window's end. A last window
    that is too short to hold them gives its last blocks. `horizontal`: they also see all.
    """
    if local < 1 or not 0 < hubs * patterns <= local or local % hubs or (horizontal and causal):
        raise LongspanError(
            f"'fixed' got local={local}, hubs={hubs}, patterns={patterns}, horizontal="
            f"{horizontal}: hubs must divide local, hubs · patterns fit into it, and the causal "
            "form has no horizontal ones."
        )
    cell = Cells((local,))
    choices: list[Pattern] = []
    for h in range(patterns):
        start = local - (1 + h) * hubs
        wide = [Stripes(local, start, start + hubs, rows) for rows in (False, True)]
        ends, most = tuple(range(-hubs, 0)), start + hubs if ended else 0
        last = [LastHubs(ends, rows, not rows, local, most) for rows in (False, True)]
        shape = cell & earlier if causal else cell
        for (columns, rows), group in ((wide, cell), (last, pattern.everything)):
            seen = columns | rows if horizontal else columns
            # Blocks of one group see each other whole, also in DeepSpeed's unidirectional form.
            shape = shape | ((columns & (earlier | (rows & group))) if causal else seen)
        choices.append(shape)
    return PerHead(tuple(choices))


def variable(
    causal: bool,
    ended: bool,
    *,
    chance: int = 0,
    local: Sequence[int] = (4,),
    hubs: Sequence[int] = (0,),
    ends: Sequence[int] | None = None,
    horizontal: bool = False,
    alike: bool = True,
    seed: int = 0,
) -> PerHead:
    """Windows of the listed sizes, the last repeated, listed global columns, `chance` at random."""
    if not local or min(local) < 1 or (horizontal and causal):
        raise LongspanError(
            f"'variable' got local={list(local)}, horizontal={horizontal}: windows are of at "
            "least one block, and the causal form has no horizontal hubs."
        )
    cells = Cells(tuple(local))
    shape = (cells & earlier if causal else cells) | Chance(chance, NOTHING, seed, causal)
    for group in _groups(hubs, ends):
        columns, rows = Hubs(group, rows=False), Hubs(group, columns=False)
        if causal:
            shape = shape | (columns & (earlier | rows))
        else:
            shape = shape | columns | (rows if horizontal else NOTHING)
    return (Alike if alike else PerHead)((shape,))


def bigbird(
    causal: bool,
    ended: bool,
    *,
    chance: int = 1,
    near: int = 3,
    hubs: int = 1,
    alike: bool = True,
    seed: int = 0,
) -> PerHead:
    """`near` blocks around, the first `hubs` rows and columns, `chance` at random."""
    shape = Window(near // 2, near // 2) | Hubs(tuple(range(hubs)))
    shape = (shape & earlier if causal else shape) | Chance(chance, NOTHING, seed, causal)
    return (Alike if alike else PerHead)((shape,))


def bslongformer(
    causal: bool,
    ended: bool,
    *,
    near: int = 3,
    hubs: Sequence[int] = (0,),
    ends: Sequence[int] | None = None,
) -> PerHead:
    """`near` blocks around, and listed global rows and columns."""
    shape: Pattern = Window(near // 2, near // 2)
    for group in _groups(hubs, ends):
        shape = shape | Hubs(group)
    return Alike((shape & earlier if causal else shape,))


def sliding(causal: bool, ended: bool, *, near: int = 3) -> PerHead:
    """`near` blocks around, causally ⌊near/2⌋ before."""
    return Alike((Window(near // 2, 0 if causal else near // 2),))


# Each takes (causal, ended): whether the sequence ends with its last block, or goes on.
LAYOUTS: dict[str, Callable[..., PerHead]] = {
    f.__name__: f for f in (dense, fixed, variable, bigbird, bslongformer, sliding)
}


def _groups(starts: Sequence[int], ends: Sequence[int] | None) -> list[tuple[int, ...]]:
    stops = [s + 1 for s in starts] if ends is None else list(ends)
    if len(stops) != len(starts) or any(a >= b for a, b in zip(starts, stops, strict=False)):
        raise LongspanError(
            f"global blocks start at {list(starts)} and end before {stops}: give as many ends as "
            "starts, each beyond its start."
        )
    return [tuple(range(a, b)) for a, b in zip(starts, stops, strict=True)]


@mechanism(
    Card(
        id="deepspeed-sparse-attention",
        name="DeepSpeed sparse attention",
        kind="attention",
        family="sparse-pattern",
        paper="DeepSpeed Sparse Attention",
        cite="DeepSpeed team, 2020",
        link="https://www.deepspeed.ai/2020/09/08/sparse-attention.html",
        what="Blocks of tokens see each other by one of six configurable layouts.",
        modes={"bidirectional", "causal", "step"},
        time="L*S*D + L*S*V",
        memory="S*D + S*V",
        tiny={"block": 4, "sparsity": "fixed"},
        exact={"sparsity": "dense"},
    )
)
class DeepSpeedSparseAttention(Attention):
    """softmax(q kᵀ / √D + rpe + masks) v over the pairs of blocks that a layout names.

    The causal form is DeepSpeed's unidirectional layout with element-wise causality, without which
    a block on the diagonal sees its own later tokens. Random blocks are drawn from a seed and,
    where fewer are left, fewer are seen.

    Args:
        block: tokens of a block.
        sparsity: `dense`, `fixed`, `variable`, `bigbird`, `bslongformer` or `sliding`, or a dict
            of `form` and its options (see these functions).
        elementwise: False leaves the causal layout at blocks, as DeepSpeed does; it then peeks.
        key_padding_mask_mode, attn_mask_mode: `add` adds the mask to the scores, `mul` hides what
            is 0.

    Raises:
        LongspanError: an unknown layout, option or mode, or a layout that contradicts itself.
    """

    takes_bias = True

    def __init__(
        self,
        *,
        causal: bool = False,
        block: int = 16,
        sparsity: str | Mapping[str, Any] = "fixed",
        elementwise: bool = True,
        key_padding_mask_mode: Literal["add", "mul"] = "add",
        attn_mask_mode: Literal["add", "mul"] = "mul",
    ) -> None:
        super().__init__(causal=causal)
        options = {"form": sparsity} if isinstance(sparsity, str) else dict(sparsity)
        form = options.pop("form", None)
        if form not in LAYOUTS:
            raise LongspanError(f"no layout {form!r}; expected {', '.join(LAYOUTS)}.")
        known = list(signature(LAYOUTS[form]).parameters)[2:]
        for name in options:
            if name not in known:
                raise LongspanError(
                    f"'{form}' has no option '{name}'{nearest(name, known)} It takes: "
                    f"{', '.join(known) or 'none'}."
                )
        if block < 1 or not {key_padding_mask_mode, attn_mask_mode} <= {"add", "mul"}:
            raise LongspanError(
                f"got block={block} and mask modes {key_padding_mask_mode!r}, {attn_mask_mode!r}: "
                "expected at least one token, and 'add' or 'mul'."
            )
        self.form, self.options, self.block, self.elementwise = form, options, block, elementwise
        self.modes = key_padding_mask_mode, attn_mask_mode
        # Causally the layout is that of a sequence without end, as DeepSpeed cuts it from that of
        # the longest: where a short last window puts its hubs would depend on later tokens.
        found = LAYOUTS[form](causal, not causal, **options)
        shapes = (
            c.blocks(block) & earlier if causal and elementwise else c.blocks(block)
            for c in found.choices
        )
        self.sees = type(found)(tuple(shapes))

    def layout(self, heads: int, blocks: int) -> Tensor:
        """DeepSpeed's layout of zeros and ones, H N N."""
        return LAYOUTS[self.form](self.causal, True, **self.options).mask(heads, blocks, blocks)

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: pattern.History | None = None,
        *,
        keep: Keep | None = None,
        bias: Bias | None = None,
        rpe: Float[Tensor, "#B #H L T"] | None = None,
        key_padding_mask: Shaped[Tensor, "#B T"] | None = None,
        attn_mask: Shaped[Tensor, "L T"] | None = None,
    ) -> tuple[Outputs, pattern.History | None]:
        """(o, state); with any of the last four, positions count slots, of the state too.

        Args:
            rpe: added after scaling, over all T keys. key_padding_mask, attn_mask: likewise.
        """
        past = 0 if state is None else state.k.shape[2]
        length, keys = q.shape[2], past + k.shape[2]
        if not self.causal and length != keys:
            raise LongspanError(
                f"deepspeed-sparse-attention got {length} queries for {keys} keys: it attends "
                "within one sequence and has no cross form."
            )
        masks = [rpe]
        if bias is not None:
            at = torch.arange(keys, device=q.device)
            every = k if state is None else torch.cat([state.k, k], 2)
            masks.append(bias(q, every, at[keys - length :], at))
        for mask, mode in zip((key_padding_mask, attn_mask), self.modes, strict=True):
            if mask is not None:
                added = mask if mode == "add" else additive(mask != 0, q.dtype)
                masks.append(added[None, None] if mask is attn_mask else added[:, None, None])
        given = [m.to(q.dtype) for m in masks if m is not None]
        total = sum(given[1:], given[0]) if given else None
        size = 4 * self.block, self.block
        if self.causal:
            return pattern.stream(q, k, v, self.sees, state, keep=keep, block=size, bias=total)
        if keep is not None:
            k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
        return pattern.attend(q, k, v, self.sees, keep=keep, block=size, bias=total), None
