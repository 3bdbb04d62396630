"""Set Transformer (Lee et al., 2019): MAB, SAB, ISAB and PMA."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn import Mixer
from longspan.nn.latent import CrossAttention
from longspan.registry import mechanism
from longspan.shapes import Context, Inputs, Keep, Marks

Convention = Literal["paper", "code"]


class MAB(nn.Module):
    """H = LN(X + MHA(X, Y, Y)), MAB(X, Y) = LN(H + ReLU(H W + b)) (Eqs. 6 and 7).

    By the released code's convention the projected queries are the residual stream, there is no
    W_o, and scores are divided by √E rather than √(E / heads): H = LN(X W_q + MHA).

    Args:
        norm: layer norms; the code has none by default, and scale-sensitive tasks want none.

    Raises:
        LongspanError: an unknown convention.
    """

    def __init__(
        self, *, width: int, heads: int, convention: Convention = "paper", norm: bool = True
    ) -> None:
        super().__init__()
        if convention not in get_args(Convention):
            raise LongspanError(
                f"no convention '{convention}'; expected {' or '.join(get_args(Convention))}."
            )
        self.paper = convention == "paper"
        scale = None if self.paper else width**-0.5
        self.attention = CrossAttention(width=width, heads=heads, output=self.paper, scale=scale)
        self.feed = nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for _ in range(2))

    def forward(self, x: Inputs, y: Float[Tensor, "B S E"], *, keep: Keep | None = None) -> Inputs:
        """`keep` is of y."""
        o, projected = self.attention(x, y, keep=keep)
        h = self.norms[0]((x if self.paper else projected) + o)
        return self.norms[1](h + self.feed(h).relu())


def seeds(count: int, width: int) -> nn.Parameter:
    """Learned vectors, as a Xavier-uniform matrix."""
    if count < 1:
        raise LongspanError(f"{count} learned vectors were asked for: give at least 1.")
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(count, width)))


class PMA(nn.Module):
    """PMA_k(Z) = MAB(S, rFF(Z)) with k learned seeds S (Eq. 11); the code has no rFF before it."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        outputs: int = 1,
        convention: Convention = "paper",
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.seeds = seeds(outputs, width)
        self.mab = MAB(width=width, heads=heads, convention=convention, norm=norm)
        self.feed = None
        if convention == "paper":
            self.feed = nn.Sequential(nn.Linear(width, width), nn.ReLU())

    def forward(self, z: Inputs, *, keep: Keep | None = None) -> Float[Tensor, "B M E"]:
        z = z if keep is None else z.masked_fill(~keep[..., None], 0)
        z = z if self.feed is None else self.feed(z)
        return self.mab(self.seeds.expand(len(z), -1, -1), z, keep=keep)


@mechanism(
    Card(
        id="set-transformer",
        name="Set Transformer (MAB, SAB, ISAB, PMA)",
        kind="mixer",
        family="latent",
        paper="Set Transformer: A Framework for Attention-based Permutation-Invariant Neural "
        "Networks",
        cite="Lee et al., ICML 2019",
        link="https://arxiv.org/abs/1810.00825",
        what="A few learned vectors attend to the set, and the set attends to what they found.",
        modes={"bidirectional", "cross"},
        time="L*M*E + L*E*E",
        memory="M*E",
        tiny={"width": 24, "heads": 3, "inducing": 5},
    )
)
class SetTransformer(Mixer):
    """ISAB_m(X) = MAB(X, MAB(I, X)) with m learned points I (Eqs. 9 and 10); SAB(X) = MAB(X, X).

    Residuals and norms are its own. No position: the order of tokens is the order of outputs, and
    nothing else. With a context Y, MAB(X, MAB(I, Y)). PMA pools a set; the model of both:
    `models.latents`.

    Args:
        inducing: m; None for SAB, quadratic.

    Raises:
        LongspanError: m below 1, an unknown convention, a width that heads do not divide; marks.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int = 4,
        inducing: int | None = 32,
        convention: Convention = "paper",
        norm: bool = True,
    ) -> None:
        super().__init__()
        options = {"width": width, "heads": heads, "convention": convention, "norm": norm}
        self.points = None if inducing is None else seeds(inducing, width)
        self.inner = None if inducing is None else MAB(**options)
        self.outer = MAB(**options)

    def forward(
        self,
        x: Inputs,
        state: None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, None]:
        if marks is not None:
            raise LongspanError("set-transformer treats all tokens alike: leave the marks out.")
        source = x if context is None else context
        if keep is not None:
            source = source.masked_fill(~keep[..., None], 0)
            x = source if context is None else x
        if self.points is None or self.inner is None:
            y = self.outer(x, source, keep=keep)
        else:
            y = self.outer(x, self.inner(self.points.expand(len(x), -1, -1), source, keep=keep))
        if keep is not None and context is None:
            y = y.masked_fill(~keep[..., None], 0)
        return y, None
