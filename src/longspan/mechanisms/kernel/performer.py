"""Performer with FAVOR+ (Choromanski et al., 2020)."""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from longspan.card import Card
from longspan.engines import features as feature
from longspan.errors import LongspanError
from longspan.nn.featured import FeatureAttention
from longspan.registry import mechanism


@mechanism(
    Card(
        id="performer",
        name="Performer (FAVOR+)",
        kind="attention",
        family="kernel",
        paper="Rethinking Attention with Performers",
        cite="Choromanski et al., ICLR 2021",
        link="https://arxiv.org/abs/2009.14794",
        what="Estimates softmax attention by positive random features along orthogonal directions.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*M*D + L*M*V",
        memory="M*V",
        tiny={"heads": 3, "head_width": 8, "features": 16},
    )
)
class Performer(FeatureAttention):
    """Attention with the weights φ(q)·φ(k), x = q or k times D^(−1/4), w rows of W (Lemma 1):

        positive        exp(w·x − |x|²/2) / √M                                        (Eq. 5)
        hyperbolic      [exp(w·x), exp(−w·x)] exp(−|x|²/2) / √(2M)
        trigonometric   [cos(w·x), sin(w·x)] exp(|x|²/2) / √M, for comparison
        relu, or any f  f(W q) / √M + 1e-3

    The paper's regularised softmax kernel is `norms="fixed"` (Eq. 8). The released code subtracts
    a maximum over all keys and adds eps to every feature; here the maximum is over the keys so
    far, and a floor under the denominator takes eps' place, so that no later key is seen.

    Args:
        projected: False applies a generalised kernel to q and k themselves.
        per_head: directions of each head's own (the released code shares them).
        redraw_every: training calls between draws; None never. `directions.redraw()` by hand.

    Raises:
        LongspanError: an unknown kernel; a softmax kernel without directions.
    """

    def __init__(
        self,
        *,
        head_width: int,
        heads: int = 1,
        causal: bool = False,
        kernel: Literal["positive", "hyperbolic", "trigonometric", "relu"]
        | Callable[[Tensor], Tensor] = "positive",
        features: int = 256,
        projected: bool = True,
        directions: feature.Kind = "orthogonal",
        norms: feature.Norms = "chi",
        per_head: bool = False,
        seed: int = 0,
        redraw_every: int | None = None,
        eps: float = 1e-12,
    ) -> None:
        softmax = feature.SOFTMAX.get(kernel) if isinstance(kernel, str) else None
        if isinstance(kernel, str) and kernel not in (*feature.SOFTMAX, "relu"):
            raise LongspanError(
                f"performer has no kernel '{kernel}': expected {', '.join(feature.SOFTMAX)}, relu "
                "or a function of the projected queries and keys."
            )
        if softmax is not None and not projected:
            raise LongspanError(
                "performer's softmax kernels need directions: leave projected=True."
            )
        rows, size = None, head_width
        if projected:
            drawn = {"kind": directions, "norms": norms, "seed": seed, "redraw_every": redraw_every}
            shape = {"heads": heads, "per_head": per_head}
            rows = feature.Directions(features, head_width, **shape, **drawn)
            size = features * (2 if kernel in ("hyperbolic", "trigonometric") else 1)
        super().__init__(causal=causal, directions=rows, size=size, eps=eps)
        self.kernel, self.softmax = kernel, softmax

    def features(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.softmax is not None:
            return self.softmax(x * x.shape[-1] ** -0.25, rows)
        f = F.relu if isinstance(self.kernel, str) else self.kernel
        return feature.generalised(x, rows, f, 1e-3)
