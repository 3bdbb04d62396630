"""Memorizing Transformer (Wu et al., 2022)."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import dense, nearest
from longspan.engines.given import Past, extended
from longspan.errors import LongspanError
from longspan.nn import MultiHead, Position
from longspan.nn.distances import DistanceBias
from longspan.nn.memory import Losses, Segmented
from longspan.registry import build, mechanism
from longspan.shapes import Inputs

Combining = Literal["gate", "sum", "joint"]
# (q: B H L D, k: B H S D, count, keep=B S) → indices B H L count, −1 where there are fewer.
Search = Callable[..., Tensor]


class Memory(NamedTuple):
    """Keys and values just before the segment, and those of all segments that are stored."""

    local: Past
    store: Past


class Distances(Position):
    """T5's bias: a number a head for each bucket of the distance."""

    acts = frozenset({"bias"})

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.table = DistanceBias(heads)

    def bias(self, q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        return self.table((pos_q[:, None] - pos_k).clamp(min=0)[None])


class Indexed:
    """A search by an index of each row and head, which is made anew when the store changes.

    >>> search = Indexed(lambda width: nearest.Faiss(width, kind="HNSW32"))
    """

    def __init__(self, make: Callable[[int], nearest.Index]) -> None:
        self.make, self.of = make, None
        self.indices: list[nearest.Index] = []

    def __call__(self, q: Tensor, k: Tensor, count: int, *, keep: Tensor) -> Tensor:
        if self.of is not k:
            per_row = [row[:, kept] for row, kept in zip(k, keep, strict=True)]
            self.of, self.indices = k, [self._index(keys) for row in per_row for keys in row]
        queries = q.detach().flatten(0, 1)
        found = [i.search(x, count).ids for i, x in zip(self.indices, queries, strict=True)]
        at = torch.stack(found).view(*q.shape[:3], count)
        # The n-th key that was added is the n-th slot in use.
        slots = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, None, None]
        chosen = slots.expand(*q.shape[:3], -1).gather(3, at.clamp(min=0))
        return chosen.masked_fill(at < 0, -1)

    def _index(self, keys: Tensor) -> nearest.Index:
        index = self.make(keys.shape[1])
        if isinstance(index, nearest.Faiss) and not index.index.is_trained:
            index.train(keys)
        index.add(keys)
        return index


