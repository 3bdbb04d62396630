"""Nyströmformer (Xiong et al., 2021)."""

from typing import Literal, get_args

import torch
from torch import Tensor

from longspan.card import Card
from longspan.engines import dense, lowrank
from longspan.errors import LongspanError
from longspan.nn.values import ValueConvolution
from longspan.registry import mechanism
from longspan.shapes import Keep

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
class Nystromformer(ValueConvolution):
    """o = F A⁺ (B v) + conv(v), F = softmax(q k̃ᵀ), A = softmax(q̃ k̃ᵀ), B = softmax(q̃ kᵀ) (Eq. 13).

    q̃ and k̃ are the means of M contiguous segments of queries and keys, all scores divided by √D.
    Segments are cut over kept tokens and differ by at most one token. A row with no more than M
    keys (or, from another sequence, queries) gets softmax attention itself. Where there are as
    many queries as keys, the mask is taken to be of both.

    Args:
        landmarks: M.
        kernel: odd width of the convolution of values, a kernel a head (needs `heads`), or None.
        steps: of the iteration for A⁺ (Sec. 3.3).
        inverse: `iterative`, `iterative-together` (one starting scale for the whole batch, as in
            the first release: rows then depend on each other), or `exact`.

    Raises:
        LongspanError: a causal form; options that do not exist or fit; another number of heads.
    """

    one_form = (False, "it averages later tokens; longspan.find(mode='causal') lists others")

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
        super().__init__(causal=causal, kernel=kernel, heads=heads)
        if inverse not in get_args(Inverse):
            raise LongspanError(f"no inverse '{inverse}'; expected {', '.join(get_args(Inverse))}.")
        if landmarks < 1 or steps < 1:
            raise LongspanError(
                f"nystromformer got landmarks={landmarks}, steps={steps}: expected 1 or more."
            )
        self.landmarks, self.steps, self.inverse = landmarks, steps, inverse

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Keep | None) -> Tensor:
        m, own = self.landmarks, q.shape[2] == k.shape[2]
        if k.shape[2] <= m or (q.shape[2] <= m and not own):
            return dense.attend(q, k, v, keep=keep)
        q_means, q_sizes = lowrank.segment_means(q, m, keep if own else None)
        k_means, k_sizes = lowrank.segment_means(k, m, keep)
        seen = None if keep is None else k_sizes > 0
        mixed = dense.attend(q_means, k, v, keep=keep)
        live = (q_sizes > 0)[:, None, :, None] & (k_sizes > 0)[:, None, None]
        a = dense.explicit(q_means, k_means, k_means, seen=live)[1]
        if self.inverse == "exact":
            z = torch.linalg.pinv(a)
        else:
            z = lowrank.inverse(a, self.steps, together=self.inverse == "iterative-together")
        with torch.autocast(q.device.type, enabled=False):
            slots = (z @ mixed.to(z.dtype)).to(v.dtype)
        if keep is not None:
            # At most M keys are their own landmarks, and F is the whole softmax.
            few = (keep.sum(1) <= m)[:, None, None, None]
            slots = torch.where(few, lowrank.segment_means(v, m, keep)[0], slots)
        return dense.attend(q, k_means, slots, keep=seen)
