"""Probabilistic forecasts of time series by a decoder (Li et al., 2019)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from longspan import hub
from longspan.errors import LongspanError
from longspan.models.config import LongspanConfig, Spec
from longspan.models.stack import LongspanModel
from longspan.nn import MultiHead
from longspan.nn.convolved import Convolved

Series = Float[Tensor, "B T"]
Covariates = Float[Tensor, "B T C"]


class ForecastConfig(LongspanConfig):
    """A LongspanConfig whose vocabulary is the series, and whose tokens are their values.

    Args:
        vocab_size: series with an embedding of their own.
        covariates: numbers known beforehand at every time (hour, weekday, age).
        taps: k of the convolved queries and keys; 1 for ordinary attention.
        floor: the least deviation, in units of a series' scale.
        head_width: by default E for each head, as in the released code.
    """

    model_type = "longspan-forecast"
    __no_type_check__ = True

    vocab_size: int = 1
    width: int = 160
    layers: int = 3
    heads: int = 8
    mixers: Sequence[Spec] = ("logsparse-transformer",)
    position: Spec | None = "learned-position"
    tie_word_embeddings: bool = False
    covariates: int = 0
    taps: int = 6
    floor: float = 1e-4

    def __post_init__(self, **kwargs: Any) -> None:
        self.head_width = self.head_width or self.width
        super().__post_init__(**kwargs)


@dataclass
class Forecast(ModelOutput):
    """The normal distribution of every value given those before it.

    loss: mean negative log-likelihood in nats, in the values' own units. scale: B, what each series
    was divided by.
    """

    loss: Tensor | None = None
    mean: Tensor | None = None
    deviation: Tensor | None = None
    scale: Tensor | None = None
    past_key_values: Any = None


class ForecastModel(hub.Pretrained):
    """p(z_t | z_<t, x_≤t) = N(μ_t, σ_t), σ = log(1 + e^s) + floor (Sec. 3 and 4).

    The input at t is the value before it, the covariates of t, a learned position and the series'
    embedding. Values are divided by the scale ν = 1 + mean |z| of the history (Salinas et al.,
    2020, Sec. 3.3).
    """

    config: ForecastConfig
    config_class = ForecastConfig

    def __init__(self, config: ForecastConfig) -> None:
        super().__init__(config)
        self.model = LongspanModel(config.alone(causal=True))
        for layer in self.model.layers:
            assert isinstance(layer, hub.Layer)
            if config.taps > 1 and isinstance(layer.mixer, MultiHead):
                layer.mixer = hub.settled(Convolved(layer.mixer, taps=config.taps))
        self.input = nn.Linear(1 + config.covariates, config.width)
        self.head = nn.Linear(config.width, 2)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the constructor has initialised everything."""

    @property
    def steps(self) -> bool:
        return self.model.steps

    def forward(
        self,
        values: Series,
        covariates: Covariates | None = None,
        series: Int[Tensor, "B"] | None = None,
        seen: Bool[Tensor, "B T"] | None = None,
        history: int | None = None,
    ) -> Forecast:
        """Teacher-forced distributions of all values, and their loss.

        Args:
            series: numbers of the series, by default 0.
            seen: True where there is a value; the others (before a short series starts) are
                neither read nor scored.
            history: the scale is that of the first so many values, by default of all.

        Raises:
            LongspanError: covariates that do not fit the values or the config.
        """
        if seen is not None:
            values = values.masked_fill(~seen, 0)
        scale = scale_of(values[:, :history], None if seen is None else seen[:, :history])
        scaled = values / scale[:, None]
        mean, deviation, _ = self._distribution(
            F.pad(scaled, (1, -1)), covariates, series, seen, None
        )
        nats = (scaled - mean).square() / (2 * deviation.square()) + deviation.log()
        nats = nats + math.log(2 * math.pi) / 2 + scale.log()[:, None]
        loss = nats.mean() if seen is None else nats[seen].sum() / seen.sum().clamp(min=1)
        return Forecast(
            loss=loss, mean=mean * scale[:, None], deviation=deviation * scale[:, None], scale=scale
        )

    def _distribution(
        self,
        before: Tensor,
        covariates: Tensor | None,
        series: Tensor | None,
        seen: Tensor | None,
        cache: hub.StateCache | None,
    ) -> tuple[Tensor, Tensor, hub.StateCache | None]:
        """Mean and deviation in units of the scale, given the scaled value before each."""
        expected = (*before.shape, self.config.covariates)
        inputs = before[..., None]
        if self.config.covariates or covariates is not None:
            if covariates is None or tuple(covariates.shape) != expected:
                got = None if covariates is None else tuple(covariates.shape)
                raise LongspanError(
                    f"covariates are {got}; expected {expected}, series × times × "
                    "config.covariates."
                )
            inputs = torch.cat([inputs, covariates.to(before.dtype)], -1)
        if series is None:
            series = torch.zeros(len(before), dtype=torch.long, device=before.device)
        x = self.input(inputs) + self.model.embed_tokens(series)[:, None]
        output = self.model(
            inputs_embeds=x,
            attention_mask=seen,
            past_key_values=cache,
            use_cache=cache is not None,
            return_dict=True,
        )
        mean, raw = self.head(output.last_hidden_state).unbind(-1)
        return mean, F.softplus(raw) + self.config.floor, output.past_key_values

    @torch.no_grad()
    def sample(
        self,
        values: Series,
        covariates: Float[Tensor, "B T+{horizon} C"] | None = None,
        series: Int[Tensor, "B"] | None = None,
        seen: Bool[Tensor, "B T"] | None = None,
        *,
        horizon: int,
        count: int = 100,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "N B horizon"]:
        """Paths of the next `horizon` values, drawn one after the other, each from the last.

        Args:
            covariates: of the history and of the horizon.
        """
        length = values.shape[1]
        if seen is not None:
            values = values.masked_fill(~seen, 0)
            seen = F.pad(seen, (0, 1), value=True)
        scale = scale_of(values, None if seen is None else seen[:, :-1])
        before = F.pad(values / scale[:, None], (1, 0))
        if series is None:
            series = torch.zeros(len(values), dtype=torch.long, device=values.device)

        def known(start: int, stop: int) -> Tensor | None:
            return None if covariates is None else covariates[:, start:stop]

        mean, deviation, cache = self._distribution(
            before, known(0, length + 1), series, seen, hub.StateCache()
        )
        assert cache is not None
        cache.batch_repeat_interleave(count)
        series = series.repeat_interleave(count, 0)
        if covariates is not None:
            covariates = covariates.repeat_interleave(count, 0)
        mean, deviation = (t[:, -1].repeat_interleave(count, 0) for t in (mean, deviation))
        drawn = []
        for t in range(length, length + horizon):
            noise = torch.randn(mean.shape, generator=generator, device=mean.device).to(mean)
            drawn.append(mean + deviation * noise)
            if t + 1 < length + horizon:
                mean, deviation, _ = self._distribution(
                    drawn[-1][:, None].to(values.dtype), known(t + 1, t + 2), series, None, cache
                )
                mean, deviation = mean[:, 0], deviation[:, 0]
        paths = torch.stack(drawn, 1).unflatten(0, (len(values), count))
        return paths.transpose(0, 1) * scale[:, None]


