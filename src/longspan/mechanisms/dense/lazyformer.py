"""LazyFormer (Ying et al., 2021)."""

from longspan.card import Card
from longspan.nn import Mixer, Position
from longspan.nn.lent import Lending
from longspan.registry import mechanism


@mechanism(
    Card(
        id="lazyformer",
        name="LazyFormer",
        kind="architecture",
        family="dense",
        paper="LazyFormer: Self Attention with Lazy Update",
        cite="Ying et al., 2021",
        link="https://arxiv.org/abs/2102.12702",
        what="Computes attention weights once for several layers, which project values of their "
        "own.",
        modes={"bidirectional", "causal", "step"},
        time="L*S*D + L*S*V",
        memory="S*D + S*V",
    )
)
def lazyformer(
    *,
    width: int,
    heads: int = 1,
    head_width: int | None = None,
    kv_heads: int | None = None,
    causal: bool = False,
    position: Position | None = None,
    dropout: float = 0.0,
    lazy: bool = False,
) -> Mixer:
    """The attention of one layer of a lazy block (Sec. 3.1): of its first, or, `lazy`, of a later.

        A = softmax(Q Kᵀ / √D + bias) in the first,   y = [A_1 x W_v,1; …; A_H x W_v,H] W_o in each

    State goes in and comes out as `Lent(weights, own)`: the weights go on to the next layer, the
    rest is carried to the next call, by the first its keys and values, by the others their values.
    `LongspanConfig(layers=12, sharing=[6, 6])` is a model of two blocks. The weights are kept whole
    in at least float32.

    Args:
        dropout: of the weights, once for all layers of the block; the paper has none (Sec. 3.2).
    """
    return Lending(
        lazy=lazy,
        width=width,
        heads=heads,
        head_width=head_width,
        kv_heads=kv_heads,
        causal=causal,
        position=position,
        dropout=dropout,
    )
