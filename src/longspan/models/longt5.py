"""LongT5 (Guo et al., 2021): T5 v1.1 whose encoder attends locally, or locally and globally."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from longspan import hub
from longspan.errors import LongspanError
from longspan.mechanisms.global_local.longt5 import Buckets, initialise
from longspan.models.config import LongspanConfig, Spec
from longspan.models.seq2seq import LongspanForSeq2SeqLM
from longspan.models.stack import LongspanModel
from longspan.nn import FeedForward, MultiHead, MultiHeadState
from longspan.registry import build
from longspan.shapes import Context, Inputs, Keep, Marks


class LongT5Config(LongspanConfig):
    """A LongspanConfig of T5's parts, with the sizes of LongT5-base.

    Args:
        attention: of the encoder.
        radius, block: r and k of its windows and globals.
        buckets, distance: of every relative bias.
        scale_outputs: multiply what goes into the head by E^(−1/2), as T5 v1.0 does.
        tie_head: let the head be the embedding, as T5 v1.0 does.

    Raises:
        LongspanError: an unknown kind of attention.
    """

    model_type = "longspan-longt5"
    __no_type_check__ = True

    vocab_size: int = 32128
    width: int = 768
    layers: int = 12
    heads: int = 12
    head_width: int | None = 64
    inner: int | None = 2048
    norm: Literal["layer", "rms"] = "rms"
    gated: bool = True
    position: Spec | None = None
    attention: Literal["local", "transient-global"] = "transient-global"
    radius: int = 127
    block: int = 16
    buckets: int = 32
    distance: int = 128
    scale_outputs: bool = False
    tie_head: bool = False
    pad_token_id: int | None = 0
    eos_token_id: int | None = 1
    decoder_start_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.attention not in ("local", "transient-global"):
            raise LongspanError(
                f"longt5 has no attention {self.attention!r}: expected 'local' or "
                "'transient-global'."
            )
        encoder = {
            "id": "longt5",
            "radius": self.radius,
            "block": self.block if self.attention == "transient-global" else None,
            "buckets": self.buckets,
            "distance": self.distance,
        }
        self.mixers: Sequence[Spec] = ["multi-head-attention"]
        self.encoder_mixers: Sequence[Spec] | None = [encoder]
        super().__post_init__(**kwargs)

    def side(self, which: Literal["encoder", "decoder"]) -> LongspanConfig:
        side = super().side(which)
        side.tie_word_embeddings = True
        return side


class Decoded(NamedTuple):
    """What a decoder layer carries: its self-attention's state, and the encoder's keys and values.

    The latter are computed once, at the first call.
    """

    own: MultiHeadState
    k: Float[Tensor, "B H S D"]
    v: Float[Tensor, "B H S D"]
    keep: Bool[Tensor, "B S"]


class LongT5FeedForward(FeedForward):
    """T5's: without additive parameters, gelu by tanh."""

    def __init__(self, config: LongT5Config) -> None:
        super().__init__(
            config.width,
            inner=config.inner,
            activation=config.activation,
            gated=config.gated,
            dropout=config.dropout,
        )
        if config.activation == "gelu":
            self.activation = partial(F.gelu, approximate="tanh")
        for linear in (self.up, self.gate, self.down):
            if linear is not None:
                linear.register_parameter("bias", None)
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)


class LongT5DecoderLayer(hub.Layer):
    """T5's decoder layer; the state holds the encoder's keys and values too."""

    def __init__(self, config: LongT5Config, position: Buckets) -> None:
        heads = partial(
            MultiHead,
            width=config.width,
            heads=config.heads,
            head_width=config.head_width,
            biases=False,
        )
        own = heads(build("multi-head-attention", causal=True, scale=1.0), position=position)
        cross = heads(build("multi-head-attention", scale=1.0))
        for mixer in (own, cross):
            initialise(mixer, config.width, mixer.head_width)
        super().__init__(
            own,
            LongT5FeedForward(config),
            width=config.width,
            norms="rms",
            dropout=config.dropout,
            cross=cross,
        )

    def forward(
        self,
        x: Inputs,
        state: Decoded | None = None,
        *,
        keep: Keep | None = None,
        marks: Marks | None = None,
        encoded: Context | None = None,
        encoded_keep: Keep | None = None,
    ) -> tuple[Inputs, Decoded]:
        cross: Any = self.cross

        def heads(name: str, of: Tensor) -> Tensor:
            return rearrange(cross.project[name](of), "B L (H D) -> B H L D", H=cross.heads)

        y, own = self.mixer(self.mixer_norm(x), state and state.own, keep=keep, marks=marks)
        x = x + self.dropout(y)
        if state is not None:
            state = state._replace(own=own)
        elif encoded is None:
            raise LongspanError("longt5's decoder attends to an encoder: give encoded.")
        else:
            seen = encoded.new_ones(encoded.shape[:2], dtype=torch.bool)
            seen = seen if encoded_keep is None else encoded_keep
            source = encoded.masked_fill(~seen[..., None], 0)
            state = Decoded(own, heads("k", source), heads("v", source), seen)
        norm: Any = self.cross_norm
        seen = None if bool(state.keep.all()) else state.keep
        o, _ = cross.attention(heads("q", norm(x)), state.k, state.v, keep=seen)
        x = x + self.dropout(cross.output(rearrange(o, "B H L D -> B L (H D)")))
        feed: Any = self.feed_forward
        return x + self.dropout(feed(self.feed_forward_norm(x))), state  # pyright: ignore[reportOptionalCall]


