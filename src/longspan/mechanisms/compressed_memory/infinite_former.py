"""∞-former (Martins et al., 2021)."""

from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import continuous
from longspan.errors import LongspanError
from longspan.nn import Mixer, blockwise
from longspan.nn.auxiliary import report
from longspan.registry import mechanism
from longspan.shapes import Context, Inputs, Keep, Marks


class Signal(NamedTuple):
    """The coefficients B, where this block's queries have looked, its inputs, the local state."""

    coefficients: Float[Tensor, "B N E"]
    mass: Float[Tensor, "B bins"]
    frame: blockwise.Frame
    local: Any


@mechanism(
    Card(
        id="infinite-former",
        name="∞-former",
        kind="memory",
        family="compressed-memory",
        paper="∞-former: Infinite Memory Transformer",
        cite="Martins et al., ACL 2022",
        link="https://arxiv.org/abs/2109.00301",
        what="Keeps all of the past as a function of continuous time on a fixed number of basis "
        "functions, read by a density each query chooses.",
        modes={"causal", "step"},
        time="L*C*E + L*M*E + L*E*E",
        memory="M*E + C*E",
        tiny={
            "width": 24,
            "heads": 3,
            "segment": 8,
            "basis": 8,
            "widths": [0.1, 0.3],
            "samples": 6,
            "bins": 5,
        },
        exact={"width": 24, "heads": 3, "segment": 8, "basis": 0},
    )
)
class InfiniteFormer(Mixer):
    """y = local(x) + [E_p1 v(t) ; …] W_o, where x(t) = Bᵀψ(t) is all segments before (Sec. 3).

        s = K q / √D,  p = N(σ(w_μ·s), softplus(w_σ·s)),  E_p v = Σ_j E_p[ψ_j] V_j,  K, V = B W

    After each segment of C tokens the old signal is contracted to [0, τ], sampled at M places, and
    fitted anew together with the segment's inputs on (τ, 1] (Sec. 3.2): more often where the
    segment's queries have looked (`sticky`, Sec. 3.3), else evenly. B takes no gradient.

    Args:
        segment: C. basis: N, for all widths; 0 for no memory. widths: of the Gaussian bases.
        samples: M. bins: of the histogram. seed: of the samples; what is drawn after a row's n-th
            segment depends on it and n alone.
        penalty: λ of the ridge fit. tau: τ.
        density: `sparsemax` is a parabola, and 0 beyond it.
        kl: weight of the loss `infinite_former_kl`, the mean of KL(p ‖ N(μ₀, spread²)).
        spread: σ₀. centre: μ₀; None leaves the means free, as the paper does.
        local: any causal mixer for what is near; by default attention within the segment.

    Raises:
        LongspanError: sizes that do not fit, a density or a τ that is none.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        segment: int = 512,
        basis: int = 512,
        widths: Sequence[float] = (0.005, 0.01),
        samples: int = 512,
        bins: int = 128,
        sticky: bool = True,
        seed: int = 0,
        penalty: float = 0.5,
        tau: float = 0.5,
        density: continuous.Density = "softmax",
        kl: float = 0.0,
        spread: float = 0.05,
        centre: float | None = None,
        local: Mixer | None = None,
    ) -> None:
        super().__init__()
        if min(segment, samples, bins) < 1 or basis < 0 or width % heads or basis % len(widths):
            raise LongspanError(
                f"infinite-former got segment={segment}, samples={samples}, bins={bins}, basis="
                f"{basis}, {len(widths)} widths, width={width}, heads={heads}: expected 1 or more, "
                "a basis that the widths divide, and a width that the heads divide."
            )
        if density not in get_args(continuous.Density) or not 0 < tau < 1 or penalty <= 0:
            raise LongspanError(
                f"infinite-former got density={density!r}, tau={tau}, penalty={penalty}: expected "
                f"{' or '.join(get_args(continuous.Density))}, one within (0, 1), one above 0."
            )
        self.width, self.heads, self.segment = width, heads, segment
        self.basis, self.widths, self.samples, self.bins = basis, tuple(widths), samples, bins
        self.sticky, self.seed, self.penalty, self.tau = sticky, seed, penalty, tau
        self.density: continuous.Density = density
        self.kl, self.spread, self.centre = kl, spread, centre
        self.local = local or blockwise.BlockAttention(
            width=width, heads=heads, block=segment, memory=0
        )
        if basis:
            self.project = nn.ModuleDict({n: nn.Linear(width, width, bias=False) for n in "qkv"})
            self.place = nn.Linear(basis, 2, bias=False)  # w_μ and w_σ, for all heads
            self.output = nn.Linear(width, width, bias=False)

    @torch.compiler.disable  # the visits of a call depend on its mask
    def forward(
        self,
        x: Inputs,
        state: Signal | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, Signal]:
        masked, seen = blockwise.alone(self, x, keep, context, marks)
        y, local = self.local(x, None if state is None else state.local, keep=keep)
        if state is None:
            frame = blockwise.fresh(x, block=self.segment if self.basis else 0, memory=0)
            wide = torch.promote_types(x.dtype, torch.float32)
            b = x.new_zeros(x.shape[0], self.basis, self.width, dtype=wide)
            state = Signal(b, b.new_zeros(x.shape[0], self.bins), frame, local)
        b, mass, frame, _ = state
        if not self.basis:
            return y, state._replace(local=local)
        cut, outs, divergence = blockwise.plan(frame.seen, seen, self.segment), [], []
        for new, visit in zip(cut.split(masked), cut.visits, strict=True):
            o, looked, kl = blockwise.recomputed(self._read, new, b, visit, among=len(cut.visits))
            outs.append(o)
            divergence.append(kl * (frame.seen >= self.segment)[:, None])
            frame, mass = blockwise.put(frame, new.detach(), visit), mass + looked
            if bool(visit.full.any()):
                full = visit.full[:, None]
                b = torch.where(full[..., None], self._refit(b, mass, frame), b)
                mass = mass.masked_fill(full, 0)
            frame = blockwise.turn(frame, visit)
        if self.kl and self.training and outs:
            read = cut.keep.sum().clamp(min=1)
            report(self, "infinite_former_kl", self.kl * torch.cat(divergence, 1).sum() / read)
        y = y + self.output(cut.join(outs, x))
        return y.masked_fill(~seen[..., None], 0), Signal(b, mass, frame, local)

    def _read(
        self, x: Inputs, b: Tensor, visit: blockwise.Visit
    ) -> tuple[Inputs, Float[Tensor, "B bins"], Float[Tensor, "B c"]]:
        """What the tokens read, where they look, and their mean divergences over heads."""
        q, k, v = (
            rearrange(self.project[n](t), "B L (H D) -> B H L D", H=self.heads)
            for n, t in (("q", x), ("k", b.to(x.dtype)), ("v", b.to(x.dtype)))
        )
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = (t.to(b.dtype) for t in (q, k, v))
            place = (q @ k.mT / q.shape[-1] ** 0.5) @ self.place.weight.to(b.dtype).mT
            mean, variance = place[..., 0].sigmoid(), F.softplus(place[..., 1]).clamp(min=1e-4)
            r = continuous.expected(mean, variance, *self._bases(b), self.density)
            o = rearrange(r @ v, "B H L D -> B L (H D)").to(x.dtype)
            looked = self._looked(mean.detach(), variance.detach(), visit)
            ratio = variance / self.spread**2
            kl = (ratio - ratio.log() - 1) / 2
            if self.centre is not None:
                kl = kl + (mean - self.centre) ** 2 / (2 * self.spread**2)
        return o, looked, kl.mean(1).masked_fill(~visit.here, 0)

    def _bases(self, like: Tensor) -> tuple[Tensor, Tensor]:
        centres, deviations = continuous.bases(self.basis, self.widths)
        return centres.to(like), deviations.to(like)

    def _looked(self, mean: Tensor, variance: Tensor, visit: blockwise.Visit) -> Tensor:
        """The mass of the tokens' densities in each bin, over heads and tokens."""
        edges = torch.linspace(0, 1, self.bins + 1, dtype=mean.dtype, device=mean.device)
        shares = continuous.below(edges, mean, variance, self.density).diff(dim=-1)
        return shares.sum(1).masked_fill(~visit.here[..., None], 0).sum(1)

    @torch.no_grad()
    def _refit(self, b: Tensor, mass: Tensor, frame: blockwise.Frame) -> Tensor:
        """B of the old signal, contracted, and the full block."""
        common = {"share": self.tau, "penalty": self.penalty}
        now, blocks = frame.now.to(b.dtype), frame.seen // self.segment
        fits = [
            continuous.regression(self.basis, self.widths, old=old, new=self.segment, **common)
            for old in (0, self.samples)
        ]
        first, later = (g.to(b).mT for g in fits)
        t = self._samples(mass, blocks)
        centres, deviations = self._bases(b)
        old = continuous.gaussian(t[..., None], centres, deviations**2) @ b
        contracted = later @ torch.cat([old, now], 1)
        return torch.where((blocks == 0)[:, None, None], first @ now, contracted)

    def _samples(self, mass: Tensor, blocks: Tensor) -> Float[Tensor, "B M"]:
        """Where the old signal is sampled, in order."""
        even = torch.arange(1, self.samples + 1, dtype=mass.dtype, device=mass.device)
        t = (even / self.samples).expand(len(mass), -1)
        if not self.sticky:
            return t
        u = t.clone()
        for n in blocks.unique().tolist():
            generator = torch.Generator().manual_seed(self.seed + n)
            draw = torch.rand(self.samples, generator=generator, dtype=torch.float64).sort().values
            u[blocks == n] = draw.to(mass)
        return continuous.quantiles(mass, u)
