"""Block-Recurrent Transformers (Hutchins et al., 2022) whose layers all read the one state."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from longspan import hub
from longspan.errors import LongspanError
from longspan.mechanisms.recurrent_memory.block_recurrent_transformer import BlockRecurrent, Slots
from longspan.models.config import LongspanConfig, Spec
from longspan.models.heads import LongspanForCausalLM
from longspan.models.stack import LongspanModel
from longspan.nn import blockwise, detach
from longspan.shapes import Context, Inputs, Keep, Marks


class BlockRecurrentConfig(LongspanConfig):
    """A stack of window attention with one recurrent layer.

    Args:
        recurrent: which layer carries the state, from 0; by default the third from the top.
        feedback: every layer reads the state that the last block left (Sec. 3.4).
        window, states, gate, layout: of `block-recurrent-transformer`.
    """

    model_type = "longspan-block-recurrent"
    __no_type_check__ = True

    mixers: Sequence[Spec] = ("block-recurrent-transformer",)
    position: Spec | None = None
    causal: bool | None = True
    layers: int = 12
    window: int = 512
    states: int = 512
    gate: Literal["fixed", "lstm", "full"] = "fixed"
    layout: Literal["dual", "single", "skip"] = "skip"
    recurrent: int | None = None
    feedback: bool = False

    @property
    def carrier(self) -> int:
        """The number of the recurrent layer."""
        return max(self.layers - 3, 0) if self.recurrent is None else self.recurrent

    def tiled(self) -> list[Spec]:
        """Window attention, and the recurrent layer among it."""
        if not 0 <= self.carrier < self.layers:
            raise LongspanError(
                f"recurrent={self.carrier} names none of {self.layers} layers: count from 0."
            )
        common = {"id": "block-recurrent-transformer", "window": self.window}
        other = {"states": self.states if self.feedback else 0, "writes": False}
        carries = {"states": self.states, "gate": self.gate, "layout": self.layout}
        return [common | (carries if n == self.carrier else other) for n in range(self.layers)]


class FeedbackStack(nn.Module):
    """Layers run block by block, so that all of them read what the last block made of the state.

    The state is the slots and each layer's frame.
    """

    def __init__(self, layers: Sequence[nn.Module], carrier: int) -> None:
        super().__init__()
        self.layers, self.carrier = nn.ModuleList(layers), carrier

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
        layers: Any = list(self.layers)
        mixer: BlockRecurrent = layers[self.carrier].mixer
        x, keep = blockwise.alone(mixer, x, keep, encoded, marks)
        if state is None:
            begun = [layer.mixer.begin(x) for layer in layers]
            state = begun[self.carrier].slots, tuple(each.frame for each in begun)
        slots, frames = state
        cut, outs = blockwise.plan(frames[0].seen, keep, mixer.window), []
        for new, visit in zip(cut.split(x), cut.visits, strict=True):
            new, slots, frames = self._block(layers, new, slots, frames, visit)
            outs.append(new)
        return cut.join(outs, x), detach((slots, frames))

    def _block(
        self, layers: Any, x: Inputs, slots: Slots, frames: Any, visit: blockwise.Visit
    ) -> tuple[Inputs, Slots, Any]:
        read: Tensor = slots + layers[self.carrier].mixer.start
        left, carried = slots, []
        for n, (layer, frame) in enumerate(zip(layers, frames, strict=True)):
            shown = None if n == self.carrier else read
            y, changed, frame = layer.mixer.visit(layer.mixer_norm(x), slots, frame, visit, shown)
            x = x + layer.dropout(y)
            x = x + layer.dropout(layer.feed_forward(layer.feed_forward_norm(x)))
            left = changed if shown is None else left
            carried.append(frame)
        return x, left, tuple(carried)


class BlockRecurrentModel(LongspanModel):
    """Embedding, the stack and a final norm.

    Raises:
        LongspanError: feedback with norms after the sub-layers.
    """

    config: BlockRecurrentConfig

    def __init__(self, config: LongspanConfig) -> None:
        super().__init__(config)
        if self.config.feedback:
            if config.norm_order != "pre":
                raise LongspanError("feedback runs with norm_order='pre': leave it as it is.")
            self.layers = nn.ModuleList([FeedbackStack(list(self.layers), self.config.carrier)])


class BlockRecurrentForCausalLM(LongspanForCausalLM):
    """A Block-Recurrent Transformer with its next-token head.

    >>> BlockRecurrentForCausalLM(BlockRecurrentConfig(width=1024, layers=12, feedback=True))
    """

    config: BlockRecurrentConfig
    supports_gradient_checkpointing = False

    def __init__(self, config: BlockRecurrentConfig) -> None:
        config = config.alone(causal=True)  # pyright: ignore[reportAssignmentType]
        super(LongspanForCausalLM, self).__init__(config)
        self.model = BlockRecurrentModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()


hub.register(
    BlockRecurrentConfig,
    {"AutoModel": BlockRecurrentModel, "AutoModelForCausalLM": BlockRecurrentForCausalLM},
)
