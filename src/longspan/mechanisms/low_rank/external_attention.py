"""External attention, EANet and EAMLP (Guo et al., 2021)."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn import Block, FeedForward
from longspan.nn.within import Within
from longspan.registry import mechanism
from longspan.shapes import Inputs, Keep


@mechanism(
    Card(
        id="external-attention",
        name="External Attention",
        kind="mixer",
        family="low-rank",
        paper="Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks",
        cite="Guo et al., 2021",
        link="https://arxiv.org/abs/2105.02358",
        what="Attends to two small learned memories, the same for every input, in place of the "
        "tokens.",
        modes={"bidirectional"},
        time="L*M*E + L*E*E",
        memory="M*E",
        tiny={"width": 24, "heads": 3, "slots": 16},
    )
)
class ExternalAttention(Within):
    """A = Norm(F M_kᵀ), y = (A M_v) W_o with F = x W_q, in heads that share M_k and M_v (Alg. 2).

    Norm is double (Eq. 8): a softmax over the tokens for each slot, then each token's row divided
    by its sum, A = Ã / (eps + Σ_m Ã).

    Args:
        slots: M, the paper's S.
        expand: widens W_q's output, which the official multi-head code sets to 4.
        norm: `double`, or `softmax` over the slots for comparison.

    Raises:
        LongspanError: widths that do not divide, a context or marks.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int = 1,
        slots: int = 64,
        expand: int = 1,
        norm: str = "double",
        eps: float = 1e-9,
    ) -> None:
        super().__init__()
        inner = width * expand
        if inner % heads or slots < 1:
            raise LongspanError(
                f"external-attention got width × expand = {inner}, heads={heads}, slots={slots}: "
                "heads must divide the width, and there must be a slot."
            )
        if norm not in ("double", "softmax"):
            raise LongspanError(
                f"external-attention has no norm '{norm}'; expected double or softmax."
            )
        self.heads, self.norm, self.eps = heads, norm, eps
        self.query = nn.Linear(width, inner)
        self.keys = nn.Parameter(torch.empty(slots, inner // heads))
        self.values = nn.Parameter(torch.empty(slots, inner // heads))
        self.output = nn.Linear(inner, width)
        for memory, outputs in ((self.keys, slots), (self.values, inner // heads)):
            nn.init.normal_(memory, std=(2 / outputs) ** 0.5)  # by fan-out, as the official code

    def mix(self, x: Inputs, state: None, keep: Keep | None) -> tuple[Inputs, None]:
        f = rearrange(self.query(x), "B L (H D) -> B H L D", H=self.heads)
        weights = self.weights(f @ self.keys.mT, keep)
        return self.output(rearrange(weights @ self.values, "B H L D -> B L (H D)")), None

    def weights(
        self, scores: Float[Tensor, "B H L M"], keep: Keep | None = None
    ) -> Float[Tensor, "B H L M"]:
        """A, normalised in at least float32."""
        wide = torch.promote_types(scores.dtype, torch.float32)
        if self.norm == "softmax":
            return scores.softmax(-1, dtype=wide).to(scores.dtype)
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, :, None], -torch.inf)
        shares = torch.ops.aten._safe_softmax(scores, 2, dtype=wide)
        return (shares / (self.eps + shares.sum(-1, keepdim=True))).to(scores.dtype)


class ExternalAttention2d(nn.Module):
    """relu(x + conv(EA(conv(x)))) over feature maps, B C H W, with 1 × 1 convolutions (Sec. 3.2).

    The two convolutions are the mixer's W_q and W_o.
    """

    def __init__(self, *, width: int, slots: int = 64) -> None:
        super().__init__()
        self.mixer = ExternalAttention(width=width, slots=slots)

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        y, _ = self.mixer(x.flatten(2).mT)
        return (x + y.mT.view_as(x)).relu()


class EAMLP(nn.Module):
    """An image classifier of linear layers: patches, x + MEA(LN(x)), x + MLP(LN(x)), mean, head."""

    def __init__(
        self,
        *,
        classes: int,
        image: int = 224,
        patch: int = 16,
        channels: int = 3,
        width: int = 384,
        layers: int = 12,
        heads: int = 8,
        slots: int = 64,
        expand: int = 4,
    ) -> None:
        super().__init__()
        if image % patch:
            raise LongspanError(
                f"images of {image} do not divide into patches of {patch}: choose a divisor."
            )
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(torch.randn((image // patch) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(
                ExternalAttention(width=width, heads=heads, slots=slots, expand=expand),
                FeedForward(width),
                width=width,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B _"]:
        """Logits of the classes."""
        x = self.patches(images).flatten(2).mT
        if x.shape[1] != len(self.position):
            raise LongspanError(
                f"EAMLP got {x.shape[1]} patches and was built for {len(self.position)}: give "
                "images of the size it was built with."
            )
        x = x + self.position
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.norm(x).mean(1))
