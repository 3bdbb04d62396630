"""Image Transformer (Parmar et al., 2018): images pixel by pixel, or from smaller images."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from longspan import hub
from longspan.engines import grid
from longspan.errors import LongspanError
from longspan.models.config import LongspanConfig, Spec, split
from longspan.models.losses import cross_entropy
from longspan.models.stack import LongspanModel
from longspan.nn.positions import sinusoid

Pixels = Int[Tensor, "B channels rows columns"]
Values = Int[Tensor, "B L C"]


class ImageConfig(LongspanConfig):
    """A LongspanConfig of image-transformer layers, and the images they draw.

    Args:
        colours: `categorical`, a token and a softmax of 256 for each channel of each pixel;
            `ordinal`, a token for each pixel, and a mixture of logistics.
        mixtures: logistics in the mixture.
        classes: how many an image may be of; 0 for none.
        small: (rows, columns) of the image that another is drawn from; None for none.
        encoder_mixers: over the small image, by default full attention.
        places: positions `sinusoidal`, half the width for the row and half for the column and
            channel, or `learned`, the sum of one of each.
    """

    model_type = "longspan-image"
    __no_type_check__ = True

    mixers: Sequence[Spec] = ("image-transformer",)
    encoder_mixers: Sequence[Spec] | None = ("multi-head-attention",)
    position: Spec | None = None
    norm_order: Literal["pre", "post"] = "post"
    activation: Literal["relu", "gelu", "silu"] = "relu"
    tie_word_embeddings: bool = False
    rows: int = 32
    columns: int = 32
    channels: int = 3
    colours: Literal["categorical", "ordinal"] = "categorical"
    mixtures: int = 10
    classes: int = 0
    small: Sequence[int] | None = None
    places: Literal["sinusoidal", "learned"] = "sinusoidal"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.colours not in ("categorical", "ordinal") or self.places not in (
            "sinusoidal",
            "learned",
        ):
            raise LongspanError(
                f"colours={self.colours!r}, places={self.places!r}: expected categorical or "
                "ordinal, and sinusoidal or learned."
            )
        super().__post_init__(**kwargs)


class _Embedding(nn.Module):
    """Values of an image and the places they stand at, as vectors."""

    def __init__(self, config: ImageConfig, rows: int, columns: int) -> None:
        super().__init__()
        self.channels, self.ordinal = config.channels, config.colours == "ordinal"
        self.width = config.width
        if self.ordinal:  # a convolution over the channels with their number as stride
            self.value: nn.Module = nn.Linear(config.channels, config.width)
        else:
            self.value = nn.Embedding(256 * config.channels, config.width)
        self.rows = self.columns = None
        if config.places == "learned":
            across = columns if self.ordinal else columns * config.channels
            self.rows, self.columns = (nn.Embedding(n, config.width) for n in (rows, across))

    def values(self, values: Values, cells: Int[Tensor, "L 2"]) -> Float[Tensor, "B L E"]:
        if self.ordinal:
            return self.value(scaled(values).to(self.value.weight.dtype))  # pyright: ignore
        return self.value(values[..., 0] + 256 * (cells[:, 1] % self.channels))

    def places(self, cells: Int[Tensor, "L 2"]) -> Float[Tensor, "L E"]:
        if self.rows is not None and self.columns is not None:
            return self.rows(cells[:, 0]) + self.columns(cells[:, 1])
        return sinusoid(cells, self.width // 2).flatten(-2)


class ImageTransformerModel(hub.Pretrained):
    """p(x) = Π_t p(x_t | x_<t, small image, class) in the order of the attention's blocks.

    Inputs are shifted right by one in that order. 2D blocks come from the first mixer of the
    config; with others, or in 1D, the order is the plain raster.

    Raises:
        LongspanError: mixers of different orders; images or conditions that do not fit the config.
    """

    config: ImageConfig
    config_class = ImageConfig

    def __init__(self, config: ImageConfig) -> None:
        super().__init__(config)
        width, channels = config.width, config.channels
        self.ordinal = config.colours == "ordinal"
        across = config.columns * (1 if self.ordinal else channels)
        self.length = config.rows * across
        self.raster = self._raster(across)
        self.raster.order(self.length)  # refuses what does not fill whole blocks
        side = config.side("decoder")
        self.decoder = LongspanModel(side, cross=config.small is not None)
        self.decoder.embed_tokens = hub.settled(_Embedding(config, config.rows, config.columns))  # pyright: ignore
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.kinds = nn.Embedding(config.classes, width) if config.classes else None
        self.encoder = None
        if config.small is not None:
            self.encoder = LongspanModel(config.side("encoder"))
            rows, columns = config.small
            self.encoder.embed_tokens = hub.settled(_Embedding(config, rows, columns))  # pyright: ignore
        outputs = config.mixtures * (1 + 2 * channels + channels * (channels - 1) // 2)
        self.head = nn.Linear(width, outputs if self.ordinal else 256)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the constructor has initialised everything."""

    def _raster(self, across: int) -> grid.BlockedRaster:
        orders = set()
        for spec in self.config.mixers:
            id_, options = split(spec)
            block = options.get("block") if id_ == "image-transformer" else None
            if isinstance(block, Sequence) and options.get("columns") != across:
                raise LongspanError(
                    f"a mixer's columns are {options.get('columns')}; these images have {across}, "
                    "counting channels where each is a token."
                )
            orders.add(tuple(block) if isinstance(block, Sequence) else (1, across))
        if len(orders) > 1:
            raise LongspanError(
                f"the layers draw in different orders, by blocks of {sorted(orders)}: give all 2D "
                "layers the same block."
            )
        (block,) = orders
        return grid.BlockedRaster(across, (block[0], block[1]))

    @property
    def steps(self) -> bool:
        return self.decoder.steps

    def sequence(self, pixels: Pixels) -> Values:
        """The values in the order of generation: one of each token, or all of its channels."""
        flat = pixels.permute(0, 2, 3, 1).flatten(1, 2)
        flat = flat if self.ordinal else flat.flatten(1)[..., None]
        return flat.index_select(1, self.raster.order(self.length).to(flat.device))

    def image(self, values: Values) -> Pixels:
        """The inverse of `sequence`."""
        order = self.raster.order(self.length).argsort().to(values.device)
        flat = values.index_select(1, order)
        shape = self.config.rows, self.config.columns, self.config.channels
        return flat.reshape(len(values), *shape).permute(0, 3, 1, 2)

    def _encoded(self, small: Tensor | None) -> Tensor | None:
        if (small is None) != (self.encoder is None):
            raise LongspanError(
                "this model draws from a smaller image: give it."
                if small is None
                else "this model draws from nothing and got a smaller image: set config.small."
            )
        if self.encoder is None or small is None:
            return None
        rows, columns = self.config.small or (0, 0)
        if tuple(small.shape[1:]) != (self.config.channels, rows, columns):
            raise LongspanError(
                f"the smaller images are {tuple(small.shape[1:])}; the model was built for "
                f"{(self.config.channels, rows, columns)}, channels × rows × columns."
            )
        values = small.permute(0, 2, 3, 1).flatten(1, 2)
        values = values if self.ordinal else values.flatten(1)[..., None]
        index = torch.arange(values.shape[1], device=small.device)
        across = values.shape[1] // rows
        cells = torch.stack([index // across, index % across], -1)
        embed: Any = self.encoder.embed_tokens
        x = embed.values(values, cells) + embed.places(cells)
        return self.encoder(inputs_embeds=x, return_dict=True).last_hidden_state

    def _inputs(self, values: Values, first: int, last: int, kinds: Tensor | None) -> Tensor:
        """Inputs of steps first … last − 1, `values` being those before each, if there is one."""
        if (kinds is None) != (self.kinds is None):
            raise LongspanError("give classes if, and only if, the config has some.")
        embed: Any = self.decoder.embed_tokens
        cells = self.raster.cells(torch.arange(max(first - 1, 0), last, device=values.device))
        before = cells[: values.shape[1]]
        x = embed.values(values, before)
        if first == 0:
            x = torch.cat([self.start.expand(len(x), 1, -1), x], 1)
        x = x + embed.places(cells[-x.shape[1] :]).to(x.dtype)
        return x if self.kinds is None else x + self.kinds(kinds)[:, None]

    def forward(
        self,
        pixels: Pixels,
        small: Int[Tensor, "B channels r c"] | None = None,
        classes: Int[Tensor, "B"] | None = None,
    ) -> CausalLMOutput:
        """What is predicted of every token, B L outputs in the order of generation, and the mean
        loss in nats a channel (÷ ln 2: bits a dimension)."""
        config = self.config
        if tuple(pixels.shape[1:]) != (config.channels, config.rows, config.columns):
            raise LongspanError(
                f"images are {tuple(pixels.shape[1:])}; the model was built for "
                f"{(config.channels, config.rows, config.columns)}, channels × rows × columns."
            )
        values = self.sequence(pixels)
        x = self._inputs(values[:, :-1], 0, self.length, classes)
        output = self.decoder(
            inputs_embeds=x, encoded=self._encoded(small), use_cache=False, return_dict=True
        )
        logits = self.head(output.last_hidden_state)
        if self.ordinal:
            loss = -mixture_log_likelihood(logits, values).mean() / config.channels
        else:
            loss = cross_entropy(logits, values[..., 0])
        return CausalLMOutput(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        small: Int[Tensor, "B channels r c"] | None = None,
        classes: Int[Tensor, "B"] | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        fast: bool = True,
    ) -> Pixels:
        """Images drawn token by token.

        Args:
            fast: with a carried state, one token a step; else the whole image each time. Both give
                the same images for the same generator, but for rounding.
        """
        channels = self.config.channels if self.ordinal else 1
        values = torch.zeros(count, 0, channels, dtype=torch.long, device=self.start.device)
        encoded = self._encoded(small)
        cache = hub.StateCache() if fast and self.steps else None
        for t in range(self.length):
            if cache is None:
                x = self._inputs(values, 0, t + 1, classes)
            else:
                x = self._inputs(values[:, -1:] if t else values, t, t + 1, classes)
            output = self.decoder(
                inputs_embeds=x,
                encoded=encoded,
                past_key_values=cache,
                use_cache=cache is not None,
                return_dict=True,
            )
            logits = self.head(output.last_hidden_state[:, -1])
            drawn = draw(logits, channels, temperature, generator, mixture=self.ordinal)
            values = torch.cat([values, drawn[:, None]], 1)
        return self.image(values)


def scaled(values: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """0 … 255 → −1 … 1."""
    return values / 127.5 - 1


def _mixture(outputs: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits … K, means and log scales … C K, coefficients … C(C − 1)/2 K."""
    pairs = channels * (channels - 1) // 2
    parts = outputs.unflatten(-1, (1 + 2 * channels + pairs, -1))
    logits, means, scales, mixed = parts.split([1, channels, channels, pairs], -2)
    return logits[..., 0, :], means, scales.clamp(min=-7), mixed.tanh()


def _mean(c: int, means: Tensor, mixed: Tensor, x: Sequence[Tensor]) -> Tensor:
    """The mean of channel c of each logistic, given the channels before it (… 1 each)."""
    first = c * (c - 1) // 2
    return means[..., c, :] + sum(
        (mixed[..., first + d, :] * x[d] for d in range(c)),
        start=torch.zeros_like(means[..., 0, :]),
    )


def mixture_log_likelihood(
    outputs: Float[Tensor, "B L outputs"], values: Int[Tensor, "B L C"]
) -> Float[Tensor, "B L"]:
    """ln p of a pixel under a discretised mixture of logistics (Salimans et al., 2017, Sec. 2):

        p(x) = Σ_k π_k Π_c [σ((x_c + 1/255 − μ_kc)/s_kc) − σ((x_c − 1/255 − μ_kc)/s_kc)],

    values at −1 … 1, the tails counted to 0 and to 255, μ of a channel linear in those before it.
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    logits, means, scales, mixed = _mixture(outputs, values.shape[-1])
    x = scaled(values).to(outputs.dtype)[..., None]  # B L C 1
    total = logits.log_softmax(-1)
    for c in range(values.shape[-1]):
        here, log_scale = x[..., c, :], scales[..., c, :]
        apart = here - _mean(c, means, mixed, x.unbind(-2))
        up, down = ((apart + side / 255) * (-log_scale).exp() for side in (1, -1))
        between = up.sigmoid() - down.sigmoid()
        middle = apart * (-log_scale).exp()
        # Where the bin holds nearly nothing, the density in its middle times its width.
        thin = middle - log_scale - 2 * F.softplus(middle) + (torch.tensor(2 / 255)).log()
        inside = torch.where(between > 1e-5, between.clamp(min=1e-12).log(), thin)
        value = values[..., c, None]
        edge = torch.where(value == 0, up - F.softplus(up), -F.softplus(down))
        total = total + torch.where((value == 0) | (value == 255), edge, inside)
    return total.logsumexp(-1)


def draw(
    outputs: Float[Tensor, "B outputs"],
    channels: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    mixture: bool,
) -> Int[Tensor, "B C"]:
    """A value of each channel: from a mixture of logistics, or of one channel from a softmax."""
    outputs = outputs.double()

    def uniform(like: Tensor) -> Tensor:
        drawn = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        return drawn.clamp(1e-12, 1 - 1e-12)

    if not mixture:
        noise = -(-uniform(outputs).log()).log()
        return (outputs / temperature + noise).argmax(-1, keepdim=True)
    logits, means, scales, mixed = _mixture(outputs, channels)
    noise = -(-uniform(logits).log()).log()
    chosen = (logits / temperature + noise).argmax(-1, keepdim=True)
    x: list[Tensor] = []
    for c in range(channels):
        middle = _mean(c, means, mixed, x).gather(-1, chosen)
        u = uniform(middle)
        spread = scales[..., c, :].gather(-1, chosen).exp() * temperature
        x.append((middle + spread * (u.log() - (1 - u).log())).clamp(-1, 1))
    return ((torch.cat(x, -1) + 1) * 127.5).round().long()


hub.register(ImageConfig, {"AutoModel": ImageTransformerModel})
