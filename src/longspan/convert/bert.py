"""BERT and RoBERTa with another self-attention: what every converter of them does."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, PreTrainedModel

from longspan.convert.swapped import Origin, Sizes, Swapped
from longspan.errors import LongspanError
from longspan.models.stack import padding
from longspan.nn import Attention, MultiHead
from longspan.registry import build
from longspan.shapes import Inputs

Model = TypeVar("Model", bound=PreTrainedModel)

ARCHITECTURES = ("bert", "roberta")
# The name under which transformers hands attentions the padding itself, B L, and not B 1 L L.
PADDING = "longspan_padding"


def with_attention(
    model: Model, name: str, attend: Callable[[int], Attention], *, length: int | None = None
) -> Model:
    """A copy of a BERT or RoBERTa with `attend(layer)` within each layer's own projections.

    Weights of the attention are no longer dropped out in training, and `output_attentions` is
    refused: they are never formed. To load what `save_pretrained` stored, build the original class
    from the stored config, convert it with the same arguments, and load the state dict.

    Args:
        name: of the conversion, for errors.
        length: tokens that the position table is extended to, by repetition.

    Raises:
        LongspanError: another architecture, a decoder, a `length` below what the model knows.
    """
    config = model.config
    known = config.model_type in ARCHITECTURES
    if not known or config.is_decoder:
        decoder = " decoder (is_decoder=True), whose cache it cannot fill" if known else ""
        raise LongspanError(
            f"{name} converts {' and '.join(ARCHITECTURES)} encoders and got a "
            f"{config.model_type}{decoder}: use another checkpoint, or set is_decoder=False."
        )
    converted = deepcopy(model)
    base: Any = converted.base_model
    for i, layer in enumerate(base.encoder.layer):
        if isinstance(layer.attention.self, SelfAttention):
            raise LongspanError(
                f"{name} got a model that was converted before: convert the original."
            )
        layer.attention.self = SelfAttention(layer.attention.self, attend(i))
    if length is not None:
        converted.config.max_position_embeddings = lengthen(base.embeddings, length)
    converted.config._attn_implementation = PADDING
    return converted


class SelfAttention(nn.Module):
    """An attention in the place of BERT's, with the weights of the module that stood there.

    W_o stays where BERT has it, in the layer's output; further projections that the attention
    wants start as copies. `global_attention_mask` (B L, nonzero where global) marks tokens for it.

    Raises:
        LongspanError: a mask that is not one of padding, or attention weights asked for.
    """

    def __init__(self, original: Any, attention: Attention) -> None:
        super().__init__()
        with torch.device("meta"):  # all its projections are replaced
            self.mixer = MultiHead(
                attention,
                width=original.query.in_features,
                heads=original.num_attention_heads,
            )
        project = self.mixer.project
        project["q"], project["k"], project["v"] = original.query, original.key, original.value
        for name, origin in attention.extra.items():
            project[name] = deepcopy(project[origin])
        self.mixer.add_module("output", nn.Identity())

    @property
    def _name(self) -> str:
        return type(self.mixer.attention).__name__

    def forward(
        self,
        hidden_states: Inputs,
        attention_mask: Tensor | None = None,
        *,
        global_attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        **_: Any,  # transformers hands every layer what any layer may want
    ) -> tuple[Inputs, None]:
        if output_attentions:
            raise LongspanError(
                f"attention weights are not kept: {self._name} never forms them. "
                "Leave output_attentions out."
            )
        if attention_mask is not None and attention_mask.dim() != 2:
            raise LongspanError(
                f"attention_mask came to {self._name} as {tuple(attention_mask.shape)}; expected "
                "one number per row and token, 1 for real tokens and 0 for padding. If the kind of "
                f"attention was changed, set model.config._attn_implementation = '{PADDING}'."
            )
        marks = None if global_attention_mask is None else global_attention_mask.bool()
        y, _state = self.mixer(hidden_states, keep=attention_mask, marks=marks)
        return y, None


def _padding(*, kv_length: int, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    return padding(attention_mask, kv_length)


# At import, so that an unpickled model has it too: an unregistered name would lose the mask.
AttentionMaskInterface.register(PADDING, _padding)


def lengthen(embeddings: Any, length: int) -> int:
    """Repeat the position table in place; returns its number of rows.

    Rows before the first position (RoBERTa: 2) are kept as they are.

    Raises:
        LongspanError: a `length` below what the table knows.
    """
    old: nn.Embedding = embeddings.position_embeddings
    first = 0 if old.padding_idx is None else old.padding_idx + 1
    known = old.num_embeddings - first
    if length < known:
        raise LongspanError(
            f"the model knows {known} positions and was to be lengthened to {length}: "
            f"give length={known} or more."
        )
    with torch.device("meta"):  # its table is replaced
        position = build("learned-position", width=old.embedding_dim, length=known, offset=first)
    position.table = old.weight
    table = position.resize(length, how="tile").table
    embeddings.position_embeddings = nn.Embedding.from_pretrained(
        table, freeze=not table.requires_grad, padding_idx=old.padding_idx
    )
    rows, device = table.shape[0], table.device
    embeddings.position_ids = torch.arange(rows, device=device)[None]
    embeddings.token_type_ids = torch.zeros(1, rows, dtype=torch.long, device=device)
    return rows


class Bert(Swapped):
    """The name map of BERT and RoBERTa for `swap`; W_o stands in the layer's output."""

    types = frozenset(ARCHITECTURES)
    place = "encoder.layer.{}.attention.self"
    drops = "attention_probs_dropout_prob"
    known = frozenset(
        {
            *("attention_probs_dropout_prob", "classifier_dropout", "hidden_act"),
            *("hidden_dropout_prob", "hidden_size", "initializer_range", "intermediate_size"),
            *("is_decoder", "layer_norm_eps", "max_position_embeddings", "num_attention_heads"),
            *("num_hidden_layers", "type_vocab_size"),
        }
    )
    neutral = {"position_embedding_type": "absolute"}  # noqa: RUF012

    query: Any
    key: Any
    value: Any

    @classmethod
    def measure(cls, original: Any) -> Sizes:
        heads = original.num_attention_heads
        return Sizes(original.query.in_features, heads, heads, original.attention_head_size)

    def project(self, x: Inputs) -> dict[Origin, Tensor]:
        return {"q": self.query(x), "k": self.key(x), "v": self.value(x)}

    def copied(self, origin: Origin) -> nn.Linear:
        return deepcopy({"q": self.query, "k": self.key, "v": self.value}[origin])
