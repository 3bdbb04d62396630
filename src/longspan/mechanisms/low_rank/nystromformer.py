"""Nyströmformer (Xiong et al., 2021)."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import dense, lowrank
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values

Inverse = Literal["iterative", "iterative-together", "exact"]


@mechanism(
    Card(
        id="nystromformer",
        name="Nyströmformer",
        kind="attention",
        family="low-rank",
        paper="Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention",
        cite="Xiong et al., AAAI 2021",
        link="https://arxiv.org/abs/2102.03902",
        what="Approximates softmax attention through the means of a few segments of queries and "
        "keys.",
        modes={"bidirectional", "cross"},
        time="L*M*D + S*M*D",
        memory="M*D + M*V",
        tiny={"landmarks": 8},
        exact={"landmarks": 64},
    )
)
class Nystromformer(Attention):
    """o = F A⁺ (B v) + conv(v), F = softmax(q k̃ᵀ), A = softmax(q̃ k̃ᵀ), B = softmax(q̃ kᵀ) (Eq. 13).

    q̃ and k̃ are the means of M contiguous segments of queries and keys, all scores divided by √D.
    Segments are cut over kept tokens and differ by at most one token. A row with no more than M
    keys (or, from another sequence, queries) gets softmax attention itself. Where there are as
    many queries as keys, the mask is taken to be of both.

    Args:
        landmarks: M.
        kernel: odd width of the convolution over each head's values, with a kernel a head; None
            for no convolution.
        heads: needed for the convolution.
        steps: of the iteration for A⁺ (Sec. 3.3).
        inverse: `iterative`, `iterative-together` (one starting scale for the whole batch, as in
            the first release: rows then depend on each other), or `exact`.

    Raises:
        LongspanError: a causal form, which segment means rule out; options that do not exist or
            fit; another number of heads.
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        landmarks: int = 64,
        kernel: int | None = None,
        heads: int | None = None,
        steps: int = 6,
        inverse: Inverse = "iterative",
    ) -> None:
        super().__init__(causal=causal)
        if causal:
            raise LongspanError(
                "nystromformer averages later tokens too and has no causal form: use another "
                'mechanism; longspan.find(mode="causal") lists them.'
            )
        if inverse not in get_args(Inverse):
            raise LongspanError(
                f"nystromformer has no inverse '{inverse}'; expected "
                f"{', '.join(get_args(Inverse))}."
            )
        if landmarks < 1 or steps < 1:
            raise LongspanError(
                f"nystromformer got landmarks={landmarks}, steps={steps}: expected 1 or more."
            )
        if kernel is not None and (heads is None or kernel % 2 == 0):
            raise LongspanError(
                f"nystromformer got kernel={kernel}, heads={heads}: its convolution needs an odd "
                "kernel and the number of heads."
            )
        self.landmarks, self.steps, self.inverse = landmarks, steps, inverse
        self.weight = None
        if kernel is not None and heads is not None:
            self.weight = nn.Parameter(torch.empty(heads, kernel))
            nn.init.uniform_(self.weight, -(kernel**-0.5), kernel**-0.5)  # as nn.Conv2d does

    def forward(
        self, q: Queries, k: Keys, v: Values, state: None = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, None]:
        if keep is not None:
            k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
        o = self._attend(q, k, v, keep)
        if self.weight is not None:
            if q.shape[2] != k.shape[2] or q.shape[1] != self.weight.shape[0]:
                raise LongspanError(
                    f"nystromformer's convolution adds values to queries, one kernel a head, and "
                    f"got {q.shape[2]} queries, {k.shape[2]} keys and {q.shape[1]} heads: build "
                    f"it with kernel=None or heads={q.shape[1]}."
                )
            o = o + lowrank.depthwise(v, self.weight)
        return o, None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Keep | None) -> Tensor:
        m, own = self.landmarks, q.shape[2] == k.shape[2]
        if k.shape[2] <= m or (q.shape[2] <= m and not own):
            return dense.attend(q, k, v, keep=keep)
        q_means, q_sizes = lowrank.segment_means(q, m, keep if own else None)
        k_means, k_sizes = lowrank.segment_means(k, m, keep)
        seen = None if keep is None else k_sizes > 0
        mixed = dense.attend(q_means, k, v, keep=keep)
        live = (q_sizes > 0)[:, None, :, None] & (k_sizes > 0)[:, None, None]
        a = dense.explicit(q_means, k_means, k_means, seen=live)[1]
        z = (
            torch.linalg.pinv(a)
            if self.inverse == "exact"
            else lowrank.inverse(a, self.steps, together=self.inverse == "iterative-together")
        )
        with torch.autocast(q.device.type, enabled=False):
            slots = (z @ mixed.to(z.dtype)).to(v.dtype)
        if keep is not None:
            # At most M keys are their own landmarks, and F is the whole softmax.
            few = (keep.sum(1) <= m)[:, None, None, None]
            slots = torch.where(few, lowrank.segment_means(v, m, keep)[0], slots)
        return dense.attend(q, k_means, slots, keep=seen)
