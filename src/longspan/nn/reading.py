"""Latents that read an array of any size and width, and what they are read with."""

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from longspan.errors import LongspanError
from longspan.nn.blocks import FeedForward
from longspan.nn.latent import CrossAttention
from longspan.shapes import Inputs, Keep

Source = Float[Tensor, "B S _"]


class Reading(nn.Module):
    """x ← x + CrossAttention(LN(x), LN(source)), x ← x + MLP(LN(x)); without a source, of x itself.

    Args:
        source_width: None for self-attention.
        inner, value_width: of queries and keys, and of values; by default `width`, and `inner`.
        widening: inner width of the MLP in multiples of `width`.
        residual: of the queries; without it x becomes the attention's output alone.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        source_width: int | None = None,
        inner: int | None = None,
        value_width: int | None = None,
        widening: int = 1,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.norm = nn.LayerNorm(width)
        self.source_norm = None if source_width is None else nn.LayerNorm(source_width)
        self.attention = CrossAttention(
            width=width,
            heads=heads,
            source_width=source_width,
            inner=inner,
            value_width=value_width,
        )
        self.feed_norm = nn.LayerNorm(width)
        self.feed = FeedForward(width, inner=widening * width)

    def forward(
        self, x: Inputs, source: Source | None = None, *, keep: Keep | None = None
    ) -> Inputs:
        """`keep` is of the source, which may hold NaN where masked."""
        queries = self.norm(x)
        if source is None or self.source_norm is None:
            source = queries
        else:
            source = source if keep is None else source.masked_fill(~keep[..., None], 0)
            source = self.source_norm(source)
        y, _ = self.attention(queries, source, keep=keep)
        x = x + y if self.residual else y
        return x + self.feed(self.feed_norm(x))


class Latents(nn.Module):
    """N learned vectors of normal(0, 0.02) cut at ±2 (the paper's cut, 100 deviations away)."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        if count < 1:
            raise LongspanError(f"{count} latents were asked for: give at least 1.")
        self.vectors = nn.Parameter(torch.empty(count, width))
        nn.init.trunc_normal_(self.vectors, std=0.02, a=-2.0, b=2.0)

    def forward(self, batch: int) -> Float[Tensor, "B N E"]:
        return self.vectors.expand(batch, -1, -1)


def grid_positions(
    shape: Sequence[int], *, device: torch.device | None = None
) -> Float[Tensor, "S n"]:
    """Places of a grid in row-major order, each axis from −1 to 1."""
    axes = [torch.linspace(-1, 1, size, device=device) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def fourier_features(
    pos: Float[Tensor, "*shape n"],
    *,
    bands: int,
    resolution: Sequence[int],
    raw: bool = True,
) -> Float[Tensor, "*shape channels"]:
    """[p; sin(π f_k p_d); cos(π f_k p_d)], f_k from 1 to μ_d / 2 in equal steps.

    Args:
        pos: p, within [−1, 1]. resolution: μ of each axis. raw: whether p stands in front.

    Raises:
        LongspanError: resolutions for another number of axes.
    """
    if pos.shape[-1] != len(resolution):
        raise LongspanError(
            f"positions have {pos.shape[-1]} axes and {len(resolution)} resolutions were given: "
            "give one an axis."
        )
    steps = [torch.linspace(1.0, mu / 2, bands, device=pos.device) for mu in resolution]
    angles = torch.pi * (pos[..., None] * torch.stack(steps).to(pos.dtype)).flatten(-2)
    return torch.cat([*([pos] if raw else []), angles.sin(), angles.cos()], -1)


class Places(nn.Module):
    """Features of the places of an array, (B) S channels: Fourier's, or learned ones.

    Args:
        shape: of the grid; learned features have one vector for each of its places.
        channels: of learned features; None for Fourier features.
        bands, resolution, raw: of Fourier features; the resolution by default is the shape.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        channels: int | None = None,
        bands: int = 64,
        resolution: Sequence[int] | None = None,
        raw: bool = True,
    ) -> None:
        super().__init__()
        self.shape, self.bands, self.raw = tuple(shape), bands, raw
        self.resolution = tuple(resolution or shape)
        self.width = channels or len(self.shape) * (2 * bands + raw)
        self.learned = None
        if channels is not None:
            size = int(torch.Size(self.shape).numel())
            self.learned = nn.Parameter(torch.randn(size, channels) * 0.02)

    def forward(
        self, like: Float[Tensor, "B S _"], pos: Float[Tensor, "B S n"] | None = None
    ) -> Float[Tensor, "B S _"]:
        """Features beside `like`.

        Args:
            pos: places within [−1, 1] in place of the grid's, for point clouds or parts of a grid.

        Raises:
            LongspanError: an array that is not the grid, or places for learned features.
        """
        if pos is None:
            size = int(torch.Size(self.shape).numel())
            if like.shape[1] != size and (self.learned is None or like.shape[1] > size):
                raise LongspanError(
                    f"the array has {like.shape[1]} places and the grid {self.shape} has {size}: "
                    "build it with the array's shape, or give pos=."
                )
        elif self.learned is not None:
            raise LongspanError("learned features belong to a grid: leave pos out, or use Fourier.")
        if self.learned is not None:
            return self.learned[: like.shape[1]].expand(len(like), -1, -1)
        if pos is None:
            pos = grid_positions(self.shape, device=like.device).expand(len(like), -1, -1)
        features = fourier_features(pos, bands=self.bands, resolution=self.resolution, raw=self.raw)
        return features.to(like.dtype)


class Modalities(nn.Module):
    """Arrays of several widths, padded to one by a learned code of each, one after the other.

    The common width is that of the widest and `padding` more, so that every code has channels.
    """

    def __init__(self, channels: Mapping[str, int], *, padding: int = 1) -> None:
        super().__init__()
        if padding < 1 or not channels:
            raise LongspanError(
                f"modalities got channels={dict(channels)}, padding={padding}: expected at least "
                "one array, and one channel for its code."
            )
        self.channels = dict(channels)
        self.width = max(channels.values()) + padding
        self.codes = nn.ParameterDict(
            {name: torch.randn(self.width - size) * 0.02 for name, size in channels.items()}
        )

    def forward(
        self,
        arrays: Mapping[str, Tensor],
        *,
        keeps: Mapping[str, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "B S _"], Bool[Tensor, "B S"] | None]:
        """(one array of all, its mask), in the order in which the modalities were declared.

        Raises:
            LongspanError: an unknown modality, or other widths than declared.
        """
        for name, array in arrays.items():
            if array.shape[-1] != self.channels.get(name):
                raise LongspanError(
                    f"modality '{name}' has {array.shape[-1]} channels; expected "
                    f"{', '.join(f'{n}: {c}' for n, c in self.channels.items())}."
                )
        names = [name for name in self.channels if name in arrays]
        coded = [
            torch.cat([arrays[n], self.codes[n].expand(*arrays[n].shape[:2], -1)], -1)
            for n in names
        ]
        if not keeps:
            return torch.cat(coded, 1), None
        masks = [
            keeps[n] if n in keeps else arrays[n].new_ones(arrays[n].shape[:2], dtype=torch.bool)
            for n in names
        ]
        return torch.cat(coded, 1), torch.cat(masks, 1)


def picked(
    x: Float[Tensor, "B S E"], at: Int[Tensor, "picks"] | Int[Tensor, "B picks"] | None
) -> Float[Tensor, "B O E"]:
    """The vectors at these places, the same of all rows or each row's own; all of them if None."""
    if at is None:
        return x
    if at.dim() == 1:
        return x[:, at]
    rows = torch.arange(len(x), device=x.device)
    return x[rearrange(rows, "B -> B 1"), at]
