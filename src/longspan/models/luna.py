"""Luna (Ma et al., 2021): stacks that pass P from layer to layer beside the tokens."""

import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from longspan import hub
from longspan.errors import LongspanError
from longspan.mechanisms.low_rank.luna import Luna, Slots, StartingSlots
from longspan.models.heads import pool
from longspan.models.losses import ClassifierOutput, Seq2SeqOutput, cross_entropy
from longspan.models.seq2seq import Targets, delayed
from longspan.models.stack import padding
from longspan.nn import FeedForward
from longspan.nn.positions import sinusoid
from longspan.shapes import Context, Inputs, Keep, Tokens

Source = Literal["x", "p", "both"]


class LunaLayer(nn.Module):
    """X_A = LN(Y_X + X), P_A = LN(Y_P + P), X' = LN(FFN(X_A) + X_A); P gets no feed-forward.

    Args:
        luna: attends to X, or in a decoder to the encoder's output.
        prefix: of a decoder, a causal Luna before it, which only reads P.
    """

    def __init__(
        self, luna: Luna, prefix: Luna | None = None, *, width: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.luna, self.prefix = luna, prefix
        self.prefix_norm = None if prefix is None else nn.LayerNorm(width)
        self.x_norm, self.p_norm, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.feed_forward = FeedForward(width, activation="relu", dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Inputs,
        p: Slots,
        state: Any = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        own_keep: Keep | None = None,
    ) -> tuple[Inputs, Float[Tensor, "B _ E"], Any]:
        """`keep` is of the context, where given, and `own_keep` then of x."""
        if self.prefix is not None and self.prefix_norm is not None:
            y, state = self.prefix.prefix(x, p, state, keep=own_keep)
            x = self.prefix_norm(x + self.dropout(y))
        y_x, y_p = self.luna.streams(x, p, keep=keep, context=context)
        x = self.x_norm(x + self.dropout(y_x))
        p = self.p_norm(p[:, : y_p.shape[1]] + self.dropout(y_p))
        return self.norm(x + self.dropout(self.feed_forward(x))), p, state


class LunaConfig(PreTrainedConfig):
    """Layers that pass P on; an encoder's, and for sequence to sequence as many of a decoder.

    Args:
        slots: l of P. pack_heads, tied, omega, shorten: of the mechanism, `luna`.
        source: what a classifier reads: the mean of X, of P, or of both side by side.
    """

    model_type = "longspan-luna"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - as transformers reads it
    __no_type_check__ = True

    vocab_size: int = 256
    width: int = 256
    layers: int = 4
    heads: int = 8
    slots: int = 16
    pack_heads: int | None = None
    tied: bool = True
    omega: Literal["log2", "elu"] = "log2"
    shorten: bool = False
    dropout: float = 0.0
    source: Source = "x"
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.source not in get_args(Source):
            raise LongspanError(f"luna classifies no '{self.source}'; expected x, p or both.")
        super().__post_init__(**kwargs)


@dataclass
class LunaOutput(BaseModelOutput):
    """X and P after the last layer."""

    packed: Tensor | None = None


class _Pretrained(hub.Pretrained):
    config: LunaConfig
    config_class = LunaConfig
    supports_gradient_checkpointing = False

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the constructor has initialised everything."""

    def _luna(self, *, causal: bool = False) -> Luna:
        config = self.config
        return Luna(
            width=config.width,
            heads=config.heads,
            causal=causal,
            slots=None,
            pack_heads=config.pack_heads,
            tied=config.tied,
            omega=config.omega,
            shorten=config.shorten,
        )

    def _layers(self, *, decodes: bool = False) -> nn.ModuleList:
        return nn.ModuleList(
            LunaLayer(
                self._luna(),
                self._luna(causal=True) if decodes else None,
                width=self.config.width,
                dropout=self.config.dropout,
            )
            for _ in range(self.config.layers)
        )


class LunaModel(_Pretrained):
    """Embedded tokens and P through the layers of an encoder."""

    _is_stateful = False

    def __init__(self, config: LunaConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.embed.weight, std=config.width**-0.5)
        self.slots = StartingSlots(config.slots, config.width)
        self.layers = self._layers()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> LunaOutput:
        _refuse_more(output_hidden_states, output_attentions)
        keep = padding(attention_mask, input_ids.shape[1])
        x, p = _placed(self.embed(input_ids), keep), self.slots(len(input_ids))
        for layer in self.layers:
            x, p, _ = layer(x, p, keep=keep)
        return LunaOutput(last_hidden_state=x, packed=p)


class LunaForSequenceClassification(_Pretrained):
    """One of `num_labels` classes from what `config.source` names."""

    _is_stateful = False

    def __init__(self, config: LunaConfig) -> None:
        super().__init__(config)
        self.model = LunaModel(config)
        width = config.width * (2 if config.source == "both" else 1)
        self.score = nn.Linear(width, config.num_labels or 1)
        self.post_init()

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens,
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "B"] | None = None,
    ) -> ClassifierOutput:
        """Logits B × labels, and their cross-entropy where labels are given."""
        out = self.model(input_ids, attention_mask, return_dict=True)
        x, source = out.last_hidden_state, self.config.source
        pooled = {
            "x": pool(x, padding(attention_mask, x.shape[1]), "mean"),
            "p": out.packed.mean(1),
        }
        kinds = ("x", "p") if source == "both" else (source,)
        logits = self.score(torch.cat([pooled[kind] for kind in kinds], -1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ClassifierOutput(loss=loss, logits=logits)


class LunaForSeq2SeqLM(_Pretrained, GenerationMixin):
    """An encoder, and a decoder whose P starts anew and is updated from the encoder's output.

    The decoder's layer reads P in its causal Luna, then updates X and P by a cross-attention.

    Raises:
        LongspanError: heads of Y_P other than those of Y_X, which a decoder cannot have.
    """

    def __init__(self, config: LunaConfig) -> None:
        config = copy.deepcopy(config)
        config.is_encoder_decoder = True
        super().__init__(config)
        self.encoder = LunaModel(config)
        self.slots = StartingSlots(config.slots, config.width)
        self.layers = self._layers(decodes=True)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Targets | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Targets | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Seq2SeqOutput:
        """Logits of the decoder's positions, and the loss where labels are given.

        Args:
            decoder_input_ids: by default the labels, one place later, after
                `config.decoder_start_token_id`.
            labels: B T, the targets themselves; −100 is ignored.

        Raises:
            LongspanError: neither targets nor labels; hidden states or weights, which are not kept.
        """
        _refuse_more(output_hidden_states, output_attentions)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, return_dict=True)
        if decoder_input_ids is None:
            decoder_input_ids = delayed(labels, self.config)
        encoded, (batch, length) = encoder_outputs[0], decoder_input_ids.shape
        own = padding(decoder_attention_mask, length)
        carries = past_key_values is not None or use_cache
        cache = hub.cache_of(past_key_values if carries else None, batch)
        states = cache.states or (None,) * len(self.layers)
        seen = encoded.new_zeros(batch, dtype=torch.long) if cache.seen is None else cache.seen
        x, p = _placed(self.encoder.embed(decoder_input_ids), own, seen), self.slots(batch)
        keep, carried = padding(attention_mask, encoded.shape[1]), []
        for layer, old in zip(self.layers, states, strict=True):
            x, p, new = layer(x, p, old, context=encoded, keep=keep, own_keep=own)
            carried.append(new)
        if carries:
            new = length if own is None else own.sum(1)
            cache.update_states(tuple(carried), seen + new, length)
        logits = F.linear(x, self.encoder.embed.weight)
        return Seq2SeqOutput(
            loss=None if labels is None else cross_entropy(logits, labels),  # pyright: ignore
            logits=logits,  # pyright: ignore[reportArgumentType]
            past_key_values=cache if carries else None,
            encoder_last_hidden_state=encoded,
        )

    def prepare_decoder_input_ids_from_labels(self, labels: Targets) -> Targets:
        """The decoder's input for these labels, as data collators ask for it."""
        return delayed(labels, self.config)


def _refuse_more(hidden_states: bool | None, attentions: bool | None) -> None:
    if hidden_states or attentions:
        raise LongspanError("only outputs of the last layer are kept: leave the others out.")


def _placed(x: Inputs, keep: Keep | None, seen: Tensor | None = None) -> Inputs:
    """√E x + PE, counting kept tokens from what each row has seen on."""
    place = torch.arange(x.shape[1], device=x.device)[None]
    if keep is not None:
        place = (keep.cumsum(1) - 1).clamp(min=0)
    place = place if seen is None else seen[:, None] + place
    width = x.shape[-1]
    waves = sinusoid(place, width, layout="concatenated", spacing="inclusive")
    return x * width**0.5 + waves.to(x.dtype)


hub.register(
    LunaConfig,
    {
        "AutoModel": LunaModel,
        "AutoModelForSequenceClassification": LunaForSequenceClassification,
        "AutoModelForSeq2SeqLM": LunaForSeq2SeqLM,
    },
)
