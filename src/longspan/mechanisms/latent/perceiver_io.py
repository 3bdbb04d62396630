"""Perceiver IO (Jaegle et al., 2021b): read, process, write."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.nn.reading import Latents, Reading, Source
from longspan.registry import mechanism
from longspan.shapes import Inputs, Keep


class Encoder(nn.Module):
    """Z = CrossAttend(Z_0, X): N learned latents read the array once."""

    def __init__(
        self,
        *,
        width: int,
        source_width: int,
        latents: int,
        heads: int = 1,
        inner: int | None = None,
        value_width: int | None = None,
        widening: int = 1,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.start = Latents(latents, width)
        self.read = Reading(
            width=width,
            heads=heads,
            source_width=source_width,
            inner=inner,
            value_width=value_width,
            widening=widening,
            residual=residual,
        )

    def forward(self, source: Source, *, keep: Keep | None = None) -> Float[Tensor, "B N E"]:
        return self.read(self.start(len(source)), source, keep=keep)


class Processor(nn.Module):
    """`blocks` passes through the same `layers` of self-attention.

    Weights are shared between blocks, not between the layers of one.
    """

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        blocks: int = 1,
        heads: int = 8,
        inner: int | None = None,
        value_width: int | None = None,
        widening: int = 1,
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.layers = nn.Sequential(
            *(
                Reading(
                    width=width,
                    heads=heads,
                    inner=inner,
                    value_width=value_width,
                    widening=widening,
                )
                for _ in range(layers)
            )
        )

    def forward(self, z: Inputs) -> Inputs:
        for _ in range(self.blocks):
            z = self.layers(z)
        return z


@mechanism(
    Card(
        id="perceiver-io",
        name="Perceiver IO",
        kind="architecture",
        family="latent",
        paper="Perceiver IO: A General Architecture for Structured Inputs & Outputs",
        cite="Jaegle et al., ICLR 2022",
        link="https://arxiv.org/abs/2107.14795",
        what="Latents read the input once, think, and are read by one query for each output.",
        modes={"bidirectional", "cross"},
        time="S*M*E + M*M*E + L*M*E",
        memory="M*E",
    )
)
class PerceiverIO(nn.Module):
    """Y = CrossAttend(Q, Process(CrossAttend(Z_0, X))), one query for each output (Sec. 3).

    Outputs know nothing of each other, so that any of them can be had alone. Queries are built of
    learned vectors, of places, of the inputs' features, of several modalities
    (`nn.reading`). The models: `models.perceiver`.

    Args:
        width: D of the latents. source_width: C. query_width: E of queries and outputs.
        inner, value_width: of encoder and processor; write_inner, write_value_width: of the
            decoder.
        residual: of the queries in the decoder; only where a query means what an output means.
        chunk: so many outputs are decoded at once.
    """

    def __init__(
        self,
        *,
        width: int = 1280,
        source_width: int,
        query_width: int,
        latents: int = 256,
        layers: int = 26,
        blocks: int = 1,
        heads: int = 8,
        cross_heads: int = 8,
        write_heads: int = 8,
        inner: int | None = None,
        value_width: int | None = None,
        write_inner: int | None = None,
        write_value_width: int | None = None,
        widening: int = 1,
        residual: bool = False,
        chunk: int = 8192,
    ) -> None:
        super().__init__()
        self.chunk = chunk
        sizes = {"inner": inner, "value_width": value_width, "widening": widening}
        self.encoder = Encoder(
            width=width, source_width=source_width, latents=latents, heads=cross_heads, **sizes
        )
        self.processor = Processor(width=width, layers=layers, blocks=blocks, heads=heads, **sizes)
        self.decoder = Reading(
            width=query_width,
            heads=write_heads,
            source_width=width,
            inner=write_inner,
            value_width=write_value_width,
            widening=widening,
            residual=residual,
        )

    def latents(self, source: Source, *, keep: Keep | None = None) -> Float[Tensor, "B N E"]:
        """The array as the latents understood it."""
        return self.processor(self.encoder(source, keep=keep))

    def write(
        self,
        queries: Float[Tensor, "B O _"],
        z: Inputs,
        *,
        marks: Bool[Tensor, "B O"] | None = None,
    ) -> Float[Tensor, "B O _"]:
        """What the latents answer to each query; where `marks` is False, 0."""
        if marks is not None:
            queries = queries.masked_fill(~marks[..., None], 0)
        y = torch.cat([self.decoder(part, z) for part in queries.split(self.chunk, 1)], 1)
        return y if marks is None else y.masked_fill(~marks[..., None], 0)

    def forward(
        self,
        source: Source,
        queries: Float[Tensor, "B O _"],
        *,
        keep: Keep | None = None,
        marks: Bool[Tensor, "B O"] | None = None,
    ) -> Float[Tensor, "B O _"]:
        """`keep` is of the source, `marks` of the queries."""
        return self.write(queries, self.latents(source, keep=keep), marks=marks)
