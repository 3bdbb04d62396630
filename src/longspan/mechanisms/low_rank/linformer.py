"""Linformer (Wang et al., 2020)."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import dense, lowrank
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values

Sharing = Literal["none", "headwise", "key-value", "layerwise"]
Kind = Literal["linear", "mean", "max", "convolution"]


class Projection(nn.Module):
    """E: S tokens to M slots along the length axis, without a bias (padding would leak in).

    Args:
        heads: 1 where all share it.
        width: D, of the convolution.
    """

    def __init__(self, kind: Kind, *, heads: int, slots: int, length: int, width: int) -> None:
        super().__init__()
        self.kind, self.slots, self.length = kind, slots, length
        self.size = -(-length // slots)
        if kind == "linear":
            self.weight = nn.Parameter(torch.empty(heads, slots, length))
        elif kind == "convolution":
            self.weight = nn.Parameter(torch.empty(heads, self.size * width, width))
        for weight in self.parameters():
            for one in weight:
                nn.init.xavier_uniform_(one)

    def forward(
        self, x: Float[Tensor, "B H S D"], count: Int[Tensor, "B"]
    ) -> Float[Tensor, "B H M D"]:
        """Slots of x, whose first `count` tokens a row are real and whose others are 0."""
        if self.kind == "linear":
            return self.weight[..., : x.shape[2]] @ x
        cut = lowrank.windows(x, self.size)
        if self.kind == "convolution":
            return cut.flatten(3) @ self.weight
        places = torch.arange(cut.shape[2] * self.size, device=x.device).view(-1, self.size)
        real = places < count[:, None, None]  # B M C
        if self.kind == "mean":
            return cut.sum(3) / real.sum(2).clamp(min=1)[:, None, :, None]
        top = cut.masked_fill(~real[:, None, ..., None], -torch.inf).amax(3)
        return top.masked_fill(~real[:, None, :, :1], 0)


@mechanism(
    Card(
        id="linformer",
        name="Linformer",
        kind="attention",
        family="low-rank",
        paper="Linformer: Self-Attention with Linear Complexity",
        cite="Wang et al., 2020",
        link="https://arxiv.org/abs/2006.04768",
        what="Projects the keys and values of all positions onto a fixed number of slots.",
        modes={"bidirectional", "cross"},
        time="L*M*D + S*M*D",
        memory="M*D + M*V",
        tiny={"length": 2048, "slots": 16},
    )
)
class Linformer(Attention):
    """o = softmax(q (E K)ᵀ / √D) (F V), E and F: M × n over the n positions (Eq. 7).

    Fewer than n tokens meet the first columns of E and F, counted over kept tokens. Pools and
    convolutions have kernel = stride = ⌈n / M⌉; a window without a token is no slot, and a mean is
    over the tokens that are there.

    Args:
        length: n, the most keys there may be.
        slots: M, the paper's k, for all heads or, with sharing `none`, one a head.
        sharing: `none` (E, F a head), `headwise` (E, F a layer), `key-value` (E = F), `layerwise`
            (one E for all layers: give each the first one's `projection`, or call `layerwise` on
            the finished model).
        heads, head_width: needed by sharing `none`, and by convolutions.

    Raises:
        LongspanError: a causal form, which mixing positions rules out; options that do not exist
            or fit; more keys than `length`.
    """

    def __init__(
        self,
        *,
        length: int,
        causal: bool = False,
        slots: int | Sequence[int] = 128,
        sharing: Sharing = "headwise",
        kind: Kind = "linear",
        heads: int | None = None,
        head_width: int | None = None,
        projection: Projection | None = None,
    ) -> None:
        super().__init__(causal=causal)
        each = [slots] if isinstance(slots, int) else list(slots)
        _check(causal, length, each, sharing, kind, heads, head_width, projection)
        self.length, self.sharing = length, sharing
        one = sharing in ("key-value", "layerwise")
        copies = heads if sharing == "none" and len(each) == 1 else 1
        size: dict[str, Any] = {"length": length, "width": head_width or 0, "heads": copies}
        given = projection or Projection(kind, slots=each[0], **size)
        self.keys = nn.ModuleList([given, *(Projection(kind, slots=m, **size) for m in each[1:])])
        self.values = (
            self.keys if one else nn.ModuleList(Projection(kind, slots=m, **size) for m in each)
        )

    def forward(
        self, q: Queries, k: Keys, v: Values, state: None = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, None]:
        tokens, parts = k.shape[2], len(self.keys)
        if tokens > self.length:
            raise LongspanError(
                f"linformer was built for at most {self.length} keys and got {tokens}: build it "
                f"with length={tokens}, or shorten the input."
            )
        if parts not in (1, q.shape[1]):
            raise LongspanError(
                f"linformer was built with {parts} numbers of slots and got {q.shape[1]} heads: "
                "give one number, or one a head."
            )
        count = torch.full(k.shape[:1], tokens, device=k.device)
        if keep is not None:
            k, v = lowrank.aligned(keep, k, v)
            count = keep.sum(1)
        outs = []
        for qs, ks, vs, key, value in zip(
            *(t.chunk(parts, 1) for t in (q, k, v)), self.keys, self.values, strict=True
        ):
            seen = None
            if keep is not None and key.kind != "linear":
                seen = torch.arange(-(-tokens // key.size), device=k.device) * key.size
                seen = seen < count[:, None]
            outs.append(dense.attend(qs, key(ks, count), value(vs, count), keep=seen))
        return torch.cat(outs, 1), None


def layerwise(model: nn.Module) -> nn.Module:
    """Make all layers of sharing `layerwise` use the first one's projection; returns the model.

    Raises:
        LongspanError: no such layer, or layers whose projections differ in kind or size.
    """
    layers = [m for m in model.modules() if isinstance(m, Linformer) and m.sharing == "layerwise"]
    if not layers:
        raise LongspanError(
            "the model has no linformer with sharing='layerwise': build its layers with it."
        )
    for layer in layers[1:]:
        sizes = {(p.kind, p.slots, p.length) for p in (layers[0].keys[0], layer.keys[0])}
        if len(sizes) > 1:
            raise LongspanError(
                f"layers cannot share projections of (kind, slots, length) {sorted(sizes)}: "
                "build all alike."
            )
        layer.keys = layer.values = layers[0].keys
    return model


def _check(
    causal: bool,
    length: int,
    slots: list[int],
    sharing: str,
    kind: str,
    heads: int | None,
    head_width: int | None,
    projection: Projection | None,
) -> None:
    for name, value, known in (("sharing", sharing, Sharing), ("kind", kind, Kind)):
        if value not in get_args(known):
            raise LongspanError(
                f"linformer has no {name} '{value}'; expected {', '.join(get_args(known))}."
            )
    wrong = None
    if causal:
        wrong = "mixes all positions and has no causal form: use abc, or another mechanism"
    elif not slots or min(*slots, length) < 1 or max(slots) > length:
        wrong = f"got slots={slots} for length={length}: expected 1 to {length} slots"
    elif sharing == "none" and heads is None:
        wrong = "needs heads for sharing='none': give their number"
    elif len(slots) > 1 and (sharing != "none" or len(slots) != heads):
        wrong = "takes several numbers of slots with sharing='none' only, one a head"
    elif kind == "convolution" and head_width is None:
        wrong = "needs head_width for its convolution: give it"
    elif projection is not None and sharing != "layerwise":
        wrong = "shares a projection between layers with sharing='layerwise' only: say so"
    if wrong:
        raise LongspanError(f"linformer {wrong}.")
