"""Axial layers for grids of any number of axes, and the Axial Transformer (Ho et al., 2019)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from longspan import hub, registry
from longspan.errors import LongspanError
from longspan.nn import Block, FeedForward, MultiHead

Maps = Float[Tensor, "B rows columns E"]
Slices = Int[Tensor, "B slices rows columns"]


def _lines(x: Tensor, axis: int) -> Tensor:
    """B *grid E → lines × n × E along one axis of the grid."""
    moved = x.movedim(1 + axis, -2)
    return moved.reshape(-1, *moved.shape[-2:])


def _grid(lines: Tensor, like: Tensor, axis: int) -> Tensor:
    others = [n for i, n in enumerate(like.shape[1:-1]) if i != axis]
    return lines.view(len(like), *others, *lines.shape[1:]).movedim(-2, 1 + axis)


class AxialLayer(nn.Module):
    """Attention along every axis of a grid, with projections of its own for each.

    Args:
        axes: how many. causal: for all axes, or one an axis.
        order: `sequential` runs one axis after the other, `summed` adds them up.
        channels: `last` for B *grid E, `first` for B E *grid.

    Raises:
        LongspanError: causalities of another number of axes; a grid of another number.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        axes: int = 2,
        causal: bool | Sequence[bool] = False,
        order: Literal["sequential", "summed"] = "sequential",
        channels: Literal["first", "last"] = "last",
    ) -> None:
        super().__init__()
        masked = [causal] * axes if isinstance(causal, bool) else list(causal)
        if len(masked) != axes:
            raise LongspanError(f"{len(masked)} causalities were given for {axes} axes.")
        self.order, self.channels = order, channels
        self.attentions = nn.ModuleList(
            MultiHead(registry.build("multi-head-attention", causal=each), width=width, heads=heads)
            for each in masked
        )

    def forward(self, x: Float[Tensor, "B *grid"]) -> Float[Tensor, "B *grid"]:
        if x.dim() != len(self.attentions) + 2:
            raise LongspanError(
                f"an axial layer of {len(self.attentions)} axes got a tensor of {x.dim()}: "
                "expected one more for the batch and one for the channels."
            )
        x = x.movedim(1, -1) if self.channels == "first" else x
        total = torch.zeros_like(x)
        for axis, attention in enumerate(self.attentions):
            y = _grid(attention(_lines(x, axis))[0], x, axis)
            x, total = (y, total) if self.order == "sequential" else (x, total + y)
        y = x if self.order == "sequential" else total
        return y.movedim(-1, 1) if self.channels == "first" else y


class AxialConfig(PreTrainedConfig):
    """An autoregressive model of images or of video.

    Args:
        slices: channels, or frames, generated one after the other; 1 for a single plane.
        upper_layers, row_layers, exterior_layers: L_upper (rows and columns in turn), L_row, and
            those over earlier slices; the first and last even.
        emb_scale: of the positions, whose deviation is emb_scale / √E.
        residual_scale: of what goes into a residual, at the start.
    """

    model_type = "longspan-axial"
    __no_type_check__ = True

    vocab_size: int = 256
    rows: int = 32
    columns: int = 32
    slices: int = 1
    width: int = 256
    heads: int = 8
    upper_layers: int = 4
    row_layers: int = 2
    exterior_layers: int = 4
    emb_scale: float = 1.0
    residual_scale: float = 1.0
    dropout: float = 0.0


class _Line(nn.Module):
    """A pre-norm block along the rows (axis 1: within a row) or the columns (axis 0) of a grid."""

    def __init__(self, config: AxialConfig, axis: int, *, causal: bool) -> None:
        super().__init__()
        attention = registry.build("multi-head-attention", causal=causal)
        mixer = MultiHead(attention, width=config.width, heads=config.heads)
        inner = FeedForward(config.width, dropout=config.dropout)
        with torch.no_grad():
            mixer.output.weight.mul_(config.residual_scale)
            inner.down.weight.mul_(config.residual_scale)
        self.axis = axis
        self.block = Block(mixer, inner, width=config.width, dropout=config.dropout)

    def forward(self, x: Maps) -> Maps:
        return _grid(self.block(_lines(x, self.axis))[0], x, self.axis)


class _Places(nn.Module):
    """x + P_row[i] + P_column[j]."""

    def __init__(self, config: AxialConfig) -> None:
        super().__init__()
        std = config.emb_scale / config.width**0.5
        self.row = nn.Parameter(torch.randn(config.rows, config.width) * std)
        self.column = nn.Parameter(torch.randn(config.columns, config.width) * std)

    def forward(self, x: Maps) -> Maps:
        return x + self.row[:, None] + self.column


