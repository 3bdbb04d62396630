"""SRU++ (Lei, 2021) as a language model: layer upon layer, each with its own highway."""

from typing import Any, Literal

from torch import nn

from longspan import hub, registry
from longspan.models.alone import AloneConfig, AloneForCausalLM
from longspan.nn import Mixer, blockwise
from longspan.shapes import Context, Inputs, Keep, Marks


class SruConfig(AloneConfig):
    """Layers of `sru-plus-plus`, every k-th with attention.

    Args:
        heads: of attention, within d' = inner, by default width / 4.
        attends_every: k; the last layer attends, and each k-th before it.
        memory: tokens of earlier calls that attention sees; None for all.
        order: a norm before or after each layer, or none.
        dropout: of embeddings, and of c by one mask for all of time.
    """

    model_type = "longspan-sru"
    __no_type_check__ = True
    architecture = "sru-plus-plus"
    options = ("width", "heads", "inner", "memory", "order", "alpha", "linear", "dropout")

    heads: int = 1
    attends_every: int = 1
    memory: int | None = None
    alpha: float = 0.0
    linear: bool = False
    order: Literal["pre", "post", "none"] = "post"

    def build(self) -> Mixer:
        """The stack."""
        given = {name: getattr(self, name) for name in self.options}
        last = self.layers - 1
        return SruStack(
            [
                registry.build(
                    self.architecture,
                    causal=True,
                    attends=(last - n) % self.attends_every == 0,
                    **given,
                )
                for n in range(self.layers)
            ]
        )


class SruStack(Mixer):
    """Layers one on the other; the state is a tuple of theirs."""

    def __init__(self, layers: list[Mixer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self,
        x: Inputs,
        state: Any = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, Any]:
        x, _ = blockwise.alone(self, x, keep, context, marks)
        carried = []
        for layer, own in zip(self.layers, state or (None,) * len(self.layers), strict=True):
            x, own = layer(x, own, keep=keep)
            carried.append(own)
        return x, tuple(carried)


class SruForCausalLM(AloneForCausalLM):
    """SRU++ with its next-token head.

    >>> SruForCausalLM(SruConfig(width=3072, inner=768, layers=10, attends_every=2))
    """

    config: SruConfig
    config_class = SruConfig


hub.register(SruConfig, {"AutoModelForCausalLM": SruForCausalLM})
