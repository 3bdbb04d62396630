"""Memory-compressed attention and local attention blocks (Liu et al., 2018)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import dense, pattern, pool
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.nn.patterned import PatternAttention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


class Compressed(NamedTuple):
    """Every slot so far and which of them hold something, the last tokens, and how many came."""

    k: Float[Tensor, "B N E"]
    v: Float[Tensor, "B N E"]
    keep: Bool[Tensor, "B N"]
    k_before: Float[Tensor, "B P E"]
    v_before: Float[Tensor, "B P E"]
    seen: Int[Tensor, "B"]


State = Compressed | None


@mechanism(
    Card(
        id="memory-compressed-attention",
        name="Memory-compressed attention",
        kind="attention",
        family="convolution",
        paper="Generating Wikipedia by Summarizing Long Sequences",
        cite="Liu et al., ICLR 2018",
        link="https://arxiv.org/abs/1801.10198",
        what="Keys and values are shortened by a strided convolution before every query attends "
        "to them.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*S*D + L*S*V + S*D*E",
        memory="S*D + S*V",
        tiny={"heads": 3, "head_width": 8},
    )
)
class MemoryCompressedAttention(Attention):
    """o_i = softmax(q_i K_cᵀ / √D) V_c with K_c, V_c strided convolutions of K, V (Sec. 4.2.3).

    A slot holds Σ_t W_t k_{p − n + 1 + t} of n tokens, all heads' channels mixed, without additive
    parameters. Bidirectionally slot c covers the tokens from c s on, zeros behind the last.
    Causally it ends with its stride, at p = c s + s − 1, zeros before the first token, and is seen
    from there on: no query sees a slot with a later token in it. Queries may so early that there is
    no slot see a learned one that starts at 0. Tokens are counted where they may be seen. The state
    is every slot and the last n − 1 tokens.

    Args:
        factor: s. kernel: n, by default s. heads, head_width: of the keys and values.

    Raises:
        LongspanError: a factor or kernel below 1; inputs of other heads or widths.
    """

    def __init__(
        self,
        *,
        heads: int,
        head_width: int,
        causal: bool = False,
        factor: int = 3,
        kernel: int | None = None,
    ) -> None:
        super().__init__(causal=causal)
        kernel = factor if kernel is None else kernel
        if min(factor, kernel) < 1:
            raise LongspanError(
                f"memory-compressed-attention got factor={factor}, kernel={kernel}: "
                "give at least 1."
            )
        self.factor, self.kernel, self.heads = factor, kernel, heads
        width = heads * head_width
        self.compress = nn.ModuleDict(
            {name: nn.Linear(kernel * width, width, bias=False) for name in "kv"}
        )
        self.null = nn.Parameter(torch.zeros(2, heads, 1, head_width)) if causal else None

    def forward(
        self, q: Queries, k: Keys, v: Values, state: State = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, State]:
        if not q.numel():
            return q.new_zeros(*q.shape[:3], v.shape[3]), state
        if (k.shape[1], k.shape[3], v.shape[3]) != (self.heads, *(self._width(),) * 2):
            raise LongspanError(
                f"memory-compressed-attention was built for {self.heads} heads of width "
                f"{self._width()} and got keys {tuple(k.shape)} and values {tuple(v.shape)}."
            )
        x = [rearrange(t, "B H S D -> B S (H D)") for t in (k, v)]
        new = torch.full((len(k),), k.shape[2], device=k.device)
        place = torch.arange(k.shape[2], device=k.device)[None]
        if keep is not None:
            order, _ = pool.align(keep)
            x = [pool.rows(t.masked_fill(~keep[..., None], 0), order) for t in x]
            new, place = keep.sum(1), (keep.cumsum(1) - 1).clamp(min=0)
        if self.causal:
            even = keep is None and state is None and q.shape[2] == k.shape[2]
            return self._causal(q, x, new, place, state, even=even)
        count = -(-k.shape[2] // self.factor)
        slots = [pool.windows(t, count, self.kernel, self.factor) for t in x]
        has = None
        if keep is not None:
            has = torch.arange(count, device=k.device) * self.factor < new[:, None]
        k, v = self._slots(slots)
        return dense.attend(q, self._heads(k), self._heads(v), keep=has), None

    def _causal(
        self,
        q: Tensor,
        x: list[Tensor],
        new: Tensor,
        place: Tensor,
        state: Compressed | None,
        *,
        even: bool,
    ) -> tuple[Tensor, Compressed]:
        factor, batch, width = self.factor, len(q), x[0].shape[2]
        if state is None:
            none = x[0].new_zeros(batch, self.kernel - 1, width)
            no_slots = x[0].new_zeros(batch, 0, width)
            seen = torch.zeros_like(new)
            state = Compressed(
                no_slots, no_slots, none.new_zeros(batch, 0).bool(), none, none, seen
            )
        at = pool.place(state.seen, new, factor, last=factor - 1)
        befores = state.k_before, state.v_before
        (k, has, k_before), (v, _, v_before) = (
            pool.completed(before, t, at, factor) for before, t in zip(befores, x, strict=True)
        )
        k, v = self._slots([k, v])
        k, v, has = (torch.cat([old, t], 1) for old, t in zip(state[:3], (k, v, has), strict=True))
        seen = state.seen + new
        carried = Compressed(k, v, has, k_before, v_before, seen)
        # A row's slots are numbered among its own; a query sees those that ended before or at it.
        number = has.cumsum(1)
        ended = (state.seen[:, None] + place + 1) // factor  # (B|1) S
        number = torch.cat([number.new_zeros(batch, 1), number], 1)
        has = torch.cat([(seen > 0)[:, None], has], 1)
        offset, earlier = number.shape[1] - q.shape[2], ended.shape[1] - q.shape[2]
        assert self.null is not None
        null = self.null.to(k.dtype)[:, None].expand(-1, batch, -1, -1, -1)
        k, v = (torch.cat([n, self._heads(t)], 2) for n, t in zip(null, (k, v), strict=True))

        if even:
            return self._folded(q, k, v), carried

        def hide(q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
            late = number[:, None] > ended[:, pos_q - offset + earlier, None]
            return torch.zeros_like(late, dtype=q.dtype).masked_fill(late, -torch.inf)[:, None]

        return dense.tiled(q, k, v, keep=has, bias=hide)[0], carried

    def _folded(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All queries of a sequence: p + 1 = n s + r sees the null slot and n more.

        So the queries of one r are a causal attention of their own, as many as there are slots.
        """
        length, factor = q.shape[2], self.factor
        q = F.pad(q, (0, 0, 1, k.shape[2] * factor - length - 1))
        q = rearrange(q, "B H (N C) D -> B (H C) N D", C=factor)
        k, v = (t.repeat_interleave(factor, 1) for t in (k, v))
        o = rearrange(dense.attend(q, k, v, causal=True), "B (H C) N D -> B H (N C) D", C=factor)
        return o[:, :, 1 : length + 1]

    def _width(self) -> int:
        linear = self.compress["k"]
        assert isinstance(linear, nn.Linear)
        return linear.out_features // self.heads

    def _slots(self, windows: list[Tensor]) -> list[Tensor]:
        """W times each window B N C E: B N E."""
        return [self.compress[n](t.flatten(2)) for n, t in zip("kv", windows, strict=True)]

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "B N (H D) -> B H N D", H=self.heads)


@mechanism(
    Card(
        id="local-block-attention",
        name="Local attention blocks",
        kind="attention",
        family="sparse-pattern",
        paper="Generating Wikipedia by Summarizing Long Sequences",
        cite="Liu et al., ICLR 2018",
        link="https://arxiv.org/abs/1801.10198",
        what="The sequence is cut into blocks, and every token attends within its own.",
        modes={"bidirectional", "causal", "step"},
        time="L*C*D + L*C*V",
        memory="C*D + C*V",
        tiny={"block": 6},
        exact={"block": 1000000},
    )
)
def local_block_attention(*, causal: bool = False, block: int = 256) -> PatternAttention:
    """o_i = softmax(q_i Kᵀ / √D) V over the keys of i's block of `block` tokens (Sec. 4.2.2).

    The last block may be short. Nothing passes between blocks: the paper alternates these layers
    with memory-compressed ones (`models.dmca`).

    Raises:
        LongspanError: a block without tokens.
    """
    if block < 1:
        raise LongspanError(f"local-block-attention got block={block}: give at least 1 token.")
    sees = pattern.Window(0).blocks(block)
    return PatternAttention(
        sees & pattern.causal if causal else sees, causal=causal, reach=block, period=block
    )
