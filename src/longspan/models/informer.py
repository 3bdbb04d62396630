"""Informer (Zhou et al., 2021): forecasts of long time series, all steps ahead in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from longspan import hub, registry
from longspan.errors import LongspanError
from longspan.models.building import mixer
from longspan.models.config import LongspanConfig, Spec
from longspan.nn import Attention, FeedForward, MultiHead
from longspan.shapes import Inputs, Keep, Keys, Outputs, Queries, Values

Series = Float[Tensor, "B T C"]


class InformerConfig(LongspanConfig):
    """A LongspanConfig for forecasts; `layers` are the decoder's, `encoder_layers` the encoder's.

    Args:
        channels: numbers at each past step. targets: forecast at each step, by default all of them.
        time_features: numbers that tell a time (`calendar` "linear"), or the sizes of tables for
            its whole-numbered parts: month, day, weekday, hour ("tables").
        start: past steps handed to the decoder (L_token). horizon: steps ahead (L_pred).
        distil: halve the length between encoder layers. replicas: stacks in the encoder, each on
            the last half of the one before and a layer shorter.
        mix: the released code's decoder, in which heads and steps change places before the output
            projection of self-attention, so that steps ahead see later ones.
    """

    model_type = "longspan-informer"
    __no_type_check__ = True

    channels: int = 7
    targets: int | None = None
    time_features: int | Sequence[int] = (13, 32, 7, 24)
    calendar: Literal["tables", "linear"] = "tables"
    start: int = 48
    horizon: int = 24
    width: int = 512
    heads: int = 8
    layers: int = 1
    encoder_layers: int | None = 2
    mixers: Sequence[Spec] = ("informer",)
    position: Spec | None = None
    norm_order: Literal["pre", "post"] = "post"
    dropout: float = 0.05
    distil: bool = True
    replicas: int = 1
    mix: bool = False


@dataclass
class ForecastOutput(ModelOutput):
    """prediction: B × horizon × targets; loss: mean square error, where labels were given."""

    loss: Tensor | None = None
    prediction: Tensor | None = None


class Distil(nn.Module):
    """MaxPool(ELU(BN(Conv1d(x)))): width 3, circular; stride 2 halves the length (Eq. 5)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Inputs) -> Float[Tensor, "B N E"]:
        y = F.elu(self.norm(self.conv(x.transpose(1, 2))))
        return F.max_pool1d(y, 3, stride=2, padding=1).transpose(1, 2)


class Embedding(nn.Module):
    """Conv1d(values) + sinusoid(step) + time: circular, width 3; tables or linear (App. B)."""

    def __init__(self, config: InformerConfig) -> None:
        super().__init__()
        sizes, tables = config.time_features, config.calendar == "tables"
        if tables == isinstance(sizes, int):
            raise LongspanError(
                f"calendar='{config.calendar}' got time_features={sizes}: tables need one size "
                "each, a linear map the number of features."
            )
        self.values = nn.Conv1d(
            config.channels, config.width, 3, padding=1, padding_mode="circular"
        )
        nn.init.kaiming_normal_(self.values.weight, nonlinearity="leaky_relu")
        self.position = registry.build("sinusoidal-position")
        each = [] if isinstance(sizes, int) else sizes
        self.tables = nn.ModuleList(nn.Embedding(size, config.width) for size in each)
        self.linear = None
        if isinstance(sizes, int):
            self.linear = nn.Linear(sizes, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, values: Series, time: Tensor) -> Inputs:
        x = self.values(values.transpose(1, 2)).transpose(1, 2)
        if self.linear is not None:
            x = x + self.linear(time.to(x.dtype))
        for table, part in zip(self.tables, time.unbind(-1), strict=self.linear is None):
            x = x + table(part.long())
        return self.dropout(self.position.embed(x))


class Mixed(Attention):
    """The outputs B H L V read as B L H V, in the released code's order of memory."""

    def __init__(self, inner: Attention) -> None:
        super().__init__(causal=inner.causal)
        self.inner = inner

    def forward(
        self, q: Queries, k: Keys, v: Values, state: None = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, None]:
        o, _ = self.inner(q, k, v, keep=keep)
        batch, heads, length, width = o.shape
        return o.reshape(batch, length, heads, width).transpose(1, 2), None


