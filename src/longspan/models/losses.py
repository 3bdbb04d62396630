"""Cross-entropy of next, masked and target tokens, in float32 and by chunks of rows."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longspan.shapes import Tokens

IGNORED = -100


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