@mechanism(
    Card(
        id="memorizing-transformer",
        name="Memorizing Transformers",
        kind="memory",
        family="retrieval",
        paper="Memorizing Transformers",
        cite="Wu et al., ICLR 2022",
        link="https://arxiv.org/abs/2203.08913",
        what="Looks up, among the stored keys and values of all earlier segments, those nearest to "
        "each query, and gates them into local attention.",
        modes={"causal", "step"},
        time="L*C*E + L*M*E + L*E*E",
        memory="M*E + C*E",
        tiny={"width": 24, "heads": 3, "window": 16, "segment": 24, "memory": 32},
        exact={
            "width": 24,
            "heads": 3,
            "window": 16,
            "segment": 24,
            "memory": 0,
            "cache": 0,
        },
    )
)
class MemorizingTransformer(Segmented):
    """y = g y_mem + (1 − g) y_loc, g = σ(b_h) (Sec. 3.1 and 3.2)

        y_mem = softmax(|a_h| q·K_top) V_top over the k nearest of the stored keys
        y_loc = softmax(|a_h| q·K + T5's bias) V over the last `window` keys, itself among them

    with q and k of length 1. A full segment's keys and values are stored after its queries looked
    up, without gradient and position; a row whose store is empty has g = 0. The state is the keys
    and values of `cache` tokens before the segment, the store and the open segment; resetting a row
    of it starts a document. In a language model, layers without a store are `memory=0`.

    Args:
        window: keys that y_loc sees. cache: how many of them may lie before the segment, by
            default all. segment: by default a window.
        memory, memory_eval: pairs stored in training and in evaluation. top: k.
        combine: `sum`, y_mem + y_loc; `joint`, one softmax over both.
        scale: a_h at the start. normalise: False leaves q·k / √D, as in the model of `adopt`.
        search: by default exact; `Indexed` looks up in an index, faiss's for example.

    Raises:
        LongspanError: sizes out of range, a way to combine that does not exist.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        head_width: int | None = None,
        window: int = 512,
        cache: int | None = None,
        segment: int | None = None,
        memory: int = 8192,
        memory_eval: int | None = None,
        top: int = 32,
        combine: Combining = "gate",
        scale: float = 1.0,
        normalise: bool = True,
        search: Search = nearest.search,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(segment=window if segment is None else segment)
        memory_eval = memory if memory_eval is None else memory_eval
        cache = window if cache is None else cache
        if min(window, top) < 1 or min(memory, memory_eval, cache) < 0:
            raise LongspanError(
                f"memorizing-transformer got window={window}, top={top}, cache={cache}, "
                f"memory={memory}, memory_eval={memory_eval}: the first two must be at least 1, "
                "the others at least 0."
            )
        if combine not in get_args(Combining):
            raise LongspanError(
                f"no way to combine '{combine}'; expected {', '.join(get_args(Combining))}."
            )
        self.window, self.cache, self.top, self.dropout = window, cache, top, dropout
        self.memory, self.memory_eval = memory, memory_eval
        self.combine, self.search = combine, search
        attention = build("multi-head-attention", causal=True)
        self.mixer = MultiHead(
            attention,
            width=width,
            heads=heads,
            head_width=head_width,
            position=Distances(heads),
            biases=False,
        )
        self.scale = nn.Parameter(torch.full((heads,), scale)) if normalise else None
        gated = combine == "gate" and max(memory, memory_eval) > 0
        self.gate = nn.Parameter(torch.zeros(heads)) if gated else None

    def adopt(self, mixer: MultiHead) -> "MemorizingTransformer":
        """Take the projections and positions of a softmax attention's layer; returns self."""
        if mixer.kv_heads != mixer.heads or mixer.heads != self.mixer.heads:
            raise LongspanError(
                f"a layer of {mixer.heads} heads over {mixer.kv_heads} of keys cannot have a "
                f"memory of {self.mixer.heads}: all three must be equal."
            )
        self.mixer = mixer
        return self

    def fresh(self, x: Inputs) -> Memory:
        mixer = self.mixer
        k, v = (
            x.new_zeros(x.shape[0], mixer.heads, 0, each)
            for each in (mixer.head_width, mixer.value_width)
        )
        nothing = Past(k, v, k.new_zeros(x.shape[0], 0, dtype=torch.bool))
        return Memory(nothing, nothing)

    def _heads(self, name: str, x: Tensor) -> Tensor:
        t = rearrange(self.mixer.project[name](x), "B L (H D) -> B H L D", H=self.mixer.heads)
        if self.scale is None or name == "v":
            return t
        return F.normalize(t, dim=-1)

    def read(
        self, memory: Memory, x: Tensor, seen: Tensor, asks: Tensor
    ) -> tuple[Tensor, Memory, Losses]:
        x = self.norm(x)
        q, k, v = (self._heads(name, x) for name in ("q", "k", "v"))
        q = q[:, :, x.shape[1] - asks.shape[1] :]
        if self.scale is None:
            sharp = q * q.shape[-1] ** -0.5
        else:
            sharp = q * self.scale.abs().to(q.dtype)[:, None, None]
        local = self._local(sharp, extended(_like(memory.local, k), k, v, seen))
        store = _like(memory.store, k)
        o = local[0]
        if store.keep.shape[1]:
            at = self.search(q, store.k, self.top, keep=store.keep)
            found = nearest.attend(sharp, store.k, store.v, at, scale=1.0)
            if self.combine == "joint":
                o = dense.merge([(local[0].to(local[1].dtype), local[1]), found])[0]
            elif self.gate is None:
                o = o + found[0]
            else:
                g = self.gate.sigmoid()[:, None] * (found[1] != -torch.inf)
                o = o + g[..., None] * (found[0] - o)
        return self.mixer.output(rearrange(o.to(v.dtype), "B H L V -> B L (H V)")), memory, {}

    def _local(self, q: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        position, k = self.mixer.position, past.k
        acts = frozenset() if position is None else position.acts
        if position is not None and "rotate" in acts:
            here = torch.arange(k.shape[2], device=k.device)
            q, k = position.rotate(q, here[k.shape[2] - q.shape[2] :]), position.rotate(k, here)

        def bias(q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
            far = pos_q[:, None] - pos_k >= self.window
            if position is None or "bias" not in acts:
                return q.new_zeros(1, 1, *far.shape).masked_fill(far, -torch.inf)
            return position.bias(q, k, pos_q, pos_k).masked_fill(far, -torch.inf)

        dropout = self.dropout if self.training else 0.0
        return dense.tiled(
            q, k, past.v, causal=True, keep=past.keep, bias=bias, dropout=dropout, scale=1.0
        )

    @torch.no_grad()
    def write(self, memory: Memory, x: Tensor, rows: Tensor) -> tuple[Memory, Losses]:
        x = self.norm(x)
        k, v = self._heads("k", x), self._heads("v", x)
        size = self.memory if self.training else self.memory_eval
        sizes = min(self.cache, self.window - 1), size
        pasts = (extended(_like(past, k), k, v, None) for past in memory)
        return Memory(*(_newest(p, n) for p, n in zip(pasts, sizes, strict=True))), {}


def _like(past: Past, k: Tensor) -> Past:
    if past.k.dtype == k.dtype:
        return past
    return Past(past.k.to(k.dtype), past.v.to(k.dtype), past.keep)


def _newest(past: Past, count: int) -> Past:
    start = max(past.keep.shape[1] - count, 0)
    return Past(past.k[:, :, start:], past.v[:, :, start:], past.keep[:, start:])