class Encoder(nn.Module):
    """Blocks with a `Distil` between any two; `replicas` of it on ever shorter ends (Sec. 3)."""

    def __init__(self, config: InformerConfig) -> None:
        super().__init__()
        side = config.side("encoder")
        if not 1 <= config.replicas <= side.layers:
            raise LongspanError(
                f"replicas={config.replicas} with {side.layers} encoder layers: each replica has a "
                "layer less, so give 1 to as many as there are layers."
            )
        stacks = range(config.replicas)
        self.stacks = nn.ModuleList(
            nn.ModuleList(_block(spec, config, causal=False) for spec in side.tiled()[less:])
            for less in stacks
        )
        self.distils = nn.ModuleList(
            nn.ModuleList(
                Distil(config.width) for _ in range(config.distil * (side.layers - less - 1))
            )
            for less in stacks
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Inputs) -> Float[Tensor, "B N E"]:
        outs = []
        for n, (blocks, distils) in enumerate(zip(self.stacks, self.distils, strict=True)):
            y = x[:, -max(1, x.shape[1] >> n) :]
            halves: list[Any] = list(distils)  # pyright: ignore[reportArgumentType]
            for block in blocks:  # pyright: ignore[reportGeneralTypeIssues]
                y, _ = block(y)
                y = halves.pop(0)(y) if halves else y
            outs.append(self.norm(y))
        return torch.cat(outs, 1)


def _block(spec: Spec, config: InformerConfig, *, causal: bool) -> hub.Layer:
    built = mixer(spec, config=config, causal=causal)
    cross = None
    if causal:
        full = registry.build("multi-head-attention")
        cross = MultiHead(full, width=config.width, heads=config.heads)
        if config.mix and isinstance(built, MultiHead):
            built.attention = Mixed(built.attention)
    return hub.Layer(
        built,
        FeedForward(
            config.width,
            inner=config.inner,
            activation=config.activation,
            dropout=config.dropout,
        ),
        width=config.width,
        order=config.norm_order,
        dropout=config.dropout,
        cross=cross,
    )


class InformerForForecasting(hub.Pretrained):
    """An encoder of the past; a decoder whose input is the last known steps and zeros (Sec. 3.4).

    Every step ahead is read off in one forward pass. With `labels` it gives the mean square error,
    so that it trains under `transformers.Trainer`.

    Raises:
        LongspanError: replicas or time features that do not fit, or a past shorter than `start`.

    >>> model = InformerForForecasting(InformerConfig(channels=7, start=48, horizon=24))
    """

    config: InformerConfig
    config_class = InformerConfig
    accepts_loss_kwargs = False
    _is_stateful = False

    def __init__(self, config: InformerConfig) -> None:
        super().__init__(config)
        self.past, self.ahead = Embedding(config), Embedding(config)
        self.encoder = Encoder(config)
        self.decoder = nn.ModuleList(_block(spec, config, causal=True) for spec in config.tiled())
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, config.targets or config.channels)
        hub.settled(self)
        self.post_init()

    @hub.can_return_tuple
    def forward(
        self,
        past_values: Series,
        past_time: Float[Tensor, "B T F"] | Tensor,
        future_time: Tensor,
        labels: Float[Tensor, "B P targets"] | None = None,
    ) -> ForecastOutput:
        """Forecasts of `horizon` steps.

        Args:
            past_time, future_time: B T F and B × horizon × F, numbers or the parts of a calendar.
            labels: what came, in the order of the outputs.
        """
        start, horizon = self.config.start, self.config.horizon
        if past_values.shape[1] < start or future_time.shape[1] != horizon:
            raise LongspanError(
                f"{past_values.shape[1]} past and {future_time.shape[1]} future steps were given: "
                f"expected at least start={start}, and horizon={horizon}."
            )
        encoded = self.encoder(self.past(past_values, past_time))
        known = past_values[:, past_values.shape[1] - start :]
        times = torch.cat([past_time[:, past_time.shape[1] - start :], future_time], 1)
        x = self.ahead(F.pad(known, (0, 0, 0, horizon)), times)
        for block in self.decoder:
            x, _ = block(x, encoded=encoded)
        prediction = self.output(self.norm(x[:, start:]))
        loss = None if labels is None else F.mse_loss(prediction, labels)
        return ForecastOutput(loss=loss, prediction=prediction)


hub.register(InformerConfig, {"AutoModelForTimeSeriesPrediction": InformerForForecasting})
