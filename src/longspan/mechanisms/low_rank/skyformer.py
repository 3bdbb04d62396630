"""Skyformer and kernelized attention (Chen et al., 2021)."""

import torch
from torch import Tensor

from longspan.card import Card
from longspan.engines import lowrank
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


@mechanism(
    Card(
        id="skyformer",
        name="Skyformer",
        kind="attention",
        family="low-rank",
        paper="Skyformer: Remodel Self-Attention with Gaussian Kernel and Nyström Method",
        cite="Chen et al., NeurIPS 2021",
        link="https://arxiv.org/abs/2111.00035",
        what="Replaces the softmax by a Gaussian kernel, approximated through a few sampled "
        "queries and keys.",
        modes={"bidirectional", "cross"},
        time="L*M*D + S*M*D",
        memory="M*D + M*V",
        tiny={"landmarks": 8},
    )
)
class Skyformer(Attention):
    """o = κ(q, Z) (κ(Z, Z) + γ I)⁻¹ κ(Z, k) v, κ(x, y) = exp(−|x − y|² / 2√D) (Eqs. 4 and 8).

    Z are M rows sampled from the queries and keys that are kept, half from each, with
    replacement: the n-th by the n-th number of a fixed draw, so that neither padding nor the rest
    of the batch changes it. There is no row normalisation. Where there are as many queries as
    keys, the mask is taken to be of both.

    Args:
        landmarks: M, even; None for kernelized attention itself, κ(q, k) v, at quadratic cost.
        ridge: γ. steps: of the iteration for the inverse (Sec. 4.3); None inverts exactly.
        accumulation: samples summed in each column of the sampling matrix.
        seed: of the draw. `redraw` draws anew, as the official code does in every forward.

    Raises:
        LongspanError: a causal form, which sampling rules out; numbers out of range.
    """

    one_form = (False, "it samples from later tokens; longspan.find(mode='causal') lists others")
    draws: Tensor

    def __init__(
        self,
        *,
        causal: bool = False,
        landmarks: int | None = 128,
        ridge: float = 0.1,
        steps: int | None = 6,
        accumulation: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(causal=causal)
        count = 2 if landmarks is None else landmarks
        if count < 2 or count % 2 or ridge < 0 or accumulation < 1 or steps == 0:
            raise LongspanError(
                f"skyformer got landmarks={landmarks}, ridge={ridge}, steps={steps}, "
                f"accumulation={accumulation}: expected an even number of landmarks, ridge >= 0, "
                "and at least 1 step and sample."
            )
        self.landmarks, self.ridge, self.steps = landmarks, ridge, steps
        draws = torch.empty(2, accumulation, count // 2, dtype=torch.long)
        self.register_buffer("draws", draws)
        self.redraw(torch.Generator().manual_seed(seed))

    def redraw(self, generator: torch.Generator) -> None:
        """Other landmarks from now on."""
        self.draws.copy_(torch.randint(1 << 31, self.draws.shape, generator=generator))

    def forward(
        self, q: Queries, k: Keys, v: Values, state: None = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, None]:
        own = keep if q.shape[2] == k.shape[2] else None
        if keep is not None:
            k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            qs, ks, vs = (t.to(wide) for t in (q, k, v))
            qs, ks = (t * q.shape[3] ** -0.25 for t in (qs, ks))
            if self.landmarks is None:
                return lowrank.gaussian(qs, ks[:, :, None], vs).to(v.dtype), None
            pairs = zip((qs, ks), self.draws, (own, keep), strict=True)
            z = torch.cat([lowrank.sampled(*pair) for pair in pairs], 3)
            inverse = lowrank.gaussian_inverse(z, self.ridge, self.steps)
            slots = inverse @ lowrank.gaussian_sums(z, ks, vs)
            return lowrank.gaussian(qs, z, slots).to(v.dtype), None
