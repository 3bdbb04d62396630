"""LongT5 (Guo et al., 2021): the encoder's self-attention."""

import math

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import pattern
from longspan.errors import LongspanError
from longspan.nn import Position
from longspan.nn.within import Within
from longspan.registry import mechanism
from longspan.shapes import Inputs, Keep, Keys, Queries


class Buckets(Position):
    """T5's bias: a number a head for each bucket of the distance j − i (Raffel et al., Sec. 2.1).

    Half of a side's buckets are for one distance each, the others widen logarithmically up to
    `distance`; the last takes all beyond. Two-sided, or for earlier keys only.
    """

    acts = frozenset({"bias"})

    def __init__(
        self, heads: int, *, buckets: int = 32, distance: int = 128, causal: bool = False
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(buckets, heads)
        self.distance, self.causal = distance, causal

    def of(self, steps: Int[Tensor, "*shape"]) -> Float[Tensor, "H *shape"]:
        """The bias at distances j − i."""
        side = self.table.num_embeddings
        ahead = torch.zeros_like(steps)
        if self.causal:
            far = (-steps).clamp(min=0)
        else:
            side //= 2
            ahead, far = side * (steps > 0), steps.abs()
        near = side // 2
        # In float32, as T5 has it: the borders of the buckets are a matter of rounding.
        wide = (far.clamp(min=1).float() / near).log() / math.log(self.distance / near)
        wide = (near + (wide * (side - near)).long()).clamp(max=side - 1)
        return self.table(ahead + torch.where(far < near, far, wide)).movedim(-1, 0)

    def bias(
        self, q: Queries, k: Keys, pos_q: Int[Tensor, "L"], pos_k: Int[Tensor, "S"]
    ) -> Float[Tensor, "1 H L S"]:
        return self.of(pos_k - pos_q[:, None])[None]


@mechanism(
    Card(
        id="longt5",
        name="LongT5",
        kind="mixer",
        family="global-local",
        paper="LongT5: Efficient Text-To-Text Transformer for Long Sequences",
        cite="Guo et al., Findings of NAACL 2022",
        link="https://arxiv.org/abs/2112.07916",
        what="Every token sees its neighbours and one summary of each block of tokens, made anew "
        "in every layer.",
        modes={"bidirectional"},
        time="L*E*E + L*C*E + L*L*E",
        memory="L*E",
        tiny={"width": 24, "heads": 3, "radius": 5, "block": 4, "buckets": 8, "distance": 12},
    )
)
class LongT5(Within):
    """o_i = softmax(q_i [K_near ; K_g]ᵀ + [b_{j−i} ; b'_{m−run(i)}]) [V_near ; V_g]  (Sec. 3.2).

    Near are the keys |i − j| ≤ r. K_g and V_g are the same projections of the transient globals

        g_m = RMSNorm( Σ_{i in block m} x_i )

    of blocks of `block` kept tokens; those behind the last whole block belong to it, and fewer
    tokens than one block have none. Scores are not scaled: T5's initialisation does it. Weights
    are never formed, so none are dropped out in training, which T5 does.

    Args:
        radius: r. block: k; None for local attention alone.
        buckets, distance: of both biases, b and b'.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        head_width: int | None = None,
        radius: int = 127,
        block: int | None = 16,
        buckets: int = 32,
        distance: int = 128,
    ) -> None:
        super().__init__()
        if radius < 0 or (block is not None and block < 1):
            raise LongspanError(
                f"longt5 got radius={radius}, block={block}: expected a radius of 0 or more, and "
                "blocks of at least one token, or None for local attention."
            )
        inner = heads * (head_width or width // heads)
        self.heads, self.radius, self.block = heads, radius, block
        self.project = nn.ModuleDict({n: nn.Linear(width, inner, bias=False) for n in "qkv"})
        self.output = nn.Linear(inner, width, bias=False)
        self.near = Buckets(heads, buckets=buckets, distance=distance)
        self.far, self.norm = None, None
        if block is not None:
            self.far = Buckets(heads, buckets=buckets, distance=distance)
            self.norm = nn.RMSNorm(width, eps=1e-6)
        initialise(self, width, inner // heads)

    def share(self, first: "LongT5") -> None:
        """Take the biases of the first layer, as all layers of a T5 do."""
        self.near, self.far = first.near, first.far

    def mix(self, x: Inputs, state: None, keep: Keep | None) -> tuple[Inputs, None]:
        order = None
        if keep is not None:
            # Kept tokens first: windows and blocks count these alone.
            order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[..., None].expand_as(x)
            x = x.gather(1, order)
            keep = torch.arange(x.shape[1], device=x.device) < keep.sum(1, keepdim=True)
        y = self.output(rearrange(self._attend(x, keep), "B H L D -> B L (H D)"))
        return y if order is None else torch.zeros_like(y).scatter(1, order, y), None

    def _attend(self, x: Tensor, keep: Keep | None) -> Tensor:
        def heads(name: str, of: Tensor) -> Tensor:
            return rearrange(self.project[name](of), "B L (H D) -> B H L D", H=self.heads)

        window = pattern.Window(self.radius, self.radius)
        near = self.near.of(torch.arange(-self.radius, self.radius + 1, device=x.device))
        parts: list[tuple[pattern.Biased, Tensor, Tensor, Tensor]] = [
            (pattern.ByDistance(window, keep), heads("k", x), heads("v", x), near)
        ]
        if self.block is not None and self.far is not None and self.norm is not None:
            lengths = [x.shape[1]] * len(x) if keep is None else keep.sum(1).tolist()
            counts = [n // self.block for n in lengths]
            most = max(counts, default=0)
            if most:
                run = torch.arange(x.shape[1], device=x.device) // self.block
                last = torch.tensor(counts, device=x.device)[:, None]
                run = torch.where(last > 0, run.minimum(last - 1), 0)[..., None].expand_as(x)
                g = self.norm(x.new_zeros(len(x), most, x.shape[2]).scatter_add(1, run, x))
                far = self.far.of(torch.arange(1 - most, most, device=x.device))
                parts.append((pattern.ByRun(self.block, counts), heads("k", g), heads("v", g), far))
        return pattern.biased(heads("q", x), parts, scale=1.0)


def initialise(mixer: nn.Module, width: int, head_width: int) -> None:
    """T5's weights, which stand in for the 1/√D of the scores (Mesh TensorFlow)."""
    for name, part in mixer.named_modules():
        std = width**-0.5
        if isinstance(part, nn.Linear):
            if name.endswith("q"):
                std *= head_width**-0.5
            elif name == "output":
                std = part.in_features**-0.5
            nn.init.normal_(part.weight, std=std)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=std)