class AxialTransformer(hub.Pretrained):
    """p(x) = Π p(x_ij | earlier pixels, earlier slices), in raster order (Sec. 3.2 and 3.3).

    Outer: rows unmasked, columns masked, in turn, then everything one row down, so that u_ij knows
    the rows above i. Inner: the row shifted right by one, with u, under masked rows. Exterior: what
    earlier slices say, added to both. The first loss is log(vocabulary).

    Raises:
        LongspanError: odd numbers of outer or exterior layers; images of another shape.
    """

    config: AxialConfig
    config_class = AxialConfig
    _is_stateful = False

    def __init__(self, config: AxialConfig) -> None:
        super().__init__(config)
        if config.upper_layers % 2 or config.exterior_layers % 2:
            raise LongspanError(
                f"upper_layers={config.upper_layers} and exterior_layers={config.exterior_layers}: "
                "give even numbers, rows and columns in turn."
            )
        width = config.width
        self.embed, self.places, self.inner_places = (
            nn.Embedding(config.vocab_size, width),
            _Places(config),
            _Places(config),
        )
        self.upper = nn.Sequential(
            *(
                _Line(config, axis, causal=axis == 0)
                for _ in range(config.upper_layers // 2)
                for axis in (1, 0)
            )
        )
        self.row = nn.Sequential(*(_Line(config, 1, causal=True) for _ in range(config.row_layers)))
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, config.vocab_size, bias=False)
        nn.init.normal_(self.logits.weight, std=1e-10 / width**0.5)
        self.exterior = None
        if config.slices > 1:
            self.planes = nn.Conv2d(2 * config.slices, width, 3, padding=1)
            self.exterior_places = _Places(config)
            self.exterior = nn.Sequential(
                *(
                    _Line(config, axis, causal=False)
                    for _ in range(config.exterior_layers // 2)
                    for axis in (1, 0)
                )
            )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the constructor has initialised everything."""

    def _earlier(self, pixels: Slices, which: Int[Tensor, "B"]) -> Maps | None:
        """What slices before `which` say of each place."""
        if self.exterior is None:
            return None
        slices = torch.arange(pixels.shape[1], device=pixels.device)
        values = pixels / (self.config.vocab_size - 1) * 2 - 1
        # Zeroed before the convolution, or it would carry what is not yet generated.
        values = values * (slices < which[:, None])[:, :, None, None]
        marks = (slices == which[:, None])[:, :, None, None].expand_as(values)
        planes = torch.cat([values, marks], 1).to(self.planes.weight.dtype)
        h = rearrange(self.planes(planes), "B E r c -> B r c E")
        return self.exterior(self.exterior_places(h))

    def _above(self, x: Maps, h: Maps | None) -> Maps:
        """u: what the rows above say."""
        x = self.places(x) if h is None else self.places(x) + h
        return F.pad(self.upper(x), (0, 0, 0, 0, 1, -1))

    def _left(self, x: Maps, u: Maps, h: Maps | None) -> Maps:
        """Inputs of the inner layers: the row shifted right, then positions."""
        x = F.pad(x, (0, 0, 1, -1)) + u
        return self.inner_places(x if h is None else x + h)

    def _slice(self, pixels: Slices, which: Int[Tensor, "B"]) -> Float[Tensor, "B r c vocab"]:
        x = self.embed(pixels[torch.arange(len(pixels), device=pixels.device), which])
        h = self._earlier(pixels, which)
        return self.logits(self.norm(self.row(self._left(x, self._above(x, h), h))))

    def _check(self, shape: Sequence[int]) -> None:
        config = self.config
        if tuple(shape) != (config.slices, config.rows, config.columns):
            raise LongspanError(
                f"images are {tuple(shape)}; the model was built for "
                f"{(config.slices, config.rows, config.columns)}, slices × rows × columns."
            )

    def forward(self, pixels: Slices, which: Int[Tensor, "B"] | None = None) -> CausalLMOutput:
        """Logits (B slices rows columns vocabulary) and the mean loss in nats.

        Args:
            which: one slice for each example, as in training; None for all of them. With it the
                logits are of that slice alone.
        """
        self._check(pixels.shape[1:])
        if which is None:
            each = [
                self._slice(pixels, torch.full_like(pixels[:, 0, 0, 0], n))
                for n in range(pixels.shape[1])
            ]
            logits, target = torch.stack(each, 1), pixels
        else:
            rows = torch.arange(len(pixels), device=pixels.device)
            logits, target = self._slice(pixels, which), pixels[rows, which]
        loss = F.cross_entropy(logits.flatten(0, -2), target.flatten())
        return CausalLMOutput(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        generator: torch.Generator | None = None,
        fast: bool = True,
    ) -> Slices:
        """Images drawn pixel by pixel.

        Args:
            fast: once a row the outer layers, once a pixel one step of the inner ones; else the
                whole model once a pixel. Both give the same images for the same generator.
        """
        config, device = self.config, self.embed.weight.device
        pixels = torch.zeros(
            count, config.slices, config.rows, config.columns, dtype=torch.long, device=device
        )

        def draw(logits: Tensor) -> Tensor:
            uniform = torch.rand(
                logits.shape, generator=generator, dtype=torch.float64, device=device
            )
            return (logits.double() - (-uniform.log()).log()).argmax(-1)

        for n in range(config.slices):
            which = pixels.new_full((count,), n)
            h = self._earlier(pixels, which) if fast else None
            for i in range(config.rows):
                if not fast:
                    for j in range(config.columns):
                        pixels[:, n, i, j] = draw(self._slice(pixels, which)[:, i, j])
                    continue
                x = self.embed(pixels[:, n])
                start = self._left(torch.zeros_like(x), self._above(x, h), h)[:, i]
                self._draw_row(pixels[:, n, i], start, draw)
        return pixels

    def _draw_row(self, row: Tensor, start: Tensor, draw: Any) -> None:
        lines: Any = self.row
        states: list[Any] = [None] * len(lines)
        for j in range(row.shape[1]):
            x = start[:, j : j + 1]
            if j:
                x = x + self.embed(row[:, j - 1 : j])
            for n, line in enumerate(lines):
                x, states[n] = line.block(x, states[n])
            row[:, j] = draw(self.logits(self.norm(x))[:, 0])


hub.register(AxialConfig, {"AutoModel": AxialTransformer})
