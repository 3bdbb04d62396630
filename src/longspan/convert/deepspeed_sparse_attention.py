"""BERT and RoBERTa with DeepSpeed's sparse attention, and its padding to whole blocks."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from longspan.convert.longformer import ARCHITECTURES, PADDING, _lengthen
from longspan.errors import LongspanError
from longspan.nn import MultiHead
from longspan.registry import build
from longspan.shapes import Inputs

Model = TypeVar("Model", bound=PreTrainedModel)


def sparse_attention(
    model: Model,
    *,
    sparsity: str | Mapping[str, Any] = "fixed",
    block: int = 16,
    length: int | None = None,
) -> Model:
    """A copy of a BERT or RoBERTa whose self-attention is `deepspeed-sparse-attention`.

    With sparsity="dense" outputs are the model's own. No length needs to be a multiple of `block`.

    Args:
        length: tokens that the position table is extended to, by repetition.

    Raises:
        LongspanError: another architecture, a decoder, a `length` below what the model knows, or
            whatever the mechanism refuses.

    >>> sparse = sparse_attention(BertModel.from_pretrained("bert-base-uncased"), length=4096)
    """
    config = model.config
    if config.model_type not in ARCHITECTURES or config.is_decoder:
        raise LongspanError(
            f"sparse_attention converts {' and '.join(ARCHITECTURES)} encoders and got a "
            f"{config.model_type}{' decoder' if config.is_decoder else ''}: use such a checkpoint."
        )
    converted = deepcopy(model)
    base: Any = converted.base_model
    for layer in base.encoder.layer:
        layer.attention.self = SelfAttention(layer.attention.self, sparsity, block)
    if length is not None:
        converted.config.max_position_embeddings = _lengthen(base.embeddings, length)
    converted.config._attn_implementation = PADDING
    return converted


class SelfAttention(nn.Module):
    """BERT's self-attention by blocks; W_o stays where BERT has it, in the layer's output."""

    def __init__(self, original: Any, sparsity: str | Mapping[str, Any], block: int) -> None:
        super().__init__()
        attention = build("deepspeed-sparse-attention", sparsity=sparsity, block=block)
        with torch.device("meta"):  # all its projections are replaced
            self.mixer = MultiHead(
                attention, width=original.query.in_features, heads=original.num_attention_heads
            )
        for name, linear in zip("qkv", (original.query, original.key, original.value), strict=True):
            self.mixer.project[name] = linear
        self.mixer.add_module("output", nn.Identity())

    def forward(
        self, hidden_states: Inputs, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Inputs, None]:
        return self.mixer(hidden_states, keep=attention_mask)[0], None


def pad_to_block_size(
    inputs: Mapping[str, Tensor], *, block: int, pad_token_id: int
) -> tuple[dict[str, Tensor], int]:
    """(a model's inputs, B L or B L E each, at a multiple of `block` tokens, how many were added).

    Added tokens are `pad_token_id` in input_ids and position_ids, as DeepSpeed has it, 0 elsewhere;
    an attention_mask is made where there is none.

    Raises:
        LongspanError: no inputs.
    """
    if not inputs:
        raise LongspanError("there is nothing to pad: give input_ids or inputs_embeds.")
    first = next(iter(inputs.values()))
    added = -first.shape[1] % block
    mask = {"attention_mask": first.new_ones(first.shape[:2], dtype=torch.long)}
    padded = {}
    for name, t in (mask | dict(inputs)).items():
        value = pad_token_id if name in ("input_ids", "position_ids") else 0
        padded[name] = F.pad(t, (*(0, 0) * (t.dim() - 2), 0, added), value=value)
    return padded, added


def unpad(output: Tensor, added: int) -> Tensor:
    """A model's output, B L …, without the tokens that `pad_to_block_size` added."""
    return output[:, : output.shape[1] - added]
