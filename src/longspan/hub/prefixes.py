"""One prompt that many texts begin with, read once."""

from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from longspan.errors import LongspanError
from longspan.hub.cache import StateCache
from longspan.hub.pretrained import Pretrained
from longspan.hub.rewinding import Rewinding
from longspan.hub.swapped import SwappedCache
from longspan.shapes import Tokens


@torch.no_grad()
def prefix(
    model: PreTrainedModel,
    tokens: Tokens,
    mask: Int[Tensor, "B L"] | None = None,
    *,
    piece: int | None = None,
) -> Rewinding:
    """The cache of a causal language model after `tokens`, from whose snapshots or forks to go on.

    `generate` takes it with the whole text, prefix included. That of a longspan model is saved by
    `save_state(cache.carried(), path)` and comes back by `StateCache.of(load_state(path))`.

    Args:
        mask: 1 for real tokens and 0 for padding.
        piece: read so many tokens at a time, which bounds the memory that reading takes.

    Raises:
        LongspanError: a model that carries no state, or has an encoder; pieces below one token.

    >>> cache = prefix(model, book)
    >>> for question in questions:
    ...     model.generate(torch.cat([book, question], 1), past_key_values=cache.snapshot())
    """
    if model.config.is_encoder_decoder:
        raise LongspanError(
            "a prefix is of a decoder's own tokens: what an encoder read is kept by passing "
            "encoder_outputs."
        )
    if piece is not None and piece < 1:
        raise LongspanError(f"piece is {piece}; expected at least one token.")
    cache = StateCache() if isinstance(model, Pretrained) else SwappedCache()
    said: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if model._supports_logits_to_keep():  # pyright: ignore[reportCallIssue]
        said["logits_to_keep"] = 1
    parts = tokens.split(piece or tokens.shape[1], 1)
    for part, stop in zip(parts, accumulate(part.shape[1] for part in parts), strict=True):
        model(part, attention_mask=None if mask is None else mask[:, :stop], **said)
    return cache
