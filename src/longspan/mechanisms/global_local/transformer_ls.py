"""Transformer-LS, the Long-Short Transformer (Zhu et al., 2021)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import dense, edges, lowrank, pattern, segment
from longspan.errors import LongspanError
from longspan.nn import Mixer
from longspan.nn.blockwise import alone
from longspan.nn.positions import at_least_float32, sinusoid
from longspan.nn.within import Within
from longspan.registry import mechanism
from longspan.shapes import Context, Inputs, Keep, Marks


class LongShort(Mixer):
    """What both forms have: the projections, P's and the two norms of DualLN.

    Raises:
        LongspanError: heads that do not divide the width; neither a window nor a rank.
    """

    def __init__(
        self, *, width: int, heads: int, window: int, rank: int, dual_norm: bool, biases: bool
    ) -> None:
        super().__init__()
        if width % heads or min(window, rank) < 0 or not window + rank:
            raise LongspanError(
                f"transformer-ls got width={width}, heads={heads}, window={window}, rank={rank}: "
                "heads must divide the width, and a window, a rank or both be at least 1."
            )
        self.heads, self.window, self.rank = heads, window, rank
        self.project = nn.ModuleDict({n: nn.Linear(width, width, biases) for n in "qkv"})
        self.output = nn.Linear(width, width, biases)
        self.near_norm = nn.LayerNorm(width) if dual_norm else nn.Identity()
        if rank:
            self.compress = nn.Linear(width, heads * rank, bias=False)  # a softmax cancels it
            self.far_norm = nn.LayerNorm(width) if dual_norm else nn.Identity()
        for linear in (*self.project.values(), self.output):
            assert isinstance(linear, nn.Linear)
            nn.init.xavier_uniform_(linear.weight)
            if biases:
                nn.init.zeros_(linear.bias)

    def split(self, x: Tensor) -> Tensor:
        """B L (H D) → B H L D."""
        return rearrange(x, "B L (H D) -> B H L D", H=self.heads)

    def summaries(self, scores: Tensor, x: Tensor) -> Tensor:
        """Pᵀ x of each head, P the softmax of scores (B L (H M)) over positions: B M (H D)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = self.split(scores).softmax(2, dtype=wide)
        return rearrange(lowrank.pooled(weights, self.split(x)).to(x.dtype), "B H M D -> B M (H D)")


