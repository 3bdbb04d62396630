"""BERT and RoBERTa into Longformer (Beltagy et al., 2020, Sec. 5)."""

from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, PreTrainedModel

from longspan.errors import LongspanError
from longspan.models.stack import padding
from longspan.nn import MultiHead
from longspan.registry import build
from longspan.shapes import Inputs

Model = TypeVar("Model", bound=PreTrainedModel)

ARCHITECTURES = ("bert", "roberta")
# The name under which transformers hands attentions the padding itself, B L, and not B 1 L L.
PADDING = "longspan_padding"


def longformer(model: Model, *, window: int = 512, length: int = 4096, hubs: int = 1) -> Model:
    """A copy of a BERT or RoBERTa that attends as Longformer does, for `length` tokens.

    Every self-attention becomes `longformer`, its W_q, W_k, W_v also those of the global tokens;
    the position table is repeated, the rows before the first position (RoBERTa: 2) kept as they
    are. While window / 2 ≥ L, outputs are the model's own. Call it with `global_attention_mask`
    (B L, nonzero where global) to make more tokens global. Weights of the attention are no longer
    dropped out in training, and `output_attentions` is refused: they are never formed.

    To load what `save_pretrained` stored, build the original class from the stored config, convert
    it with the same arguments, and load the state dict.

    Args:
        window: the total width w, even.
        hubs: the first so many tokens of each row are global ([CLS] or <s>: 1).

    Raises:
        LongspanError: another architecture, a decoder, a model that is one already, a `length`
            below what the model knows, or whatever the mechanism refuses.

    >>> long = longformer(RobertaModel.from_pretrained("roberta-base"), window=512, length=4096)
    """
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise LongspanError(
            f"longformer converts {' and '.join(ARCHITECTURES)} models and got a "
            f"{config.model_type}: use a checkpoint of one of these."
        )
    if config.is_decoder:
        raise LongspanError(
            "longformer converts encoders and got a decoder (is_decoder=True), whose cache it "
            "cannot fill: set config.is_decoder=False, or build a LongspanForCausalLM."
        )
    converted = deepcopy(model)
    base: Any = converted.base_model
    for layer in base.encoder.layer:
        if isinstance(layer.attention.self, SelfAttention):
            raise LongspanError("this model attends as Longformer already: convert the original.")
        layer.attention.self = SelfAttention(layer.attention.self, window=window, hubs=hubs)
    rows = _lengthen(base.embeddings, length)
    converted.config.max_position_embeddings = rows
    converted.config._attn_implementation = PADDING
    return converted


class SelfAttention(nn.Module):
    """BERT's self-attention by `longformer`; W_o stays where BERT has it, in the layer's output.

    Raises:
        LongspanError: a mask that is not one of padding, or attention weights asked for.
    """

    def __init__(self, original: Any, *, window: int, hubs: int) -> None:
        super().__init__()
        with torch.device("meta"):  # all its projections are replaced
            self.mixer = MultiHead(
                build("longformer", window=window, hubs=hubs),
                width=original.query.in_features,
                heads=original.num_attention_heads,
            )
        project = self.mixer.project
        project["q"], project["k"], project["v"] = original.query, original.key, original.value
        for name, origin in self.mixer.attention.extra.items():
            project[name] = deepcopy(project[origin])
        self.mixer.add_module("output", nn.Identity())

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
                "attention weights are not kept: longformer never forms them. "
                "Leave output_attentions out."
            )
        if attention_mask is not None and attention_mask.dim() != 2:
            raise LongspanError(
                f"attention_mask came to longformer as {tuple(attention_mask.shape)}; expected "
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


def _lengthen(embeddings: Any, length: int) -> int:
    """Repeat the position table in place; returns its number of rows."""
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
