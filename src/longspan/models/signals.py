"""Classes of, or numbers for, long sampled signals: a deep stack that can be resampled."""

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from longspan import hub
from longspan.errors import LongspanError
from longspan.models.config import LongspanConfig, Spec
from longspan.models.heads import LongspanForSequenceClassification
from longspan.models.stack import LongspanModel


class SignalConfig(LongspanConfig):
    """A LongspanConfig for signals of some channels, one mixer a layer and no feed-forwards.

    Args:
        channels: numbers a sample.
        rate: time between samples, in units of what the mixers were built for.
    """

    model_type = "longspan-signals"
    __no_type_check__ = True

    channels: int = 1
    rate: float = 1.0
    mixers: Sequence[Spec] = ("lssl",)
    position: Spec | None = None
    causal: bool | None = True
    pooling: Literal["mean", "first", "last"] | None = "mean"


class SignalModel(LongspanModel):
    """A linear embedding of samples, blocks x ← x + mixer(norm(x)), and a final norm."""

    config: SignalConfig

    def __init__(self, config: SignalConfig) -> None:
        super().__init__(config)
        self.embed_tokens = hub.settled(nn.Linear(config.channels, config.width))
        self.post_init()

    def _feed_forward(self) -> Any:
        return None


class SignalClassifier(LongspanForSequenceClassification):
    """One class, several, or numbers for a whole signal (Gu et al., 2021, Sec. 5).

    >>> model = SignalClassifier(SignalConfig(layers=6, width=256, num_labels=10))
    >>> model.resample(0.5)  # for data sampled twice as densely
    """

    config: SignalConfig

    def __init__(self, config: SignalConfig) -> None:
        super(LongspanForSequenceClassification, self).__init__(config)
        self.model = SignalModel(config)
        self.pooling = config.pooling or "mean"
        self.dropout = nn.Dropout(config.dropout)
        self.score = nn.Linear(config.width, config.num_labels or 1)
        if config.rate != 1:
            self.resample(config.rate)
        self.post_init()

    def resample(self, rate: float) -> None:
        """Set the time between samples, in training or after it; the config keeps it.

        Raises:
            LongspanError: a rate that is not positive; a mixer that knows no time between samples.
        """
        mixers: list[Any] = [layer.mixer for layer in self.model.layers]  # pyright: ignore
        deaf = sorted({type(mixer).__name__ for mixer in mixers if not hasattr(mixer, "rate")})
        if rate <= 0 or deaf:
            raise LongspanError(
                f"rate={rate} was asked of a model with mixers without a rate "
                f"({', '.join(deaf) or 'none'}): give a positive rate, and state spaces as mixers."
            )
        for mixer in mixers:
            mixer.rate = rate
        self.config.rate = rate

    @hub.can_return_tuple
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        values: Float[Tensor, "B L channels"],
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits B × labels, and the loss that the labels or `config.problem_type` ask for."""
        return super().forward(
            attention_mask=attention_mask,
            inputs_embeds=self.model.embed_tokens(values),
            labels=labels,
        )


hub.register(
    SignalConfig,
    {"AutoModel": SignalModel, "AutoModelForSequenceClassification": SignalClassifier},
)