class Bidirectional(LongShort, Within):
    """Windows and summaries of sequences and images, with global tokens before them."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        window: int,
        rank: int,
        dual_norm: bool,
        biases: bool,
        hubs: int,
        kernel: int | None,
        columns: int | None,
    ) -> None:
        super().__init__(
            width=width, heads=heads, window=window, rank=rank, dual_norm=dual_norm, biases=biases
        )
        if hubs < 0 or (kernel is not None and (kernel % 2 == 0 or columns is not None)):
            raise LongspanError(
                f"transformer-ls got hubs={hubs}, kernel={kernel}, columns={columns}: expected 0 "
                "or more, and an odd kernel, of sequences only."
            )
        self.hubs, self.columns = hubs, columns
        self.weight = self.table = None
        if kernel is not None:
            self.weight = nn.Parameter(torch.zeros(heads, kernel))
        if columns is not None and window:
            side = 2 * (window + window // 2) - 1
            self.table = nn.Parameter(torch.empty(heads, side, side))
            nn.init.trunc_normal_(self.table, std=0.02)

    def mix(self, x: Inputs, state: None, keep: Keep | None) -> tuple[Inputs, None]:
        if keep is None or self.columns is not None:
            return self.output(self._attend(x, keep)), None
        # Segments begin at a row's first token: each row stands alone.
        y = torch.zeros_like(x)
        for row, kept in enumerate(keep):
            at = kept.nonzero()[:, 0]
            mine = self.output(self._attend(x[row : row + 1].index_select(1, at), None))
            y = y.index_put((torch.full_like(at, row), at), mine[0])
        return y, None

    def _attend(self, x: Tensor, keep: Keep | None) -> Tensor:
        q, k, v = (self.project[name](x) for name in "qkv")
        k, v = self.near_norm(k), self.near_norm(v)
        hubs, length = min(self.hubs, x.shape[1]), x.shape[1] - self.hubs
        far_k, far_v = k[:, :hubs], v[:, :hubs]
        far_keep = None if keep is None else keep[:, :hubs]
        if self.rank and length > 0:
            scores = self.compress(x[:, hubs:])
            if keep is not None:
                scores = scores.masked_fill(~keep[:, hubs:, None], -torch.inf)
                some = keep[:, hubs:].any(1, keepdim=True)
                scores = scores.masked_fill(~some[..., None], 0)
                far_keep = torch.cat([keep[:, :hubs], some.expand(-1, self.rank)], 1)
            far_k, far_v = (
                torch.cat([far, self.far_norm(self.summaries(scores, t[:, hubs:]))], 1)
                for far, t in ((far_k, k), (far_v, v))
            )
        q, k, v, far_k, far_v = (self.split(t) for t in (q, k, v, far_k, far_v))
        k_hubs, v_hubs = k[:, :, :hubs], v[:, :, :hubs]
        k, v = k[:, :, hubs:], v[:, :, hubs:]
        near = None if keep is None else keep[:, hubs:]
        o = self._local(q[:, :, hubs:], k, v, far_k, far_v, near, far_keep)
        if hubs:
            whole = torch.cat([k_hubs, o], 2), torch.cat([v_hubs, o], 2)
            first = dense.attend(q[:, :, :hubs], *whole, keep=keep)
            o = torch.cat([first, o if self.weight is None else self._skip(o, v)], 2)
        elif self.weight is not None:
            o = self._skip(o, v)
        return rearrange(o, "B H L D -> B L (H D)")

    def _skip(self, o: Tensor, v: Tensor) -> Tensor:
        assert self.weight is not None
        return o + lowrank.depthwise(v, self.weight)

    def _local(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        far_k: Tensor,
        far_v: Tensor,
        keep: Keep | None,
        far_keep: Tensor | None,
    ) -> Tensor:
        length, window = q.shape[2], self.window
        columns = self.columns
        if columns is None:
            parts: list[tuple[dense.Layout, Tensor, Tensor]] = []
            if far_k.shape[2]:
                parts.append((dense.Whole(), far_k, far_v))
            if window and length:
                size = min(window, length)
                cut = pattern.Windows((1, length), (1, size), (0, min(window // 2, length)))
                parts.append((edges.Groups(cut, 0, cut.counts[1], causal=False), k, v))
            return dense.union(q, parts)[0] if parts else q
        if length % columns:
            raise LongspanError(
                f"{length} tokens do not fill rows of {columns} columns: give whole images, with "
                f"{self.hubs} global tokens before them."
            )
        none = q.new_zeros(1, 1, 1, far_k.shape[2])
        if far_keep is not None:
            none = none + dense.additive(far_keep, q.dtype)[:, None, None]
        pairs: list[tuple[pattern.Biased, Tensor, Tensor, Tensor]] = []
        if far_k.shape[2]:
            pairs.append((pattern.ByPair(pattern.everything), far_k, far_v, none))
        if self.table is not None:
            shape = (length // columns, columns)
            cut = pattern.Windows(shape, (window, window), (window // 2, window // 2))
            pairs.append((pattern.ByPlace(cut, keep), k, v, cut.by_offset(self.table)))
        return pattern.biased(q, pairs)


class Closed(NamedTuple):
    """Summaries of closed chunks, the last keys and values before the open chunk, and its tokens.

    far: keys and values, side by side, of projected and, with a segment, of hidden summaries.
    near: keys and values. open: k, v, P's scores and, with a segment, x. seen: tokens of each row.
    """

    far: Float[Tensor, "B M _"]
    far_keep: Bool[Tensor, "B M"]
    near: Float[Tensor, "B C _"]
    near_keep: Bool[Tensor, "B C"]
    open: Float[Tensor, "B N _"]
    seen: Int[Tensor, "B"]


class Causal(LongShort):
    """The last tokens and the summaries of closed chunks, by distance."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        window: int,
        rank: int,
        dual_norm: bool,
        biases: bool,
        chunk: int,
        segment: int | None,
        memory: int | None,
    ) -> None:
        super().__init__(
            width=width, heads=heads, window=window, rank=rank, dual_norm=dual_norm, biases=biases
        )
        sizes = [size for size in (segment, memory) if size is not None]
        if chunk < 1 or width % 2 or any(n < chunk or n % chunk for n in sizes):
            raise LongspanError(
                f"transformer-ls got width={width}, chunk={chunk}, segment={segment}, "
                f"memory={memory}: causally the width must be even, and segments and memory hold "
                "whole chunks of at least one token."
            )
        self.chunk, self.hidden = chunk, segment is not None and rank > 0
        self.together = (segment or chunk) // chunk
        self.behind = None if memory is None else memory // chunk
        if window:
            self.by_distance = nn.Linear(width, width, bias=False)
            self.content = nn.Parameter(torch.zeros(heads, width // heads))
            self.place = nn.Parameter(torch.zeros(heads, width // heads))
        if rank:
            self.by_chunk = nn.Linear(width, width)

    def forward(
        self,
        x: Inputs,
        state: Closed | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, Closed]:
        x, kept = alone(self, x, keep, context, marks)
        new = [self.project[name](x) for name in "kv"]
        new += [self.compress(x)] if self.rank else []
        new += [x] if self.hidden else []
        state = state or self._fresh(x, sum(t.shape[2] for t in new))
        if not x.shape[0]:
            return x, state
        rows = torch.cat([*new, self.project["q"](x)], 2)
        rows = torch.cat([F.pad(state.open, (0, x.shape[2])).to(x.dtype), rows], 1)
        opened = state.seen % self.chunk
        slots = torch.arange(state.open.shape[1], device=x.device)
        # From the left, every row begins with its open chunk: chunks are cut alike in all.
        rows, counts, places = segment.pack(rows, torch.cat([slots < opened[:, None], kept], 1))
        here = torch.arange(rows.shape[1], device=x.device) < counts[:, None]
        k, v, *rest, q = rows.split([*(t.shape[2] for t in new), x.shape[2]], 2)
        near = torch.cat([self.near_norm(k), self.near_norm(v)], 2).masked_fill(~here[..., None], 0)
        near = torch.cat([state.near.to(x.dtype), near], 1)
        near_keep = torch.cat([state.near_keep, here], 1)
        count = rows.shape[1] // self.chunk
        far, far_keep = state.far.to(x.dtype), state.far_keep
        past = far.shape[1]
        if self.rank and count:
            far = torch.cat([far, self._summarised(k, v, rest, count)], 1)
            full = torch.arange(count, device=x.device) < (counts // self.chunk)[:, None]
            far_keep = torch.cat([far_keep, full.repeat_interleave(self.rank, 1)], 1)
        start = int(opened.min())
        o = pattern.recent(
            self.split(q[:, start:]),
            start,
            self.chunk,
            self._near(near, near_keep),
            self._far(far, far_keep, past, state.seen // self.chunk) if self.rank else None,
        )
        y = self.output(rearrange(o, "B H L D -> B L (H D)"))
        if keep is not None or start < state.open.shape[1]:
            y = segment.unpack(y, places[:, state.open.shape[1] :] - start, kept)
        closed = counts // self.chunk
        if bool(closed.any()):
            first, size = closed[:, None] * self.chunk, state.near.shape[1]
            near, near_keep = _moved(near, near_keep, first, size)
            first = (closed - closed.max())[:, None] * self.rank
            far, far_keep = _moved(far, far_keep, first, far.shape[1])
            if self.behind is not None:
                first = max(0, far.shape[1] - (self.behind + self.together) * self.rank)
                far, far_keep = far[:, first:], far_keep[:, first:]
        else:
            near, near_keep = state.near, state.near_keep
        left, _ = segment.rest(rows[..., : -x.shape[2]], counts, self.chunk)
        return y, Closed(far, far_keep, near, near_keep, left, state.seen + kept.sum(1))

    def _fresh(self, x: Tensor, width: int) -> Closed:
        batch, _, each = x.shape
        none = x.new_zeros(batch, 0, 2 * each * (1 + self.hidden))
        near = x.new_zeros(batch, max(self.window - 1, 0), 2 * each)
        return Closed(
            none,
            none[..., 0] > 0,
            near,
            near[..., 0] > 0,
            x.new_zeros(batch, 0, width),
            x.new_zeros(batch, dtype=torch.long),
        )

    def _summarised(self, k: Tensor, v: Tensor, rest: list[Tensor], count: int) -> Tensor:
        """Of each whole chunk, the normalised keys and values."""

        def chunks(x: Tensor) -> Tensor:
            return x[:, : count * self.chunk].unflatten(1, (count, -1)).flatten(0, 1)

        scores = chunks(rest[0])
        found = [self.summaries(scores, chunks(t)) for t in (k, v)]
        if self.hidden:
            inner = self.summaries(scores, chunks(rest[1]))
            found += [self.project[name](inner) for name in "kv"]
        far = torch.cat([self.far_norm(t) for t in found], 2)
        return far.unflatten(0, (-1, count)).flatten(1, 2)

    def _near(self, near: Tensor, keep: Tensor) -> pattern.Near:
        k, v = (self.split(t) for t in near.chunk(2, 2))
        if not self.window:  # keys that nobody sees
            none = k.new_zeros(self.heads, 1, k.shape[3])
            return pattern.Near(k, v, torch.zeros_like(keep), none, none[:, 0], none[:, 0])
        table = self._waves(self.by_distance, self.window)
        return pattern.Near(k, v, keep, table, self.content, self.place)

    def _far(self, far: Tensor, keep: Tensor, past: int, closed: Tensor) -> pattern.Far:
        """`past` of them stood before the first open chunk, and `closed` chunks of each row."""
        at = torch.arange(far.shape[1], device=far.device) - past
        chunk = at.div(self.rank, rounding_mode="floor") + closed[:, None]  # from the row's first
        border = (chunk // self.together + 1) * self.together
        last = torch.full_like(border, pattern.ALL)
        if self.behind is not None:
            last = ((chunk + self.behind) // self.together + 1) * self.together
        ranges = [(border, last)]
        if self.hidden:
            ranges.insert(0, (chunk + 1, border))
        shown = [
            torch.stack(sides, 2).flatten(1) - closed[:, None]
            for sides in zip(*ranges, strict=True)
        ]
        count = len(ranges)
        keep, at = keep.repeat_interleave(count, 1), at.repeat_interleave(count)
        k, v = (
            self.split(torch.stack(far.chunk(2 * count, 2)[i::2], 2).flatten(1, 2)) for i in (0, 1)
        )
        most = far.shape[1] + self.rank
        table = self._waves(self.by_chunk, most)
        return pattern.Far(k, v, at, shown[0], shown[1].masked_fill(~keep, -1), self.rank, table)

    def _waves(self, linear: nn.Linear, count: int) -> Tensor:
        """H N D, by distances 0 … N − 1."""
        wide = at_least_float32(linear.weight)
        at = torch.arange(count, device=linear.weight.device)
        waves = sinusoid(at, linear.in_features, layout="concatenated", dtype=wide)
        bias = None if linear.bias is None else linear.bias.to(wide)
        return self.split(F.linear(waves, linear.weight.to(wide), bias)[None])[0]


def _moved(t: Tensor, keep: Tensor, first: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`size` entries of each row from `first` (B 1) on, nothing before entry 0."""
    if bool((first == first[0]).all()) and 0 <= int(first[0]) <= t.shape[1] - size:
        here = slice(int(first[0]), int(first[0]) + size)
        return t[:, here], keep[:, here]
    at = first + torch.arange(size, device=t.device)
    kept = (at >= 0) & keep.gather(1, at.clamp(min=0))
    return segment.unpack(t, at, kept), kept


@mechanism(
    Card(
        id="transformer-ls",
        name="Transformer-LS (Long-Short Transformer)",
        kind="mixer",
        family="global-local",
        paper="Long-Short Transformer: Efficient Transformers for Language and Vision",
        cite="Zhu et al., NeurIPS 2021",
        link="https://arxiv.org/abs/2107.02192",
        what="Every token sees the tokens near it and summaries of all, whose weights depend on "
        "the input.",
        modes={"bidirectional", "causal", "step"},
        time="L*C*E + L*E*E + L*L*E",
        memory="C*E + L*E",
        tiny={"width": 24, "heads": 3, "window": 6, "rank": 2, "chunk": 4},
    )
)
def transformer_ls(
    *,
    width: int,
    heads: int,
    causal: bool = False,
    window: int = 512,
    rank: int = 1,
    dual_norm: bool = True,
    biases: bool = True,
    hubs: int = 0,
    kernel: int | None = None,
    columns: int | None = None,
    chunk: int = 16,
    segment: int | None = None,
    memory: int | None = None,
) -> LongShort:
    """o_i = softmax(q_i [K_near ; K̄]ᵀ / √D) [V_near ; V̄], K̄ = LN_far(Pᵀ K)            (Sec. 3)

    with P = softmax over positions of X W_P, `rank` columns a head, and K = LN_near(X W_K) of all
    heads together, V likewise under the same norms (DualLN).

    Bidirectionally near are a query's segment of `window` tokens and ⌊window / 2⌋ on both sides,
    and cost is linear. With `columns` tokens are an image: windows of window² cells with ⌊window /
    2⌋ around, and a learned bias by offset. The first `hubs` tokens are global: the others see
    them, and they see each other and the others' outputs, as keys and values.

    Causally near are the last `window` tokens, and each chunk of `chunk` is summarised, unnormed,
    for queries of later chunks. With R, R̄ linear in the sinusoids of the distance,

        score_ij = q_i·k_j / √D + u·k_j + (q_i / √D + v)·R_{i−j},   q_i·(k̄_m + R̄_{i−m}) / √D

    where distances between chunks count summaries. Chunks count kept tokens. State: `Closed`.

    Departures from the released code: its table of offsets gives several the same entry; there the
    global token of a sequence is normed by LN_far, here as in images by LN_near.

    Args:
        window: w; 0 for summaries alone. rank: r; 0 for the window alone.
        dual_norm: the norms; else none. biases: of the projections but R.
        kernel: adds a convolution of the values, odd, from 0 on (bidirectional sequences).
        columns: of an image, in raster order behind the global tokens.
        segment: earlier segments of so many tokens are remembered by summaries of the layer's
            inputs, projected afterwards; by default by the same as within a segment.
        memory: tokens that are summarised at most, before a segment (or a chunk).

    Raises:
        LongspanError: sizes that do not fit each other, global tokens, kernels or columns where
            causal, segments or memory where not.
    """
    shared = {"width": width, "heads": heads, "window": window, "rank": rank}
    norms = {"dual_norm": dual_norm, "biases": biases}
    if causal:
        if hubs or kernel is not None or columns is not None:
            raise LongspanError(
                "transformer-ls has global tokens, a kernel and columns only without causality: "
                "leave hubs, kernel and columns out."
            )
        return Causal(**shared, **norms, chunk=chunk, segment=segment, memory=memory)
    if segment is not None or memory is not None:
        raise LongspanError(
            "transformer-ls remembers segments only where causal: leave segment and memory out."
        )
    return Bidirectional(**shared, **norms, hubs=hubs, kernel=kernel, columns=columns)
