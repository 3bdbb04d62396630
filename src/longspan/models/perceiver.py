"""Models whose latents read: Perceiver, and Perceiver IO (Jaegle et al., 2021)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from longspan import hub
from longspan.errors import LongspanError
from longspan.mechanisms.latent.perceiver import Perceiver
from longspan.mechanisms.latent.perceiver_io import PerceiverIO
from longspan.models.losses import ClassifierOutput, MaskedOutput, cross_entropy
from longspan.models.stack import padding
from longspan.nn.reading import Places, picked
from longspan.shapes import Tokens

PlaceKind = Literal["fourier", "learned", "none"]
SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[MASK]", "[CLS]", "[SEP]")


class _Arrays(PreTrainedConfig):
    """What the models of arrays share.

    Args:
        channels: C, without positions. shape: of the grid the array is a row-major list of.
        positions: what stands beside the channels. place_channels: of learned ones.
        bands, resolution, raw: K of the Fourier features, μ of each axis (by default its size), and
            whether the position itself is among them.
    """

    __no_type_check__ = True

    channels: int = 3
    shape: list[int] | None = None
    positions: PlaceKind = "fourier"
    place_channels: int = 256
    bands: int = 64
    resolution: list[int] | None = None
    raw: bool = True
    latents: int = 512
    width: int = 1024
    heads: int = 8
    cross_heads: int = 1
    layers: int = 6
    widening: int = 1


def _places(config: _Arrays) -> Places | None:
    if config.positions == "none":
        return None
    if config.positions not in ("fourier", "learned") or not config.shape:
        raise LongspanError(
            f"positions={config.positions!r} of shape={config.shape}: expected fourier, learned or "
            "none, and the sizes of the grid's axes for the first two."
        )
    learned = config.place_channels if config.positions == "learned" else None
    return Places(
        config.shape,
        channels=learned,
        bands=config.bands,
        resolution=config.resolution,
        raw=config.raw,
    )


def _placed(array: Tensor, places: Places | None, channels: int, pos: Tensor | None) -> Tensor:
    if array.shape[2] != channels:
        raise LongspanError(
            f"the array has {array.shape[2]} channels and the model was built for {channels}: "
            f"build it with channels={array.shape[2]}."
        )
    return array if places is None else torch.cat([array, places(array, pos)], -1)


class PerceiverConfig(_Arrays):
    """A classifier of arrays; by default the paper's of ImageNet.

    Args:
        crosses, blocks: which weights each iteration uses (`perceiver`).
    """

    model_type = "longspan-perceiver"
    __no_type_check__ = True

    crosses: list[int] | tuple[int, ...] = (0, 1, 1, 1, 1, 1, 1, 1)
    blocks: list[int] | tuple[int, ...] = (0, 0, 0, 0, 0, 0, 0, 0)


class PerceiverForClassification(hub.Pretrained):
    """logits = W mean(Z), of the latents after the last iteration.

    >>> config = PerceiverConfig(channels=3, shape=[224, 224], num_labels=1000)
    >>> model = PerceiverForClassification(config)
    """

    config: PerceiverConfig
    config_class = PerceiverConfig
    _is_stateful = False
    supports_gradient_checkpointing = False

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__(config)
        self.places = _places(config)
        self.model = Perceiver(
            width=config.width,
            source_width=config.channels + (self.places.width if self.places else 0),
            latents=config.latents,
            layers=config.layers,
            crosses=config.crosses,
            blocks=config.blocks,
            cross_heads=config.cross_heads,
            heads=config.heads,
            widening=config.widening,
        )
        assert config.num_labels is not None
        self.score = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the constructor has initialised everything."""

    @hub.can_return_tuple
    def forward(
        self,
        inputs: Float[Tensor, "B S _"],
        attention_mask: Tensor | None = None,
        pos: Float[Tensor, "B S n"] | None = None,
        labels: Int[Tensor, "B"] | None = None,
    ) -> ClassifierOutput:
        """Class scores, and their cross-entropy where labels are given.

        Args:
            attention_mask: B S; padding may stand anywhere and hold anything.
            pos: places within [−1, 1] in place of the grid's, for Fourier features.

        Raises:
            LongspanError: arrays of other channels, or of another shape.
        """
        keep = padding(attention_mask, inputs.shape[1])
        source = _placed(inputs, self.places, self.config.channels, pos)
        logits = self.score(self.model(source, keep=keep).mean(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ClassifierOutput(loss=loss, logits=logits)


class PerceiverIOConfig(_Arrays):
    """A model of arrays in and arrays out.

    Args:
        queries: `learned`, one vector for each output; `positions`, those of `output_shape`'s
            places, of the same kind as the inputs'; `inputs`, what the array holds and its
            positions, one output a place; `given`, by the caller, of `query_width`.
        output_shape: of the outputs; `learned` takes their number from it.
        output_width: of the answers, before which stands W_out.
        residual: of the queries, in the decoder.
        chunk: so many outputs are decoded at once.
    """

    model_type = "longspan-perceiver-io"
    __no_type_check__ = True

    queries: Literal["learned", "positions", "inputs", "given"] = "learned"
    query_width: int = 1024
    output_shape: list[int] | tuple[int, ...] = (1,)
    output_width: int = 1000
    blocks: int = 8
    write_heads: int = 1
    residual: bool = False
    chunk: int = 8192


class PerceiverIOModel(hub.Pretrained):
    """W_out Decode(queries, Process(Encode(X))): any array in, any array out.

    Raises:
        LongspanError: an unknown recipe of queries.
    """

    config: PerceiverIOConfig
    config_class = PerceiverIOConfig
    _is_stateful = False
    supports_gradient_checkpointing = False

    def __init__(self, config: PerceiverIOConfig) -> None:
        super().__init__(config)
        self.places = _places(config)
        source_width = config.channels + (self.places.width if self.places else 0)
        self.asked = None
        match config.queries:
            case "learned":
                self.asked = Places(config.output_shape, channels=config.query_width)
                width = config.query_width
            case "positions":
                asked = {"positions": config.positions, "shape": list(config.output_shape)}
                kind = type(config).from_dict(config.to_dict() | asked | {"resolution": None})
                self.asked = _places(kind)
                width = self.asked.width if self.asked else 0
            case "inputs":
                width = source_width
            case "given":
                width = config.query_width
            case _:
                width = 0
        if not width:
            raise LongspanError(
                f"queries={config.queries!r} with positions={config.positions!r}: expected learned "
                "or inputs or given, or positions that are not none."
            )
        self.model = PerceiverIO(
            width=config.width,
            source_width=source_width,
            query_width=width,
            latents=config.latents,
            layers=config.layers,
            blocks=config.blocks,
            heads=config.heads,
            cross_heads=config.cross_heads,
            write_heads=config.write_heads,
            inner=None,
            widening=config.widening,
            residual=config.residual,
            chunk=config.chunk,
        )
        self.score = nn.Linear(width, config.output_width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the constructor has initialised everything."""

    @hub.can_return_tuple
    def forward(
        self,
        inputs: Float[Tensor, "B S _"],
        attention_mask: Tensor | None = None,
        pos: Float[Tensor, "B S n"] | None = None,
        queries: Float[Tensor, "B O _"] | None = None,
        query_mask: Tensor | None = None,
        at: Int[Tensor, "picks"] | Int[Tensor, "B picks"] | None = None,
    ) -> BaseModelOutput:
        """An answer to each query, B O output_width.

        Args:
            queries: where the config says that they are given.
            query_mask: of all queries; a masked one is answered by W_out's bias.
            at: only these outputs are decoded; a random few are enough to train on.

        Raises:
            LongspanError: arrays of other channels or shapes, queries where there are none.
        """
        if (queries is None) == (self.config.queries == "given"):
            raise LongspanError(
                f"this model was built with queries={self.config.queries!r}: give queries= exactly "
                "where they are 'given'."
            )
        source = _placed(inputs, self.places, self.config.channels, pos)
        if queries is None and self.asked is not None:
            count = int(torch.Size(self.config.output_shape).numel())
            queries = self.asked(source.new_zeros(len(source), count, 1))
        queries = source if queries is None else queries
        marks = padding(query_mask, queries.shape[1])
        if marks is not None and at is not None:
            marks = picked(marks[..., None].float(), at)[..., 0].bool()
        keep = padding(attention_mask, inputs.shape[1])
        y = self.model(source, picked(queries, at), keep=keep, marks=marks)
        return BaseModelOutput(last_hidden_state=self.score(y))


class PerceiverBytesConfig(PreTrainedConfig):
    """A masked language model of bytes; by default the paper's."""

    model_type = "longspan-perceiver-bytes"
    __no_type_check__ = True

    vocab_size: int = 256 + len(SPECIAL)
    length: int = 2048
    embedding_width: int = 768
    latents: int = 256
    width: int = 1280
    layers: int = 26
    blocks: int = 1
    heads: int = 8
    inner: int = 256
    widening: int = 1


class PerceiverForMaskedLM(hub.Pretrained):
    """logits = Y Eᵀ + b, Y the answers to one learned query a position, E the input embeddings.

    >>> model = PerceiverForMaskedLM(PerceiverBytesConfig())
    """

    config: PerceiverBytesConfig
    config_class = PerceiverBytesConfig
    _is_stateful = False
    supports_gradient_checkpointing = False

    def __init__(self, config: PerceiverBytesConfig) -> None:
        super().__init__(config)
        width = config.embedding_width
        self.embed = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.places = Places([config.length], channels=width)
        self.queries = Places([config.length], channels=width)
        self.model = PerceiverIO(
            width=config.width,
            source_width=width,
            query_width=width,
            latents=config.latents,
            layers=config.layers,
            blocks=config.blocks,
            heads=config.heads,
            cross_heads=config.heads,
            write_heads=config.heads,
            inner=config.inner,
            value_width=config.width,
            write_inner=config.inner,
            write_value_width=width,
            widening=config.widening,
        )
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the constructor has initialised everything."""

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens,
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "B labels"] | None = None,
        at: Int[Tensor, "picks"] | Int[Tensor, "B picks"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MaskedOutput:
        """Logits of the bytes at each position, or at those of `at`, whose labels are then given.

        Raises:
            LongspanError: more tokens than there are learned positions.
        """
        x = self.embed(input_ids)
        x = x + self.places(x)
        keep = padding(attention_mask, x.shape[1])
        y = self.model(x, picked(self.queries(x), at), keep=keep)
        logits = y @ self.embed.weight.T + self.bias
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return MaskedOutput(loss=loss, logits=logits)


class ByteTokenizer:
    """UTF-8 bytes, each moved up by the six special ids [PAD], [BOS], [EOS], [MASK], [CLS], [SEP].

    >>> ByteTokenizer()("hi")
    [4, 110, 111, 5]
    """

    special: ClassVar[dict[str, int]] = dict(zip(SPECIAL, range(len(SPECIAL)), strict=True))

    def __call__(self, text: str, *, enclosed: bool = True) -> list[int]:
        """[CLS] bytes [SEP]."""
        ids = [byte + len(SPECIAL) for byte in text.encode()]
        return [self.special["[CLS]"], *ids, self.special["[SEP]"]] if enclosed else ids

    def batch(self, texts: Sequence[str]) -> tuple[Tokens, Int[Tensor, "B L"]]:
        """(ids, attention mask), padded on the right to the longest."""
        rows = [torch.tensor(self(text)) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, True, self.special["[PAD]"])
        return ids, (ids != self.special["[PAD]"]).long()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the bytes; special ids are left out, broken characters marked."""
        kept = bytes(i - len(SPECIAL) for i in ids if i >= len(SPECIAL))
        return kept.decode(errors="replace")


hub.register(PerceiverConfig, {"AutoModelForSequenceClassification": PerceiverForClassification})
hub.register(PerceiverIOConfig, {"AutoModel": PerceiverIOModel})
hub.register(PerceiverBytesConfig, {"AutoModelForMaskedLM": PerceiverForMaskedLM})
