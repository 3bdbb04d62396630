"""Deep equilibrium language models (Bai et al., 2019)."""

from typing import Any, Literal

from torch import nn

from longspan import hub
from longspan.errors import LongspanError
from longspan.mechanisms.adaptive_depth.deq import Equilibrium, deq
from longspan.models.config import LongspanConfig, Spec
from longspan.models.heads import LongspanForCausalLM
from longspan.models.stack import LongspanModel


class EquilibriumConfig(LongspanConfig):
    """A LongspanConfig whose one layer is solved for its equilibrium.

    Args:
        cell: `relative` for that of the DEQ-Transformer, with a memory of past segments; `block`
            for a block of `mixers`, into which the embeddings are injected by a sum.
        memory: tokens whose equilibria are kept.
        solver, most, tolerance: forward; backward by default the same.
        phantom, damping: gradients of n damped steps; 0 for the exact gradient.
        jacobian: weight of the Jacobian's norm in the loss.

    >>> EquilibriumConfig(width=700, heads=10, inner=2700, memory=150)
    """

    model_type = "longspan-equilibrium"
    __no_type_check__ = True

    layers: int = 1
    cell: Literal["relative", "block"] = "relative"
    memory: int = 150
    solver: Literal["plain", "anderson", "broyden"] = "broyden"
    most: int = 30
    tolerance: float = 1e-4
    backward_most: int | None = None
    backward_tolerance: float | None = None
    phantom: int = 0
    damping: float = 1.0
    jacobian: float = 0.0
    position: Spec | None = None
    norm_order: Literal["pre", "post"] = "post"
    activation: Literal["relu", "gelu", "silu"] = "relu"


class EquilibriumModel(LongspanModel):
    """Embedding, and one block at its equilibrium."""

    config: EquilibriumConfig

    def __init__(self, config: LongspanConfig, *, cross: bool = False) -> None:
        super().__init__(config, cross=cross)
        config = self.config
        block: Any = self.layers[0] if config.cell == "block" else None
        body = deq(
            width=config.width,
            heads=config.heads,
            inner=config.inner,
            causal=self.causal,
            memory=config.memory,
            block=block,
            solver=config.solver,
            most=config.most,
            tolerance=config.tolerance,
            backward_most=config.backward_most,
            backward_tolerance=config.backward_tolerance,
            phantom=config.phantom,
            damping=config.damping,
            jacobian=config.jacobian,
            dropout=config.dropout,
        )
        self.layers = nn.ModuleList([hub.settled(body)])
        self.post_init()

    @property
    def equilibrium(self) -> Equilibrium:
        """The layer, with what it says of its last solution and how it is warmed up."""
        body = self.layers[0]
        assert isinstance(body, Equilibrium)
        return body


class EquilibriumForCausalLM(LongspanForCausalLM):
    """The DEQ-Transformer as a language model.

    When the solver stops depends on all tokens of a row, so later ones move earlier outputs within
    the tolerance. Plain iteration to tolerance 0 stops at `most` whatever comes.

    Raises:
        LongspanError: a solver that can see the future, while the config does not allow leaks.

    >>> model = EquilibriumForCausalLM(EquilibriumConfig(width=700, heads=10, allow_leaks=True))
    >>> model.model.equilibrium.unrolled = 2  # warm-up; None afterwards
    """

    config: EquilibriumConfig

    def __init__(self, config: EquilibriumConfig) -> None:
        if not config.allow_leaks and (config.solver != "plain" or config.tolerance):
            raise LongspanError(
                f"solver='{config.solver}' to tolerance {config.tolerance} can see the future "
                "(later tokens decide when it stops), which spoils a language model's figures: use "
                "solver='plain' with tolerance=0, or set allow_leaks=True in the config."
            )
        super().__init__(config)
        # Drafts checked together would stop the solver elsewhere than token by token.
        self._is_stateful = config.solver != "plain" or config.tolerance > 0
        self.model = EquilibriumModel(self.config)
        self.post_init()


hub.register(
    EquilibriumConfig,
    {"AutoModel": EquilibriumModel, "AutoModelForCausalLM": EquilibriumForCausalLM},
)
