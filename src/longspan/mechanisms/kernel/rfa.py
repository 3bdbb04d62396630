"""Random Feature Attention (Peng et al., 2021)."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import features as feature
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


class RFAState(NamedTuple):
    """The running sums, and which matrix of the pool each row and head uses (B H)."""

    sums: feature.Sums
    draw: Tensor


@mechanism(
    Card(
        id="rfa",
        name="Random Feature Attention",
        kind="attention",
        family="kernel",
        paper="Random Feature Attention",
        cite="Peng et al., ICLR 2021",
        link="https://arxiv.org/abs/2103.02143",
        what="Attends by random features of unit queries and keys, with a gate that lets the "
        "past fade.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*M*D + L*M*V",
        memory="M*V",
        tiny={"heads": 3, "head_width": 8, "features": 16, "pool": 3},
    )
)
class RFA(Attention):
    """φ(q)ᵀ Σ φ(k_i) v_iᵀ / φ(q)·Σ φ(k_i) with unit q and k, w = σ ∘ w̃ / τ (Eqs. 4 and 5).

        gaussian: φ(x) = [sin(w_1·x), …, cos(w_M·x)] / √M
        arccos:   φ(x) = [relu(w_1·x), …, relu(w_M·x)] / √M

    RFA-Gate, causal only, g_t = sigmoid(w_g·x_t + b_g) of a head (Eq. 7):

        S_t = g_t S_{t−1} + (1 − g_t) φ(k_t) v_tᵀ,   z_t = g_t z_{t−1} + (1 − g_t) φ(k_t)

    x_t is a projection `gated`, which starts as a copy of the keys'; without one, the keys. The
    denominator may be negative: it is held at least `eps` from 0. The released code's scale 0.1
    of all features is left out: it only moves that floor.

    Args:
        pool: matrices drawn; training picks one per head and sequence, evaluation uses the first.
        temperature: τ; with σ = 1, gaussian weights estimate exp(q·k / τ²) of unit q and k.

    Raises:
        LongspanError: an unknown kernel, a gate without `causal`, an empty pool.
    """

    pool: Tensor

    def __init__(
        self,
        *,
        heads: int,
        head_width: int,
        causal: bool = False,
        kernel: Literal["gaussian", "arccos"] = "gaussian",
        features: int = 64,
        gate: bool = False,
        pool: int = 16,
        temperature: float = 1.0,
        seed: int = 0,
        eps: float = 1e-3,
    ) -> None:
        super().__init__(causal=causal)
        if kernel not in ("gaussian", "arccos") or pool < 1 or features < 1:
            raise LongspanError(
                f"rfa got kernel='{kernel}', features={features}, pool={pool}: expected gaussian "
                "or arccos, and 1 or more."
            )
        if gate and not causal:
            raise LongspanError("rfa's gate lets the past fade: build it with causal=True.")
        self.kernel, self.temperature, self.eps = kernel, temperature, eps
        self.size = features * (2 if kernel == "gaussian" else 1)
        self.sigma = nn.Parameter(torch.ones(heads, head_width))
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer(
            "pool", torch.randn(pool, heads, features, head_width, generator=generator)
        )
        self.gate = self.gate_bias = None
        if gate:
            self.extra = {"gated": "k"}
            drawn = torch.randn(heads, head_width, generator=generator)
            self.gate = nn.Parameter(drawn * head_width**-0.5)
            self.gate_bias = nn.Parameter(torch.zeros(heads))

    def draw(self, batch: int) -> Tensor:
        """Which matrix of the pool each row and head uses: (B H)."""
        count, heads = self.pool.shape[:2]
        if not self.training:
            return torch.zeros(batch, heads, dtype=torch.long, device=self.pool.device)
        return torch.randint(count, (heads,), device=self.pool.device).expand(batch, heads)

    def map(self, draw: Tensor) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """φ with the matrices that `draw` names."""
        chosen = self.pool[draw, torch.arange(draw.shape[1], device=draw.device)]  # B H M D
        rows = chosen * (self.sigma / self.temperature)[:, None]

        def phi(x: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor | None]:
            x = F.normalize(x, dim=-1)
            if self.kernel == "arccos":
                return feature.generalised(x, rows, F.relu, 0.0)
            return feature.trigonometric(x, rows, growing=False)

        return phi

    def remember(self, k: Keys, v: Values, *, keep: Keep | None = None) -> RFAState:
        """The sums over an encoder's keys and values, for `recall` at every decoding step."""
        draw = self.draw(k.shape[0])
        return RFAState(feature.collect(self.map(draw), k, v, size=self.size, keep=keep), draw)

    def recall(self, q: Queries, memory: RFAState) -> Outputs:
        """The cross-attention of some queries over what `remember` gave."""
        phi = self.map(memory.draw)
        return feature.read(phi, q, memory.sums, size=self.size, eps=self.eps)

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: RFAState | None = None,
        *,
        keep: Keep | None = None,
        gated: Keys | None = None,
    ) -> tuple[Outputs, RFAState | None]:
        if not self.causal:
            return self.recall(q, self.remember(k, v, keep=keep)), None
        draw = self.draw(q.shape[0]) if state is None else state.draw
        decay = weight = None
        if self.gate is not None and self.gate_bias is not None:
            x = k if gated is None else gated
            x = x if keep is None else x.masked_fill(~keep[:, None, :, None], 0)
            x = (x * self.gate[:, None]).sum(-1) + self.gate_bias[:, None]
            decay, weight = F.logsigmoid(x), torch.sigmoid(-x)
        o, sums = feature.attend(
            self.map(draw),
            *(q, k, v),
            None if state is None else state.sums,
            causal=True,
            keep=keep,
            decay=decay,
            weight=weight,
            size=self.size,
            eps=self.eps,
        )
        assert sums is not None
        return o, RFAState(sums, draw)
