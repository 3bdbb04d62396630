"""The four ways in which papers score a language model on a stream of tokens.

Each scores every token but the first of a stream exactly once; they differ in how much of what
came before the model sees, so figures of different protocols do not compare.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.errors import LongspanError
from longspan.hub import StateCache
from longspan.shapes import Tokens


class Score(NamedTuple):
    """Summed nats of `tokens` scored tokens."""

    nats: float
    tokens: int

    def perplexity(self, words: int | None = None) -> float:
        """exp(nats / tokens), or per word where the original text's words are given."""
        return math.exp(self.nats / (words or self.tokens))

    def bits_per_byte(self, size: int | None = None) -> float:
        """nats / ln 2 / bytes; `size` is that of the scored text, by default one byte a token."""
        return self.nats / math.log(2) / (size or self.tokens)


def non_overlapping(
    model: nn.Module, tokens: Int[Tensor, "N"], *, window: int, batch: int = 1
) -> Score:
    """Windows side by side, each on its own: its first tokens have little context."""
    return sliding(model, tokens, window=window, stride=window, batch=batch)


def sliding(
    model: nn.Module, tokens: Int[Tensor, "N"], *, window: int, stride: int, batch: int = 1
) -> Score:
    """A window moved on by `stride`, which scores its last `stride` tokens; the first scores all.

    Raises:
        LongspanError: a stride that is not of 1 … window, or fewer than two tokens.
    """
    if not 1 <= stride <= window:
        raise LongspanError(f"stride is {stride}; expected 1 to the window, {window}.")
    targets = _count(tokens)
    spans, done = [], 0
    for first in range(0, targets, stride):
        last = min(first + window, targets)
        spans.append((first, last, last - done))
        done = last
        if done == targets:
            break
    nats = 0.0
    with _evaluating(model):
        for group in _alike(spans, batch):
            rows = torch.stack([tokens[first : last + 1] for first, last, _ in group])
            scored = token_nats(model, rows)
            nats += sum(
                float(row[-new:].double().sum())
                for row, (_, _, new) in zip(scored, group, strict=True)
            )
    return Score(nats, targets)


def carried(model: nn.Module, tokens: Int[Tensor, "*B N"], *, segment: int) -> Score:
    """Segment by segment, each from the state that the last one left; rows are streams.

    Raises:
        LongspanError: fewer than two tokens, or from the model, that it carries no state.
    """
    rows = tokens if tokens.dim() == 2 else tokens[None]
    targets, cache, nats = _count(rows), StateCache(), 0.0
    if segment < 1:
        raise LongspanError(f"segment is {segment}; expected at least 1.")
    with _evaluating(model):
        for first in range(0, targets, segment):
            piece = rows[:, first : min(first + segment, targets) + 1]
            nats += float(token_nats(model, piece, cache).double().sum())
    return Score(nats, targets * len(rows))


def token_by_token(model: nn.Module, tokens: Int[Tensor, "*B N"]) -> Score:
    """One token per call from the carried state, as in generation."""
    return carried(model, tokens, segment=1)


def token_nats(
    model: nn.Module, tokens: Tokens, cache: StateCache | None = None
) -> Float[Tensor, "B L-1"]:
    """−ln p of each token but the first, given those before it and what `cache` carries."""
    tokens = tokens.to(next(model.parameters()).device)
    named = {"use_cache": False} if cache is None else {"past_key_values": cache}
    logits = model(input_ids=tokens[:, :-1], **named).logits.float()
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:].long(), reduction="none")


def _count(tokens: Tensor) -> int:
    if tokens.shape[-1] < 2:
        raise LongspanError(f"{tokens.shape[-1]} tokens leave nothing to score; give at least 2.")
    return tokens.shape[-1] - 1


Span = tuple[int, int, int]


def _alike(spans: list[Span], batch: int) -> Iterator[list[Span]]:
    """Runs of spans of one length, at most `batch` in each."""
    group: list[Span] = []
    for span in spans:
        first = group[0] if group else span
        if len(group) == batch or span[1] - span[0] != first[1] - first[0]:
            yield group
            group = []
        group.append(span)
    yield group


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