def scale_of(values: Series, seen: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "B"]:
    """ν = 1 + mean |z| of each row."""
    count = values.shape[1] if seen is None else seen.sum(1)
    return 1 + values.abs().sum(1) / torch.as_tensor(count, device=values.device).clamp(min=1).to(
        values
    )


def quantile_risk(
    target: Float[Tensor, "*shape"], paths: Float[Tensor, "N *shape"], rho: float
) -> float:
    """R_ρ = 2 Σ (ρ − 1[z ≤ ẑ]) (z − ẑ) / Σ |z|, ẑ the ρ-quantile of the sampled paths (Sec. 5).

    Raises:
        LongspanError: a quantile outside 0 … 1.
    """
    if not 0 < rho < 1:
        raise LongspanError(f"a quantile of {rho} was asked for; expected one between 0 and 1.")
    found = paths.quantile(rho, 0)
    losses = (rho - (target <= found).to(target.dtype)) * (target - found)
    return (2 * losses.sum() / target.abs().sum()).item()


class Windows(NamedTuple):
    """Cuts of some series, with where they come from."""

    values: Float[Tensor, "N T"]
    series: Int[Tensor, "N"]
    start: Int[Tensor, "N"]


def windows(
    values: Float[Tensor, "series times"],
    length: int,
    count: int,
    *,
    generator: torch.Generator | None = None,
) -> Windows:
    """Training windows, drawn in proportion to their scale ν (Salinas et al., 2020, Sec. 3.4).

    Raises:
        LongspanError: windows longer than the series.
    """
    if length > values.shape[1]:
        raise LongspanError(
            f"windows of {length} were asked for of series of {values.shape[1]}: shorten them."
        )
    cut = values.unfold(1, length, 1)  # series starts T
    scale = scale_of(cut.flatten(0, 1))
    drawn = torch.multinomial(scale, count, replacement=True, generator=generator)
    series, start = drawn // cut.shape[1], drawn % cut.shape[1]
    return Windows(cut[series, start], series, start)


hub.register(ForecastConfig, {"AutoModelForTimeSeriesPrediction": ForecastModel})
