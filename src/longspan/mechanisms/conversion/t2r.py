"""T2R, a pretrained Transformer finetuned into an RNN (Kasai et al., 2021)."""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import scan
from longspan.errors import LongspanError
from longspan.nn import Attention, MultiHead
from longspan.nn.positions import at_least_float32
from longspan.registry import build, mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values

RELU = scan.Entrywise(F.relu, lambda y: (y > 0).to(y.dtype))


class Affine(nn.Module):
    """W x + b of every head, at first as a linear layer's."""

    def __init__(self, heads: int, head_width: int, features: int) -> None:
        super().__init__()
        bound = head_width**-0.5
        self.weight = nn.Parameter(torch.empty(heads, features, head_width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(heads, features).uniform_(-bound, bound))

    def forward(self, x: Float[Tensor, "B H L D"]) -> Float[Tensor, "B H L M"]:
        x = x.to(at_least_float32(x))
        return x @ self.weight.mT.to(x) + self.bias[:, None].to(x)


@mechanism(
    Card(
        id="t2r",
        name="T2R",
        kind="attention",
        family="conversion",
        paper="Finetuning Pretrained Transformers into RNNs",
        cite="Kasai et al., EMNLP 2021",
        link="https://arxiv.org/abs/2103.13076",
        what="Takes softmax's place in a trained model with features of queries and keys that are "
        "learnt, so that training on makes it an RNN.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*M*D + L*M*V",
        memory="M*V",
        tiny={"heads": 3, "head_width": 8, "features": 16},
    )
)
class T2R(Attention):
    """o_i = φ(q_i)ᵀ S / (φ(q_i)ᵀ z + eps) with φ(x) = relu(W_φ x + b_φ) of every head (Sec. 2.3).

    S = Σ φ(k_j) v_jᵀ and z = Σ φ(k_j) over all keys, causally over those so far: they are the
    state, z as the last column of S. Nothing is divided by √D: W_φ learns the scale. Where relu
    leaves a query or all keys nothing, the output is 0.

    Args:
        features: k, 32 for language models and from 4 on for translation in the paper.
        separate: keys have a map of their own, where the paper has one for queries and keys.
        eps: keeps the quotient finite where φ(q) and φ(k) do not meet.

    Raises:
        LongspanError: no features.
    """

    def __init__(
        self,
        *,
        heads: int,
        head_width: int,
        causal: bool = False,
        features: int = 32,
        separate: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(causal=causal)
        if features < 1:
            raise LongspanError(f"t2r got features={features}: expected 1 or more.")
        self.eps = eps
        self.map = Affine(heads, head_width, features)
        self.key_map = Affine(heads, head_width, features) if separate else None

    def remember(
        self, k: Keys, v: Values, *, keep: Keep | None = None
    ) -> Float[Tensor, "B H M V+1"]:
        """The sums over an encoder's keys and values, for `recall` at every decoding step."""
        k, v = self._keys(k, v, keep)
        return scan.outer(k[:, :, :0], k, v, feature=RELU, normalise=self.eps)[1]

    def recall(self, q: Queries, memory: Float[Tensor, "B H M W"]) -> Outputs:
        """The cross-attention of some queries over what `remember` gave."""
        o = F.relu(self.map(q)) @ memory
        return (o[..., :-1] / (o[..., -1:] + self.eps)).to(q.dtype)

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: Float[Tensor, "B H M V+1"] | None = None,
        *,
        keep: Keep | None = None,
    ) -> tuple[Outputs, Float[Tensor, "B H M V+1"] | None]:
        if not self.causal:
            return self.recall(q, self.remember(k, v, keep=keep)), None
        k, values = self._keys(k, v, keep)
        o, state = scan.outer(self.map(q), k, values, state, feature=RELU, normalise=self.eps)
        return o.to(v.dtype), state

    def _keys(self, k: Keys, v: Values, keep: Keep | None) -> tuple[Tensor, Tensor]:
        """W_φ k + b_φ and v, 0 where unseen: relu then leaves nothing there."""
        mapped = self.key_map or self.map
        if keep is None:
            return mapped(k), v
        unseen = ~keep[:, None, :, None]
        # Before the map, too: what it may hold must not reach the map's gradient.
        k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
        return mapped(k).masked_fill(unseen, 0), v


@torch.no_grad()
def fold(mixer: MultiHead) -> MultiHead:
    """The same mixer for inference, its maps within its projections (Sec. 2.3).

        W'_q = W_φ W_q,   b'_q = W_φ b_q + b_φ,   and so for keys

    It attends by `linear-transformer` with φ = relu, whose state is this one's.

    Raises:
        LongspanError: another attention than t2r; a position that comes after the projections;
            grouped keys, of which every head has features of its own.
    """
    attention, position = mixer.attention, mixer.position
    if not isinstance(attention, T2R):
        raise LongspanError(
            f"fold puts t2r's maps into projections and got a {type(attention).__name__}: "
            "leave that mixer as it is."
        )
    if position is not None and "infuse" not in position.acts:
        raise LongspanError(
            f"{type(position).__name__} turns queries and keys between their projections and "
            "t2r's maps, which then cannot be folded: leave the mixer as it is."
        )
    if mixer.kv_heads != mixer.heads:
        raise LongspanError(
            f"{mixer.heads} heads share {mixer.kv_heads} of keys, and folded each has its own "
            "features of them: leave the mixer as it is."
        )
    folded = MultiHead(
        build("linear-transformer", causal=attention.causal, features=F.relu, eps=attention.eps),
        width=mixer.width,
        heads=mixer.heads,
        head_width=attention.map.bias.shape[1],
        value_width=mixer.value_width,
        position=position,
        biases=True,
    )
    for name, affine in (("q", attention.map), ("k", attention.key_map or attention.map)):
        _fold_linear(folded.project[name], mixer.project[name], affine)
    folded.project["v"], folded.output = mixer.project["v"], mixer.output
    return folded.to(mixer.output.weight).train(mixer.training)


def _fold_linear(folded: nn.Module, linear: nn.Module, affine: Affine) -> None:
    assert isinstance(folded, nn.Linear)
    assert isinstance(linear, nn.Linear)
    rows = rearrange(linear.weight, "(H D) E -> H D E", H=len(affine.bias))
    weight = einsum(affine.weight, rows, "H M D, H D E -> H M E")
    bias = affine.bias
    if linear.bias is not None:
        own = rearrange(linear.bias, "(H D) -> H D", H=len(bias))
        bias = bias + einsum(affine.weight, own, "H M D, H D -> H M")
    folded.weight.data, folded.bias.data = weight.flatten(0, 1), bias.flatten()
