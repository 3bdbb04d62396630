"""BERT and RoBERTa with DeepSpeed's sparse attention, and its padding to whole blocks."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.convert.bert import Model, with_attention
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.registry import build


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
        LongspanError: whatever `with_attention` or the mechanism refuses.

    >>> sparse = sparse_attention(BertModel.from_pretrained("bert-base-uncased"), length=4096)
    """

    def attend(_: int) -> Attention:
        return build("deepspeed-sparse-attention", sparsity=sparsity, block=block)

    return with_attention(model, "sparse_attention", attend, length=length)


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
