"""cosFormer (Qin et al., 2022)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.card import Card
from longspan.engines import features
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


class CosState(NamedTuple):
    """The running sums, and how many tokens each row has seen (B)."""

    sums: features.Sums
    seen: Tensor


State = CosState | None


@mechanism(
    Card(
        id="cosformer",
        name="cosFormer",
        kind="attention",
        family="kernel",
        paper="cosFormer: Rethinking Softmax in Attention",
        cite="Qin et al., ICLR 2022",
        link="https://arxiv.org/abs/2202.08791",
        what="Weighs keys by relu(q)·relu(k) times a cosine of their distance, which splits into "
        "sines and cosines of the places.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*D*V",
        memory="D*V",
        tiny={"length": 4096},
    )
)
class CosFormer(Attention):
    """Weights relu(q_i)·relu(k_j) cos(π/2 · (i − j)/M), divided by their row's sum (Eq. 10).

    By Ptolemy's identity (Eq. 11), with r = relu(x),

        φ_i(x) = [r sin(π i / 2M), r cos(π i / 2M)]

    Places count kept tokens. Queries as many as keys are taken to be the same tokens.

    Args:
        length: M, at least the number of tokens; by default the longer of queries and keys of
            each call. A carried state needs it fixed.
        activation: another non-negative map in relu's place.
        reweigh: False leaves the cosine out.

    Raises:
        LongspanError: more tokens than `length`; a state without `length`.
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        length: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.relu,
        reweigh: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(causal=causal)
        if length is not None and length < 1:
            raise LongspanError(f"cosformer got length={length}: expected 1 or more.")
        self.length, self.activation, self.reweigh, self.eps = length, activation, reweigh, eps

    def features(self, x: Tensor, angles: Tensor | None) -> tuple[Tensor, None]:
        """φ of tokens at `angles` (B L)."""
        r = self.activation(x)
        if angles is None:
            return r, None
        angles = angles[:, None, :, None]  # B 1 L 1
        return torch.cat([r * angles.sin().to(r), r * angles.cos().to(r)], -1), None

    def angles(
        self, queries: int, keys: Tensor, seen: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """π i / 2M of the keys and the queries (B L), and the count of tokens (B)."""
        at = keys.cumsum(1) if seen is None else keys.cumsum(1) + seen[:, None]
        count = at[:, -1]
        same = self.causal or queries == keys.shape[1]
        of_queries = at[:, -queries:] if same else torch.arange(1, queries + 1).to(at)[None]
        most = torch.maximum(count, of_queries[:, -1]).clamp(min=1)
        if self.length is not None:
            if most.numel() and int(most.max()) > self.length:
                raise LongspanError(
                    f"cosformer was built for at most {self.length} tokens and got "
                    f"{int(most.max())}: build it with a larger length, or shorten the input."
                )
            most = most.new_full(most.shape, self.length)
        unit = (math.pi / 2) / most[:, None].double()
        return at * unit, of_queries * unit, count

    def forward(
        self, q: Queries, k: Keys, v: Values, state: State = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, State]:
        if state is not None and self.length is None and self.reweigh:
            raise LongspanError(
                "cosformer carries a state only for a fixed length: build it with length=."
            )
        seen = None if state is None else state.seen
        visible = q.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
        pos, pos_q, count = self.angles(q.shape[2], visible, seen)
        o, sums = features.attend(
            self.features,
            *(q, k, v),
            state and state.sums,
            causal=self.causal,
            keep=keep,
            pos=pos if self.reweigh else None,
            pos_q=pos_q if self.reweigh else None,
            size=2 * q.shape[3],
            eps=self.eps,
        )
        return o, None if sums is None else CosState(sums, count)
