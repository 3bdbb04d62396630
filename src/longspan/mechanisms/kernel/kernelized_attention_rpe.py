"""Kernelized attention with relative positional encoding (Luo et al., 2021)."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import conv, features, scan
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values

Feature = Literal["prf", "trf", "elu", "relu"]
Path = Literal["auto", "fft", "dense"]
CAP = 40.0  # exp(2 · 40) and sums of it are finite in float32


@mechanism(
    Card(
        id="kernelized-attention-rpe",
        name="Kernelized Attention with Relative Positional Encoding",
        kind="attention",
        family="kernel",
        paper="Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding",
        cite="Luo et al., NeurIPS 2021",
        link="https://arxiv.org/abs/2106.12566",
        what="Linear attention whose weights also depend on distance, by Toeplitz products.",
        modes={"bidirectional", "causal", "cross"},
        time="L*M*V",
        memory="L*D",
        tiny={"heads": 3, "head_width": 8, "length": 2048, "directions": 4, "path": "fft"},
        skips={"costs_what_it_says": "it is L log L, causally L log² L; a cost has no logarithm"},
    )
)
class KernelizedAttentionRPE(Attention):
    """o_i = Σ_j c_{j−i} φ(q_i)·φ(k_j) v_j / Σ_j c_{j−i} φ(q_i)·φ(k_j), c = e^b (Eq. 10).

    b has a number per head and distance j − i, from 0. Queries and keys are first scaled to norm
    1 (`normalise`), which bounds the variance of random features, and the usual 1/√D is dropped;
    without it both are divided by D^¼, and exponents of features above 40 count as 40. Only
    max b is taken out of e^b, which cancels. Over a grid, b is by (Δrow, Δcolumn): rows are set
    apart by gaps as wide as themselves, so that one-dimensional transforms serve as well as the
    paper's two-dimensional ones. Causally, halves of halves keep later tokens out of each FFT.

    Args:
        length: n, the most queries and keys; b has 2n − 1 entries, of which fewer are used.
        features: prf (positive), trf (trigonometric), elu (elu + 1) or relu.
        directions: random directions of prf and trf, drawn orthogonal from `seed`.
        relative: False leaves b out, which makes it plain linear attention in O(L).
        grid: (rows, columns) of a sequence in raster order.
        path: fft, dense (in tiles, O(L²) time and O(L) memory), or what is faster.

    Raises:
        LongspanError: an option that does not exist, an input longer than b allows, other heads
            or widths than it was built for, a causal grid with keys before the queries.
    """

    def __init__(
        self,
        *,
        heads: int,
        head_width: int,
        length: int,
        causal: bool = False,
        features: Feature = "prf",
        directions: int = 64,
        normalise: bool = True,
        relative: bool = True,
        grid: tuple[int, int] | None = None,
        path: Path = "auto",
        seed: int = 0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(causal=causal)
        for name, value, known in (("features", features, Feature), ("path", path, Path)):
            if value not in get_args(known):
                raise LongspanError(f"no {name} '{value}'; expected {', '.join(get_args(known))}.")
        if grid is not None:
            length = min(grid[0] * grid[1], length)
        self.heads, self.head_width, self.length = heads, head_width, length
        self.features: Feature = features
        self.normalise, self.grid, self.eps = normalise, grid, eps
        self.base = {"auto": None, "fft": 0, "dense": 2**62}[path]
        self.rows = None
        if features in ("prf", "trf"):
            self.rows = _directions(directions, head_width, seed)
        reach = length if grid is None else (grid[0] - 1) * (2 * grid[1] - 1) + grid[1]
        self.bias = nn.Parameter(torch.zeros(heads, 2 * reach - 1)) if relative else None

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: Tensor | None = None,
        *,
        keep: Keep | None = None,
    ) -> tuple[Outputs, None]:
        if state is not None:
            raise LongspanError("kernelized-attention-rpe carries no state: give all tokens.")
        self._check(q, k)
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            q_, k_, v_ = q.to(wide), k.to(wide), v.to(wide)
            unseen = None if keep is None else ~keep[:, None, :, None]
            if unseen is not None:
                k_, v_ = k_.masked_fill(unseen, 0), v_.masked_fill(unseen, 0)
            q_, k_ = self._map(q_, query=True), self._map(k_, query=False)
            if unseen is not None:
                k_ = k_.masked_fill(unseen, 0)
            o = self._weigh(q_, k_, F.pad(v_, (0, 1), value=1.0))
            return features.quotient(o, self.eps).to(q.dtype), None

    def _check(self, q: Tensor, k: Tensor) -> None:
        longest = max(q.shape[2], k.shape[2])
        if self.bias is not None and longest > self.length:
            raise LongspanError(
                f"kernelized-attention-rpe was built for at most {self.length} tokens and got "
                f"{longest}: build it with length={longest}, or shorten the input."
            )
        if (q.shape[1], q.shape[3]) != (self.heads, self.head_width):
            raise LongspanError(
                f"kernelized-attention-rpe was built for {self.heads} heads of width "
                f"{self.head_width} and got {q.shape[1]} of {q.shape[3]}: build it for these."
            )
        if self.causal and self.grid is not None and q.shape[2] != k.shape[2]:
            raise LongspanError(
                "a causal grid takes as many keys as queries: give no earlier ones."
            )

    def _map(self, x: Tensor, *, query: bool) -> Tensor:
        x = F.normalize(x, dim=-1) if self.normalise else x * x.shape[-1] ** -0.25
        if self.rows is None:
            return F.elu(x) + 1 if self.features == "elu" else x.relu()
        maps = {"prf": features.positive, "trf": features.trigonometric}
        phi, log = maps[self.features](x, self.rows())
        # A query's unit cancels in the quotient.
        return phi if query or log is None else phi * log.clamp(max=CAP).exp()[..., None]

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.bias is None:
            return scan.outer(q, k, v)[0] if self.causal else scan.total(q, k, v)
        length = q.shape[2]
        if self.grid is not None:
            q, k, v = (_apart(t, self.grid[1]) for t in (q, k, v))
        queries, keys = q.shape[2], k.shape[2]
        first = (self.bias.shape[1] + 1) // 2 - (keys if self.causal else queries)
        b = self.bias[:, first : first + queries + keys - 1].flip(1).to(q.dtype)
        c = (b - b.detach().amax(1, keepdim=True)).exp() if b.numel() else b
        o = conv.toeplitz(q, k, v, c, causal=self.causal, base=self.base)
        return o if self.grid is None else _together(o, self.grid[1], length)


def _directions(count: int, width: int, seed: int) -> features.Directions:
    return features.Directions(count, width, seed=seed)


def _apart(t: Tensor, columns: int) -> Tensor:
    """Raster rows with columns − 1 zeros after each but the last: lags name (Δrow, Δcolumn)."""
    length = t.shape[2]
    rows = -(-length // columns)
    t = F.pad(t, (0, 0, 0, rows * columns - length)).unflatten(2, (rows, columns))
    return F.pad(t, (0, 0, 0, columns - 1)).flatten(2, 3)[
        :, :, : rows * (2 * columns - 1) - columns + 1
    ]


def _together(t: Tensor, columns: int, length: int) -> Tensor:
    t = F.pad(t, (0, 0, 0, columns - 1)).unflatten(2, (-1, 2 * columns - 1))
    return t[:, :, :, :columns].flatten(2, 3)[:, :, :length]
