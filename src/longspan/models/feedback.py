"""The Feedback Transformer (Fan et al., 2020) as a language model."""

from typing import Literal

from longspan import hub
from longspan.models.alone import AloneConfig, AloneForCausalLM


class FeedbackConfig(AloneConfig):
    """A decoder whose layers all attend to one memory of past steps; see `feedback-transformer`."""

    model_type = "longspan-feedback"
    __no_type_check__ = True
    architecture = "feedback-transformer"
    options = (
        "width",
        "heads",
        "layers",
        "memory",
        "source",
        "shared",
        "start",
        "span",
        "span_loss",
        "inner",
        "activation",
        "dropout",
    )

    memory: int = 512
    source: Literal["mix", "last"] | int = "mix"
    shared: bool = True
    start: Literal["empty", "zeros"] = "empty"
    span: int | None = None
    span_loss: float = 0.0


class FeedbackForCausalLM(AloneForCausalLM):
    """A Feedback Transformer with its next-token head.

    >>> FeedbackForCausalLM(FeedbackConfig(width=512, layers=4, heads=8, memory=256))
    """

    config: FeedbackConfig
    config_class = FeedbackConfig


hub.register(FeedbackConfig, {"AutoModelForCausalLM": FeedbackForCausalLM})
