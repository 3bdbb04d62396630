"""Cross-entropy of next, masked and target tokens, and what parts of a model add to it."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MaskedLMOutput,
    Seq2SeqLMOutput,
    SequenceClassifierOutput,
)

from longspan.nn import auxiliary
from longspan.shapes import Tokens

IGNORED = -100


# `auxiliary` in each: the losses that parts of the model have added to `loss`, by name.
@dataclass
class CausalLMOutput(CausalLMOutputWithPast):
    """Logits of next tokens, and the carried state."""

    past_key_values: Any = None
    auxiliary: dict[str, Tensor] | None = None


@dataclass
class MaskedOutput(MaskedLMOutput):
    """Logits of masked tokens."""

    auxiliary: dict[str, Tensor] | None = None


@dataclass
class ClassifierOutput(SequenceClassifierOutput):
    """Logits of labels."""

    auxiliary: dict[str, Tensor] | None = None


@dataclass
class Seq2SeqOutput(Seq2SeqLMOutput):
    """Logits of target tokens, the decoder's state and the encoder's output."""

    past_key_values: Any = None
    auxiliary: dict[str, Tensor] | None = None


def with_auxiliary(
    model: nn.Module, loss: Tensor | None, labels: Tensor | None, count: Tensor | int | None
) -> dict[str, Any]:
    """The fields `loss` and `auxiliary` of an output: what parts have left is added to the loss.

    Where a loss is divided by the labels of several batches (`count`), the parts' losses, which
    are of this batch, weigh as much as its labels do.
    """
    named = auxiliary.collect(model)
    if loss is None or not named:
        return {"loss": loss, "auxiliary": None}
    share: Tensor | float = 1.0
    if labels is not None and count is not None:
        share = (labels != IGNORED).sum() / count
    added = sum((value.to(loss.dtype) for value in named.values()), loss.new_zeros(()))
    return {
        "loss": loss + share * added,
        "auxiliary": {name: value.detach() for name, value in named.items()},
    }


def shifted(labels: Tokens) -> Tokens:
    """The label of each position: the token after it, and none for the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def cross_entropy(
    logits: Float[Tensor, "B L vocabulary"],
    labels: Int[Tensor, "B L"],
    count: Tensor | int | None = None,
    *,
    chunk: int = 1 << 24,
) -> Float[Tensor, ""]:
    """Mean nats of the labels that are not −100.

    Args:
        count: divides the sum in place of the number of labels (gradient accumulation).
        chunk: numbers held in float32 at once; more are recomputed in the backward pass.
    """
    labels = labels.to(logits.device)
    rows = max(chunk // logits.shape[-1], 1)
    parts = list(zip(logits.flatten(0, 1).split(rows), labels.flatten().split(rows), strict=True))
    # Recomputed, a chunk leaves no float32 copy behind.
    again = len(parts) > 1 and torch.is_grad_enabled()
    total = sum(
        (
            checkpoint(_nats, *part, use_reentrant=False) if again else _nats(*part)
            for part in parts
        ),
        start=logits.new_zeros((), dtype=torch.float32),
    )
    if count is None:
        count = (labels != IGNORED).sum().clamp(min=1)
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)  # pyright: ignore


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
