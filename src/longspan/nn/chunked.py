"""Position-wise work a chunk of tokens at a time, computed again in the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan.errors import LongspanError


class Chunked(nn.Module):
    """[f(x^(1)); …; f(x^(n))] of chunks of C tokens: a position-wise f(x), in less memory.

    Exact with dropout off; with it, the same distribution from other random numbers.

    Args:
        chunk: C; the last may be shorter.
        recompute: keep nothing of a chunk for the backward pass but its input: without that,
            training saves no memory.

    Raises:
        LongspanError: a chunk below 1.
    """

    def __init__(self, module: nn.Module, *, chunk: int, recompute: bool = True) -> None:
        super().__init__()
        if chunk < 1:
            raise LongspanError(f"chunks of {chunk} tokens: expected at least 1.")
        self.module, self.chunk, self.recompute = module, chunk, recompute

    def forward(self, x: Float[Tensor, "B L E"]) -> Float[Tensor, "B L _"]:
        again = self.recompute and torch.is_grad_enabled()
        parts = x.split(self.chunk, 1)
        return torch.cat(
            [_recomputed(self.module, p) if again else self.module(p) for p in parts], 1
        )


def cross_entropy(
    x: Float[Tensor, "B L E"],
    weight: Float[Tensor, "vocabulary E"],
    labels: Int[Tensor, "B L"],
    bias: Float[Tensor, "vocabulary"] | None = None,
    *,
    chunk: int = 1024,
    ignored: int = -100,
) -> Float[Tensor, ""]:
    """Mean nats of labels under softmax(x Wᵀ + b), with the logits of `chunk` tokens at a time.

    0 where all labels are ignored.
    """

    def nats(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        logits = F.linear(x, weight, bias)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), labels, ignore_index=ignored, reduction="sum")

    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros((), dtype=wide)
    for part, own in zip(x.flatten(0, 1).split(chunk), labels.flatten().split(chunk), strict=True):
        total = total + _recomputed(nats, part, weight, bias, own)
    return total / (labels != ignored).sum().clamp(min=1)


def _checkpointed(work: Callable[..., Any], *given: Any) -> Any:
    return checkpoint(work, *given, use_reentrant=False)


# A loop over chunks that dynamo would unroll: eager under torch.compile.
_recomputed: Any = torch.compiler.disable(_checkpointed)
