"""Relative position encoding of Transformer-XL (Dai et al., 2019)."""

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines.distance import shift
from longspan.errors import LongspanError
from longspan.nn import Position
from longspan.nn.positions import at_least_float32, sinusoid
from longspan.registry import mechanism
from longspan.shapes import Keys, Queries


@mechanism(
    Card(
        id="transformer-xl-relative-position",
        name="Transformer-XL relative position encoding",
        kind="position",
        family="position",
        paper="Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context",
        cite="Dai et al., ACL 2019",
        link="https://arxiv.org/abs/1901.02860",
        what="Scores each key also by a learned reading of its distance from the query.",
        modes={"bidirectional", "causal", "step"},
        time="L*S*D + L*D*E + S*D*E",
        memory="L*S + S*D",
        tiny={"width": 24, "heads": 3, "head_width": 8},
    )
)
class TransformerXLRelativePosition(Position):
    """bias_ij = (u·k_j + (q_i + v)·r_{i−j}) / √D with r = R W_kR, so that with q_i·k_j / √D

        score_ij = ((q_i + u)·k_j + (q_i + v)·r_{i−j}) / √D                          (Sec. 3.3)

    R are sinusoids of width E, sines then cosines. Distances are two-sided (XLNet), so it serves
    with and without a causal mask. Positions must be consecutive and ascending, as an attention
    hands them; its scale must be 1/√D, the default.

    The paper has one u and v for all layers and a W_kR for each: `share` does that. One instance
    given to several layers shares W_kR too; separate instances are untied.

    Args:
        width: E, of R. heads: H. head_width: D.
        clamp_len: distances beyond it count as it, on both sides.

    Raises:
        LongspanError: a negative clamp_len.
    """

    acts = frozenset({"bias"})

    def __init__(
        self, *, width: int, heads: int, head_width: int, clamp_len: int | None = None
    ) -> None:
        super().__init__()
        if clamp_len is not None and clamp_len < 0:
            raise LongspanError(f"clamp_len is {clamp_len}; expected a distance of at least 0.")
        self.width, self.clamp_len = width, clamp_len
        self.u = nn.Parameter(torch.empty(heads, head_width))
        self.v = nn.Parameter(torch.empty(heads, head_width))
        self.project = nn.Linear(width, heads * head_width, bias=False)
        for weight in (self.u, self.v, self.project.weight):
            nn.init.normal_(weight, std=0.02)

    def share(self, first: "TransformerXLRelativePosition") -> "TransformerXLRelativePosition":
        """Take u and v of another layer as one's own; returns self."""
        if first.u.shape != self.u.shape:
            raise LongspanError(
                f"u and v are {tuple(first.u.shape)} in one layer and {tuple(self.u.shape)} in "
                "the other: only layers of equal heads and head_width share them."
            )
        self.u, self.v = first.u, first.v
        return self

    def bias(
        self, q: Queries, k: Keys, pos_q: Int[Tensor, "L"], pos_k: Int[Tensor, "S"]
    ) -> Float[Tensor, "B H L S"]:
        (length, width), keys = q.shape[2:], k.shape[2]
        if not length or not keys:
            return q.new_zeros(*q.shape[:3], keys)
        wide = at_least_float32(q)
        steps = torch.arange(length + keys - 1, device=q.device)
        # From the last query and the first key down: the largest distance comes first.
        r = self._relative(pos_q[-1] - pos_k[0] - steps, wide)
        q, k, u, v = (t.to(wide) for t in (q, k, self.u, self.v))
        by_distance = einsum(q + v[:, None], r, "B H L D, H N D -> B H L N")
        return (
            shift(by_distance)[..., :keys] + einsum(u, k, "H D, B H S D -> B H S")[:, :, None]
        ) / width**0.5

    def _relative(self, distance: Int[Tensor, "N"], wide: torch.dtype) -> Float[Tensor, "H N D"]:
        if self.clamp_len is not None:
            distance = distance.clamp(-self.clamp_len, self.clamp_len)
        waves = sinusoid(distance, self.width, layout="concatenated", dtype=wide)
        r = self.project(waves.to(self.project.weight.dtype))
        return rearrange(r, "N (H D) -> H N D", H=len(self.u)).to(wide)
