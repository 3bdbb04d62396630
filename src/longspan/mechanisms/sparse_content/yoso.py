"""YOSO (Zeng et al., 2021)."""

import torch
import torch.nn.functional as F
from torch import nn

from longspan.card import Card
from longspan.engines import bucket
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


@mechanism(
    Card(
        id="yoso",
        name="YOSO",
        kind="attention",
        family="sparse-content",
        paper="You Only Sample (Almost) Once: Linear Cost Self-Attention Via Bernoulli Sampling",
        cite="Zeng et al., ICML 2021",
        link="https://arxiv.org/abs/2111.09714",
        what="Takes the probability that two tokens' hashes collide as their weight, and sums the "
        "values that do collide through hash tables.",
        modes={"bidirectional", "cross"},
        time="L*M*D*V",
        memory="C",
        tiny={"bits": 3, "rounds": 4},
    )
)
class Yoso(Attention):
    """Attention by collisions of hashes of `bits` signs (Sec. 3).

    For q, k of unit length, w_ij = (1 − arccos(q_i·k_j)/π)^τ is the probability that the signs of
    τ random projections agree. YOSO-E takes Y = W V; YOSO estimates it over m hashes,

        Y_i = 1/m Σ_a Σ_j [f_a(q_i) = f_a(k_j)] v_j                            (Eq. 4)

    by adding values into tables of 2^τ rows and reading them. Backward, its lower bound (τ/2) w
    stands for dw/dx (Eq. 11). Outputs have unit length (Sec. 3.3). Training draws hashes anew.

    Args:
        bits: τ. rounds: m; may be changed on the built module. seed: of the hashes in evaluation.
        expectation: YOSO-E. exact_gradient: of it, dw/dx itself.
        conv: taps of a depthwise convolution of v, a filter a head, added to outputs (YOSO-C).

    Raises:
        LongspanError: options that do not fit each other; a convolution across sequences.
    """

    one_form = (False, "use reformer-lsh-causal")

    def __init__(
        self,
        *,
        causal: bool = False,
        bits: int = 9,
        rounds: int = 32,
        expectation: bool = False,
        exact_gradient: bool = False,
        conv: int | None = None,
        heads: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(causal=causal)
        if not 0 <= bits <= 24 or rounds < 1 or (exact_gradient and not expectation):
            raise LongspanError(
                f"yoso got bits={bits}, rounds={rounds}, exact_gradient={exact_gradient}: expected "
                "0 to 24 bits, at least 1 round, an exact gradient with expectation=True alone."
            )
        self.bits, self.rounds, self.seed = bits, rounds, seed
        self.expectation, self.exact_gradient = expectation, exact_gradient
        self.conv = None
        if conv is not None:
            if heads is None or conv < 1:
                raise LongspanError(f"yoso got conv={conv}, heads={heads}: give both, at least 1.")
            self.conv = nn.Conv2d(heads, heads, (conv, 1), padding="same", groups=heads, bias=False)

    def forward(
        self, q: Queries, k: Keys, v: Values, state: None = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, None]:
        if keep is not None:
            k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
        wide = torch.promote_types(q.dtype, torch.float32)
        x, y = (F.normalize(t.to(wide), dim=-1) for t in (q, k))
        if self.expectation:
            o = bucket.expected(x, y, v.to(wide), bits=self.bits, exact=self.exact_gradient)
        else:
            generator = None if self.training else torch.Generator().manual_seed(self.seed)
            sizes = {"bits": self.bits, "rounds": self.rounds}
            o = bucket.sampled_by(x, y, v.to(wide), **sizes, generator=generator)
        o = F.normalize(o, dim=-1).to(q.dtype)
        if self.conv is not None and q.shape[2] != k.shape[2]:
            raise LongspanError(
                f"yoso's convolution of values got {q.shape[2]} queries for {k.shape[2]} keys: "
                "build it without conv for cross-attention."
            )
        return o if self.conv is None else o + self.conv(v), None
