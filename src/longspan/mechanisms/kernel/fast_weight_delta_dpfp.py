"""Fast weight programmers with DPFP features and the delta rule (Schlag et al., 2021)."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import features as feature
from longspan.engines import scan
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


class FastWeights(NamedTuple):
    """Wᵀ (B H M V), and under attention normalisation z (B H M)."""

    weights: Tensor
    z: Tensor | None


@mechanism(
    Card(
        id="fast-weight-delta-dpfp",
        name="Delta-rule fast weights with DPFP",
        kind="attention",
        family="kernel",
        paper="Linear Transformers Are Secretly Fast Weight Programmers",
        cite="Schlag et al., ICML 2021",
        link="https://arxiv.org/abs/2102.11174",
        what="Each token corrects what a matrix retrieves for its key, instead of adding to it.",
        modes={"causal", "step"},
        time="L*D*V",
        memory="D*V",
        tiny={"heads": 3, "head_width": 8, "nu": 1},
    )
)
class FastWeightDelta(Attention):
    """W_i = W_{i−1} + β_i (v_i − W_{i−1} φ(k_i)) φ(k_i)ᵀ and y_i = W_i φ(q_i) (Eqs. 21 to 24).

    DPFP-ν: φ(x) = concat_s r ∘ roll(r, s), r = relu([x; −x]), s = 1 … ν (Eq. 37). `sum` divides φ
    by the sum of its entries (Eq. 25); `attention` divides what is retrieved by z·φ, with z the
    sum of the φ(k) so far (App. A.2). β_i = sigmoid(w_β·x_i) of a head: x_i is a projection
    `rate`, which starts as a copy of the keys'; without one, the keys.

    Args:
        kernel: dpfp, elu (+1), favor (positive random features), or a non-negative map.
        rule: delta, or sum (W_i = W_{i−1} + v_i φ(k_i)ᵀ).
        scale: of the read-out; the released layers have 1/√D.
        redraw_every: of favor's directions, in training calls.

    Raises:
        LongspanError: causal=False, an unknown option, favor without sum normalisation.
    """

    def __init__(
        self,
        *,
        heads: int,
        head_width: int,
        causal: bool = True,
        kernel: Literal["dpfp", "elu", "favor"] | Callable[[Tensor], Tensor] = "dpfp",
        nu: int = 3,
        features: int = 64,
        rule: Literal["delta", "sum"] = "delta",
        normalise: Literal["sum", "attention"] | None = "sum",
        scale: float = 1.0,
        seed: int = 0,
        redraw_every: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(causal=causal)
        known = {"kernel": ("dpfp", "elu", "favor"), "rule": ("delta", "sum")}
        for name, value in (("kernel", kernel), ("rule", rule)):
            if isinstance(value, str) and value not in known[name]:
                raise LongspanError(f"no {name} '{value}'; expected {', '.join(known[name])}.")
        if normalise not in ("sum", "attention", None) or not causal or nu < 1:
            raise LongspanError(
                f"fast-weight-delta-dpfp got normalise={normalise}, causal={causal}, nu={nu}: "
                "expected sum, attention or None, causal=True, and 1 or more."
            )
        if kernel == "favor" and normalise != "sum":
            raise LongspanError("favor's features have no fixed unit: leave normalise='sum'.")
        self.kernel, self.nu, self.rule, self.normalise = kernel, nu, rule, normalise
        self.scale, self.eps = scale, eps
        self.size = {"dpfp": 2 * head_width * nu, "favor": features}.get(str(kernel), head_width)
        self.directions = None
        if kernel == "favor":
            self.directions = feature.Directions(
                features, head_width, seed=seed, redraw_every=redraw_every
            )
        self.rate = None
        if rule == "delta":
            self.extra = {"rate": "k"}
            drawn = torch.randn(heads, head_width, generator=torch.Generator().manual_seed(seed))
            self.rate = nn.Parameter(drawn * head_width**-0.5)

    def features(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """φ(x), under `sum` normalisation divided by its sum."""
        if rows is not None:
            x = feature.positive(x * x.shape[-1] ** -0.25, rows)[0]
        elif self.kernel == "dpfp":
            x = feature.dpfp(x, self.nu)
        else:
            x = self.kernel(x) if callable(self.kernel) else F.elu(x) + 1
        return x / (x.sum(-1, keepdim=True) + self.eps) if self.normalise == "sum" else x

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: FastWeights | None = None,
        *,
        keep: Keep | None = None,
        rate: Keys | None = None,
    ) -> tuple[Outputs, FastWeights]:
        earlier = k.shape[2] - q.shape[2]
        run = partial(self.piece, None if self.directions is None else self.directions())
        tokens = F.pad(q, (0, 0, earlier, 0)), k, v, k if rate is None else rate, keep
        outs: list[Tensor] = []
        for piece, again in feature.pieces(tokens, self.size):
            o, state = again(run, *piece, state)
            outs.append(o)
        assert state is not None
        return torch.cat(outs, 2)[:, :, earlier:], state

    def piece(
        self,
        rows: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        keep: Tensor | None,
        state: FastWeights | None,
    ) -> tuple[Tensor, FastWeights]:
        """Some tokens after `state`, all in at least float32."""
        wide, dtype = torch.promote_types(q.dtype, torch.float32), q.dtype
        with torch.autocast(q.device.type, enabled=False):
            q, k, v, x = (t.to(wide) for t in (q, k, v, x))
            unseen = None if keep is None else ~keep[:, None, :, None]
            if unseen is not None:
                k, v, x = (t.masked_fill(unseen, 0) for t in (k, v, x))
            q, k = self.features(q, rows), self.features(k, rows)
            k = k if unseen is None else k.masked_fill(unseen, 0)
            weights, z = (None, None) if state is None else state
            erase, below = k, None
            if self.normalise == "attention":
                sums = k.cumsum(2) if z is None else k.cumsum(2) + z[:, :, None]
                # What a first key erases is 0 whatever divides it.
                erase = k / ((sums - k) * k).sum(-1, keepdim=True).clamp(min=self.eps)
                below, z = (sums * q).sum(-1, keepdim=True).clamp(min=self.eps), sums[:, :, -1]
            if self.rate is None:
                o, weights = scan.outer(q, k, v, weights)
            else:
                rate = torch.sigmoid((x * self.rate[:, None].to(wide)).sum(-1))
                o, weights = scan.delta(q, k, v, rate, weights, erase=erase)
            o = o if below is None else o / below
            return (o * self.scale).to(dtype), FastWeights(weights, z)
