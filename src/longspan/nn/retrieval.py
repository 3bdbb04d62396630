"""Readers of what was found: next-token distributions from a base model's and from neighbours.

A search, over a datastore on disk or over what was read lately, gives `Found`; a `Reader` joins it
with the base model's `Base`. Distributions are log-probabilities, which are logits too: readers
can be chained, each taking what the one before gave for its base.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.shapes import Inputs, Tokens

Logits = Float[Tensor, "B L vocabulary"]


class Found(NamedTuple):
    """The neighbours of each position, nearest first: larger scores are nearer.

    `values` are the tokens that followed them, −1 in a slot that holds none.
    """

    scores: Float[Tensor, "B L K"]
    values: Int[Tensor, "B L K"]

    def nearest(self, count: int | None) -> "Found":
        """The first so many; None for all."""
        return Found(self.scores[..., :count], self.values[..., :count])


class Base(NamedTuple):
    """What the base model says: logits, the states they came from and the output embedding."""

    logits: Logits
    hidden: Inputs | None = None
    weight: Float[Tensor, "vocabulary E"] | None = None


class Reader(nn.Module, ABC):
    """(base, found) → log-probabilities of the next token, B L vocabulary, in at least float32.

    A position reads its own neighbours only, in any order; one that has none keeps what the base
    model says.
    """

    @abstractmethod
    def forward(self, base: Base, found: Found) -> Logits: ...


def by_value(
    scores: Float[Tensor, "B L K"], values: Int[Tensor, "B L K"], size: int
) -> Float[Tensor, "B L size"]:
    """log Σ exp(score) over the slots of each value 0 … size − 1; −∞ where there are none."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(values < 0, -math.inf)
    if not scores.shape[-1]:
        return scores.new_full((*scores.shape[:2], size), -math.inf)
    highest = scores.detach().amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == -math.inf, 0)
    total = scores.new_zeros(*scores.shape[:2], size)
    total = total.scatter_add(-1, values.clamp(min=0).long(), (scores - highest).exp())
    # Where there is nothing the logarithm's slope would be infinite, and times 0 no number.
    none = total == 0
    return (total.masked_fill(none, 1).log() + highest).masked_fill(none, -math.inf)


def interpolate(logits: Logits, votes: Logits, share: float) -> Logits:
    """log((1 − λ) p + λ q), p and q the softmax of each; p where q has no vote at all."""
    base = logits.to(votes.dtype).log_softmax(-1)
    if share == 0:
        return base
    silent = (votes == -math.inf).all(-1, keepdim=True)
    votes = votes.masked_fill(silent, 0).log_softmax(-1)
    rest = math.log1p(-share) if share < 1 else -math.inf
    return torch.where(silent, base, torch.logaddexp(rest + base, math.log(share) + votes))


class Recent(NamedTuple):
    """The last states of each row, oldest first, and one more than the tokens that followed them:

    0 stands for none, so that a row of zeros has read nothing.
    """

    keys: Float[Tensor, "B M D"]
    tokens: Int[Tensor, "B M"]

    def heard(self, tokens: Int[Tensor, "B"]) -> "Recent":
        """What followed the newest state, once it is known."""
        return Recent(self.keys, torch.cat([self.tokens[:, :-1], tokens[:, None] + 1], 1))


def recall(
    hidden: Float[Tensor, "B L D"], following: Tokens, state: Recent | None, *, size: int
) -> tuple[Found, Recent]:
    """The `size` pairs (state, next token) before each position, scored by h·h_i.

    A position does not see its own pair, whose token is what is asked for.

    Args:
        following: the token after each position; where negative, nothing is remembered of it,
            though its slot is taken.
    """
    hidden = hidden.detach()
    length = hidden.shape[1]
    tokens = (following + 1).clamp(min=0)
    past = 0 if state is None else state.keys.shape[1]
    keys = hidden if state is None else torch.cat([state.keys, hidden], 1)
    tokens = tokens if state is None else torch.cat([state.tokens, tokens], 1)
    now = past + torch.arange(length, device=hidden.device)[:, None]
    at = torch.arange(past + length, device=hidden.device)
    seen = (at < now) & (at >= now - size)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        scores = hidden.to(wide) @ keys.to(wide).mT
    values = (tokens - 1)[:, None].expand(-1, length, -1)
    start = max(past + length - size, 0)
    return (
        Found(scores, values.masked_fill(~seen, -1)),
        Recent(keys[:, start:], tokens[:, start:]),
    )
