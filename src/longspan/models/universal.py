"""Universal Transformers (Dehghani et al., 2018): the layers of a stack, step after step."""

from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor, nn

from longspan import hub
from longspan.errors import LongspanError
from longspan.mechanisms.adaptive_depth.universal_transformer import (
    Recurrence,
    Transition,
    driver,
)
from longspan.models.config import LongspanConfig, Spec
from longspan.models.heads import (
    LongspanForCausalLM,
    LongspanForMaskedLM,
    LongspanForSequenceClassification,
)
from longspan.models.seq2seq import LongspanForSeq2SeqLM
from longspan.models.stack import LongspanModel

Taken = Int[Tensor, "B L"]


class UniversalConfig(LongspanConfig):
    """A LongspanConfig whose layers, by default one, are gone through step after step.

    Args:
        steps, steps_eval: T in training and in evaluation; with halting the most.
        encoder_steps, encoder_steps_eval: of an encoder's own, by default those of the decoder.
        halting: options of ACT as the paper has it, `{}` for the defaults, or of another driver
            that `id` names; None for a fixed T.
        transition: a feed-forward, or two separable convolutions of `taps` tokens.
        coordinates: sinusoids of the position at each step, the first, or none.
        time: of the step, sinusoidal, learned, or none.

    >>> UniversalConfig(width=512, heads=8, steps=6, halting={"cost": 0.01})
    """

    model_type = "longspan-universal"
    __no_type_check__ = True

    layers: int = 1
    steps: int = 6
    steps_eval: int | None = None
    encoder_steps: int | None = None
    encoder_steps_eval: int | None = None
    halting: dict[str, Any] | None = None
    transition: Literal["dense", "separable"] = "dense"
    taps: list[int] | tuple[int, ...] = (3, 31)
    coordinates: Literal["each", "first", "none"] = "each"
    time: Literal["sinusoidal", "learned", "none"] = "sinusoidal"
    position: Spec | None = None
    norm_order: Literal["pre", "post"] = "post"
    activation: Literal["relu", "gelu", "silu"] = "relu"

    def __post_init__(self, **kwargs: Any) -> None:
        for name, known in (
            ("transition", ("dense", "separable")),
            ("coordinates", ("each", "first", "none")),
            ("time", ("sinusoidal", "learned", "none")),
        ):
            if getattr(self, name) not in known:
                raise LongspanError(
                    f"{name} is {getattr(self, name)!r}; expected {', '.join(known)}."
                )
        super().__post_init__(**kwargs)

    def side(self, which: Literal["encoder", "decoder"]) -> "UniversalConfig":
        """The config of one stack, with its own number of steps."""
        config: Any = super().side(which)
        if which == "encoder" and self.encoder_steps is not None:
            config.steps, config.steps_eval = self.encoder_steps, self.encoder_steps_eval
        config.encoder_steps = config.encoder_steps_eval = None
        return config


class UniversalModel(LongspanModel):
    """Embedding and the layers, gone through `steps` times; states are kept by step and layer."""

    config: UniversalConfig

    def __init__(self, config: LongspanConfig, *, cross: bool = False) -> None:
        super().__init__(config, cross=cross)
        config = self.config
        blocks: Any = list(self.layers)
        transitions = [self._transition() for _ in blocks if config.transition == "separable"]
        body = Recurrence(
            blocks,
            width=config.width,
            steps=config.steps,
            steps_eval=config.steps_eval,
            halting=driver(config.halting, width=config.width),
            transitions=transitions,
            coordinates=config.coordinates,
            time=config.time,
        )
        self.layers = nn.ModuleList([hub.settled(body)])
        self.post_init()

    def _feed_forward(self) -> Any:
        return super()._feed_forward() if self.config.transition == "dense" else None

    def _transition(self) -> Transition:
        config = self.config
        built = Transition(
            config.width,
            inner=config.inner or 4 * config.width,
            taps=config.taps,
            causal=self.causal,
            dropout=config.dropout,
        )
        return built.apply(self._init_weights)

    @property
    def taken(self) -> Taken | None:
        """How many steps each position of the last call took, 0 for padding; None before any."""
        body = self.layers[0]
        assert isinstance(body, Recurrence)
        return body.taken


class UniversalForCausalLM(LongspanForCausalLM):
    """A decoder that predicts the next token.

    >>> model = UniversalForCausalLM(UniversalConfig(steps=6, halting={}))
    >>> model(tokens, labels=tokens).auxiliary, model.model.taken
    """

    config: UniversalConfig

    def __init__(self, config: UniversalConfig) -> None:
        super().__init__(config)
        self.model = UniversalModel(self.config)
        self.post_init()


class UniversalForMaskedLM(LongspanForMaskedLM):
    """An encoder that predicts masked tokens."""

    config: UniversalConfig

    def __init__(self, config: UniversalConfig) -> None:
        super().__init__(config)
        self.model = UniversalModel(self.config)
        self.post_init()


class UniversalForSequenceClassification(LongspanForSequenceClassification):
    """An encoder that labels sequences."""

    config: UniversalConfig

    def __init__(self, config: UniversalConfig) -> None:
        super().__init__(config)
        self.model = UniversalModel(self.config)
        self.post_init()


class UniversalForSeq2SeqLM(LongspanForSeq2SeqLM):
    """An encoder and a decoder, each with its own number of steps; the decoder attends to the
    encoder's last states in each of its own."""

    config: UniversalConfig

    def __init__(self, config: UniversalConfig) -> None:
        super().__init__(config)
        self.encoder = UniversalModel(self.config.side("encoder"))
        self.decoder = UniversalModel(self.config.side("decoder"), cross=True)
        self.post_init()


hub.register(
    UniversalConfig,
    {
        "AutoModel": UniversalModel,
        "AutoModelForCausalLM": UniversalForCausalLM,
        "AutoModelForMaskedLM": UniversalForMaskedLM,
        "AutoModelForSeq2SeqLM": UniversalForSeq2SeqLM,
        "AutoModelForSequenceClassification": UniversalForSequenceClassification,
    },
)
