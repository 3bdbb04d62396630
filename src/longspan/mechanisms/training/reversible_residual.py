"""Reversible residual network (Gomez et al., 2017; Kitaev et al., 2020)."""

from longspan.card import Card
from longspan.nn.residual import Enter, Leave, Reversible
from longspan.registry import mechanism


@mechanism(
    Card(
        id="reversible-residual",
        name="Reversible residual network (RevNet)",
        kind="residual",
        family="training",
        paper="The Reversible Residual Network: Backpropagation Without Storing Activations",
        cite="Gomez et al., NeurIPS 2017; Kitaev et al., ICLR 2020",
        link="https://arxiv.org/abs/1707.04585",
        what="Keeps two streams that read from each other by turns, so that activations are "
        "computed back from the outputs and memory does not grow with depth.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*E",
        memory="L*E",
        exact={},
    )
)
def reversible_residual(
    *,
    enter: Enter = "duplicate",
    leave: Leave = "mean",
    axis: int = -1,
    width: int | None = None,
) -> Reversible:
    """y_1 = x_1 + F(x_2), y_2 = x_2 + G(y_1); back: x_2 = y_2 − G(y_1), x_1 = y_1 − F(x_2).

    Call it with the branches F, G, F, G, … and x: any number of them, attention, cross-attention
    and feed-forward by turns. RevNet splits channels (`enter="split", leave="concat", axis=1`) and
    puts ordinary modules, which change the resolution, between runs of reversible branches; the
    Reformer duplicates x and norms both outputs beside each other (`leave="concat-norm"`).
    """
    return Reversible(enter=enter, leave=leave, axis=axis, width=width)