class LongT5Stack(LongspanModel):
    """LongT5's encoder, or its decoder; the first layer's biases serve all layers."""

    config: LongT5Config

    def __init__(self, config: LongspanConfig) -> None:
        if config.encoder_mixers is not None:
            config = config.side("encoder")
        super().__init__(config)
        if self.causal:
            bias = Buckets(
                self.config.heads,
                buckets=self.config.buckets,
                distance=self.config.distance,
                causal=True,
            )
            nn.init.normal_(bias.table.weight, std=config.width**-0.5)
            self.layers = nn.ModuleList(
                LongT5DecoderLayer(self.config, bias) for _ in range(config.layers)
            )
        blocks: Any = list(self.layers)
        for layer in blocks[1:] if not self.causal else ():
            layer.mixer.share(blocks[0].mixer)
        shared = [n for n in ("near", "far", "position") if _has(blocks, n)]
        self._tied_weights_keys = {
            f"layers.{i}.mixer.{n}.table.weight": f"layers.0.mixer.{n}.table.weight"
            for i in range(1, config.layers)
            for n in shared
        }
        for part in self.modules():
            if isinstance(part, nn.RMSNorm):
                part.eps = 1e-6
        nn.init.normal_(self.embed_tokens.weight)
        hub.settled(self)
        self.post_init()

    def _feed_forward(self) -> FeedForward:
        return LongT5FeedForward(self.config)

    def _settled(self, part: Any) -> Any:
        return part


def _has(blocks: Sequence[Any], name: str) -> bool:
    return bool(blocks) and getattr(blocks[0].mixer, name, None) is not None


class Head(nn.Linear):
    """A head without bias whose input is multiplied by a constant."""

    def __init__(self, width: int, tokens: int, scale: float) -> None:
        super().__init__(width, tokens, bias=False)
        self.scale = scale
        nn.init.normal_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * self.scale)


class LongT5ForSeq2SeqLM(LongspanForSeq2SeqLM):
    """LongT5 with its head; it decodes with a cache of its own and the encoder's keys and values.

    >>> model = LongT5ForSeq2SeqLM(LongT5Config(attention="transient-global"))
    """

    config: LongT5Config

    def __init__(self, config: LongT5Config) -> None:
        config = copy.deepcopy(config)
        config.is_encoder_decoder = True
        config.tie_word_embeddings = True
        super(LongspanForSeq2SeqLM, self).__init__(config)
        self.encoder = LongT5Stack(config.side("encoder"))
        self.decoder = LongT5Stack(config.side("decoder"))
        scale = config.width**-0.5 if config.scale_outputs else 1.0
        self.lm_head = hub.settled(Head(config.width, config.vocab_size, scale))
        tied = ["decoder.embed_tokens", *(["lm_head"] if config.tie_head else [])]
        self._tied_weights_keys = {f"{n}.weight": "encoder.embed_tokens.weight" for n in tied}
        self.post_init()


# transformers' names of T5 and LongT5, and ours, within a block.
_NAMES = {
    "layer.0.layer_norm": "mixer_norm",
    "SelfAttention.relative_attention_bias": "mixer.{bias}.table",
    "SelfAttention.global_relative_attention_bias": "mixer.far.table",
    "SelfAttention.global_input_layer_norm": "mixer.norm",
    "SelfAttention.o": "mixer.output",
    "SelfAttention.": "mixer.project.",
    "EncDecAttention.o": "cross.output",
    "EncDecAttention.": "cross.project.",
    "DenseReluDense.wi_1": "feed_forward.gate",
    "DenseReluDense.wi_0": "feed_forward.up",
    "DenseReluDense.wi": "feed_forward.up",
    "DenseReluDense.wo": "feed_forward.down",
}


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a T5 or LongT5 of transformers, under this model's names.

    Raises:
        LongspanError: a name that neither has.
    """
    ours: dict[str, Tensor] = {}
    for name, weight in weights.items():
        side, _, rest = name.partition(".")
        if name == "lm_head.weight":
            ours[name] = weight
        elif name == "shared.weight" or rest == "embed_tokens.weight":
            for each in ("encoder", "decoder"):
                ours[f"{each}.embed_tokens.weight"] = weight
        elif rest.startswith("final_layer_norm"):
            ours[f"{side}.norm.weight"] = weight
        else:
            ours[f"{side}.{_within(name, side, rest)}"] = weight
    return ours


def _within(name: str, side: str, rest: str) -> str:
    parts = rest.split(".", 2)
    if parts[0] == "block" and len(parts) == 3:
        norms = {"layer.1.layer_norm": "cross_norm", "layer.2.layer_norm": "feed_forward_norm"}
        if side == "encoder":
            norms = {"layer.1.layer_norm": "feed_forward_norm"}
        for theirs, own in (norms | _NAMES).items():
            if theirs in parts[2]:
                bias = "near" if side == "encoder" else "position"
                tail = parts[2].partition(theirs)[2]
                return f"layers.{parts[1]}.{own.format(bias=bias)}{tail}"
    raise LongspanError(
        f"LongT5 has no weight '{name}': give the state dict of a T5 or LongT5 of transformers."
    )


hub.register(LongT5Config, {"AutoModel": LongT5Stack, "AutoModelForSeq2SeqLM": LongT5ForSeq2SeqLM})
