"""XLNet's two-stream attention (Yang et al., 2019)."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import relative, segment
from longspan.errors import LongspanError
from longspan.registry import mechanism
from longspan.shapes import Inputs

Seen = Bool[Tensor, "#B _ S"]


@mechanism(
    Card(
        id="xlnet",
        name="XLNet (permutation language model, two-stream attention)",
        kind="architecture",
        family="recurrent-memory",
        paper="XLNet: Generalized Autoregressive Pretraining for Language Understanding",
        cite="Yang et al., NeurIPS 2019",
        link="https://arxiv.org/abs/1906.08237",
        what="Predicts tokens in random orders: a second stream of queries knows where a token "
        "stands but not what it is.",
        modes={"bidirectional", "causal", "step"},
        time="L*S*D + L*E*E + S*E*E",
        memory="M*E",
        tiny={"width": 24, "heads": 3},
    )
)
class TwoStream(nn.Module):
    """Attention of both streams by the same weights, over [SG(memory) ; h] (Sec. 2.3 and 2.4).

        h_t ← Attn(q = h_t, kv = h_≤t)        g_t ← Attn(q = g_t, kv = h_<t)

        A_ij = (q_i + u)·k_j + (q_i + v)·r_{i−j} + (q_i + b)·s_ij,   s same or another segment

    What ≤ and < mean is for the masks to say; distances are two-sided. A query that sees nothing
    gives 0, where the released code would give the mean of all it must not see. `models.xlnet`
    puts it into a model.

    Args:
        clamp_len: distances beyond it count as it.

    Raises:
        LongspanError: a width that does not divide, a negative clamp_len.
    """

    def __init__(
        self, *, width: int, heads: int, clamp_len: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if width % heads or width % 2:
            raise LongspanError(f"width {width} must be even and divide into {heads} heads.")
        if clamp_len is not None and clamp_len < 0:
            raise LongspanError(f"clamp_len is {clamp_len}; expected a distance of at least 0.")
        self.width, self.heads, self.clamp_len = width, heads, clamp_len
        self.project = nn.ModuleDict({n: nn.Linear(width, width, bias=False) for n in "qkvr"})
        self.output = nn.Linear(width, width, bias=False)
        # u, v, b of the scores by content, distance and segment; then s_same and s_other.
        self.leans = nn.Parameter(torch.randn(3, heads, width // heads) * 0.02)
        self.segments = nn.Parameter(torch.randn(2, heads, width // heads) * 0.02)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        h: Inputs,
        g: Float[Tensor, "B T E"] | None = None,
        *,
        memory: segment.Queue,
        seen: Seen,
        seen_g: Seen | None = None,
        at: Int[Tensor, "B T"] | None = None,
        other: Seen | None = None,
        backwards: Bool[Tensor, "B"] | None = None,
    ) -> tuple[Inputs, Float[Tensor, "B T E"] | None]:
        """What both streams read.

        Args:
            seen, seen_g: keys that each query may see, of memory and segment. at: places of g.
            other: keys of another segment than each token of h. backwards: rows in reverse order.
        """
        whole = torch.cat([memory.items.to(h.dtype), h], 1)
        k, v = self._heads("k", whole), self._heads("v", whole)
        count, past = whole.shape[1], memory.items.shape[1]
        distance = torch.arange(1 - count, count, device=h.device)
        if self.clamp_len is not None:
            distance = distance.clamp(-self.clamp_len, self.clamp_len)
        waves = torch.cat(relative.waves(distance, self.width), -1).to(h.dtype)
        r = self._heads("r", waves[None])[0]
        here = torch.arange(h.shape[1], device=h.device)[None]
        flip = torch.ones(len(h), 1, 1, dtype=torch.long, device=h.device)
        if backwards is not None:
            flip = torch.where(backwards[:, None, None], -flip, flip)

        def read(x: Tensor, places: Tensor, seen: Tensor, other: Tensor | None) -> Tensor:
            q, (u, w, b) = self._heads("q", x), self.leans[:, :, None]
            far = flip * (past + places[..., None] - torch.arange(count, device=x.device))
            scores = (q + u) @ k.mT
            by_distance = (q + w) @ r.mT
            index = (far + count - 1)[:, None].expand_as(scores)
            scores = scores + by_distance.gather(3, index)
            if other is not None:
                same, differs = (
                    torch.einsum("bhqd,hd->bhq", q + b, s)[..., None] for s in self.segments
                )
                scores = scores + torch.where(other[:, None], differs, same)
            dead = ~seen.any(-1)[:, None, :, None]
            scores = (scores / q.shape[-1] ** 0.5).masked_fill(~seen[:, None], -torch.inf)
            weights = scores.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0)
            o = self.dropout(weights) @ v
            return self.output(rearrange(o, "B H Q D -> B Q (H D)"))

        y = read(h, here, seen, other)
        if g is None or at is None or seen_g is None:
            return y, None
        if other is not None:
            other = other.gather(1, at[..., None].expand(-1, -1, count))
        return y, read(g, at, seen_g, other)

    def _heads(self, name: str, x: Tensor) -> Tensor:
        return rearrange(self.project[name](x), "B L (H D) -> B H L D", H=self.heads)
