"""Language models whose layers are one mixer, with no residual, norm or feed-forward around it."""

from typing import Any, ClassVar

from torch import nn

from longspan import hub, registry
from longspan.errors import LongspanError
from longspan.models.config import LongspanConfig, Spec
from longspan.models.heads import LongspanForCausalLM
from longspan.models.stack import LongspanModel
from longspan.nn import Mixer
from longspan.shapes import Context, Inputs, Keep, Marks


class AloneConfig(LongspanConfig):
    """A LongspanConfig of a model that is one architecture; `mixers` takes no part.

    Attributes:
        architecture: its id; `options` are the fields that it is built with.
    """

    __no_type_check__ = True
    architecture: ClassVar[str]
    options: ClassVar[tuple[str, ...]]

    position: Spec | None = None

    def build(self) -> Mixer:
        """The architecture, of these fields."""
        given = {name: getattr(self, name) for name in self.options}
        return registry.build(self.architecture, **given)

    def tiled(self) -> list[Spec]:
        """None: the architecture holds all layers."""
        return []


class Alone(nn.Module):
    """A mixer called as a block is."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(
        self,
        x: Inputs,
        state: Any = None,
        *,
        keep: Keep | None = None,
        marks: Marks | None = None,
        encoded: Context | None = None,
        encoded_keep: Keep | None = None,
    ) -> tuple[Inputs, Any]:
        if encoded is not None:
            raise LongspanError("this architecture attends to no encoder: leave encoded out.")
        return self.mixer(x, state, keep=keep, marks=marks)


class AloneModel(LongspanModel):
    """Embedding, the architecture and a final norm."""

    config: AloneConfig

    def __init__(self, config: LongspanConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([hub.settled(Alone(self.config.build()))])

    @property
    def steps(self) -> bool:
        return True


class AloneForCausalLM(LongspanForCausalLM):
    """The architecture with a next-token head."""

    config: AloneConfig
    supports_gradient_checkpointing = False

    def __init__(self, config: AloneConfig) -> None:
        config = config.alone(causal=True)  # pyright: ignore[reportAssignmentType]
        super(LongspanForCausalLM, self).__init__(config)
        self.model = AloneModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()
