"""Dynamic evaluation (Graves, 2013; Krause et al., 2018, 2019): weights that follow the text.

A segment is scored with the weights as they are, and only then do they take a step on it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from longspan.errors import LongspanError

Rule = Literal["sgd", "rms", "rms-decay"]
Chosen = Callable[[str], bool]
# Root mean squares of gradients over training segments, by parameter.
Statistics = dict[str, Tensor]


class Told(NamedTuple):
    """Summed nats of the scored tokens, how many they are, and both for every segment."""

    nats: float
    tokens: int
    segments: tuple[tuple[float, int], ...]

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens


@dataclass(frozen=True, kw_only=True)
class DynamicEvaluation:
    """Scores streams while learning from what was scored, with one of three rules.

        sgd:        θ ← θ − η g
        rms:        θ ← θ − η g / (r + ε)
        rms-decay:  θ ← θ − η g / (r + ε) + λ D (θ₀ − θ),  D = min(r / r̄, 1 / λ)

    r = √MS_g is the root mean square of the training gradients, r̄ the mean over parameter tensors
    of each one's mean. At a rate and a decay of 0 this is plain evaluation.

    Args:
        rate: η. decay: λ. epsilon: ε, of Krause's code.
        segment: n, 5 for LSTMs and 64 to 128 for Transformers.
        context: tokens read again before each segment, for a model that carries no state; by
            default the state is carried, computed by the weights of its time.
        clip: largest norm of a gradient.

    Raises:
        LongspanError: an unknown rule, a negative number, a decay with a rule that has none.
    """

    rule: Rule = "rms-decay"
    rate: float = 1e-4
    decay: float = 0.0
    segment: int = 64
    context: int | None = None
    epsilon: float = 1e-3
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in ("sgd", "rms", "rms-decay"):
            raise LongspanError(f"no rule '{self.rule}'; expected sgd, rms or rms-decay.")
        if self.segment < 1 or min(self.rate, self.decay, self.context or 0) < 0:
            raise LongspanError(
                f"segment {self.segment}, rate {self.rate}, decay {self.decay}, context "
                f"{self.context}: expected 1 or more, and no negative number."
            )
        if self.decay and self.rule != "rms-decay":
            raise LongspanError(f"decay={self.decay} has no meaning with {self.rule}: leave it 0.")

    def statistics(
        self, model: nn.Module, tokens: Int[Tensor, "*B N"], *, chosen: Chosen | None = None
    ) -> Statistics:
        """r of every parameter, from training text in segments of the same length, mean losses."""
        with _adapting(model, chosen) as (names, parameters, _):
            total = [torch.zeros_like(p) for p in parameters]
            count = 0
            for row in _rows(tokens):
                for loss, _ in _losses(model, row, self.segment, self.context):
                    for sum_, g in zip(total, _gradients(loss, parameters), strict=True):
                        sum_ += g.square()
                    count += 1
        return {name: (sum_ / count).sqrt() for name, sum_ in zip(names, total, strict=True)}

    def __call__(
        self,
        model: nn.Module,
        tokens: Int[Tensor, "*B N"],
        statistics: Statistics | None = None,
        *,
        chosen: Chosen | None = None,
        restore: bool = True,
    ) -> Told:
        """Score every token but the first of each stream; each starts from the model's weights.

        Dropout is off. Afterwards the weights are, bit by bit, what they were.

        Args:
            statistics: what `statistics` gave, for the rules with r.
            chosen: name → whether this parameter adapts; by default all that require gradients.
            restore: False leaves the weights as a single stream has made them.

        Raises:
            LongspanError: a rule without its statistics; several streams without restore.
        """
        rows = _rows(tokens)
        if not restore and len(rows) > 1:
            raise LongspanError(
                f"{len(rows)} streams adapt {len(rows)} copies of the weights: restore them."
            )
        segments: list[tuple[float, int]] = []
        for row in rows:
            with _adapting(model, chosen, restore=restore) as (names, parameters, start):
                scales = self._scales(names, statistics)
                for loss, count in _losses(model, row, self.segment, self.context):
                    segments.append((float(loss.detach().double()) * count, count))
                    self._step(_gradients(loss, parameters), parameters, start, scales)
        nats, count = (sum(part) for part in zip(*segments, strict=True))
        return Told(float(nats), int(count), tuple(segments))

    def _scales(
        self, names: Sequence[str], statistics: Statistics | None
    ) -> list[tuple[Tensor, Tensor]] | None:
        """r and λD of each parameter."""
        if self.rule == "sgd":
            return None
        if statistics is None or any(name not in statistics for name in names):
            raise LongspanError(
                f"the rule {self.rule} needs the training gradients of every parameter that "
                "adapts: give what `statistics` returns, for the same choice of parameters."
            )
        r = [statistics[name] for name in names]
        mean = torch.stack([part.mean() for part in r]).mean()
        return [(part, (self.decay * part / mean).clamp(max=1)) for part in r]

    @torch.no_grad()
    def _step(
        self,
        gradients: Sequence[Tensor],
        parameters: Sequence[nn.Parameter],
        start: Sequence[Tensor],
        scales: list[tuple[Tensor, Tensor]] | None,
    ) -> None:
        if self.clip is not None:
            norm = torch.stack([g.norm() for g in gradients]).norm()
            share = (self.clip / (norm + 1e-6)).clamp(max=1)
            gradients = [g * share for g in gradients]
        for n, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
            if scales is None:
                p.sub_(self.rate * g)
            else:
                r, pull = scales[n]
                p.add_(pull * (start[n] - p) - self.rate * g / (r + self.epsilon))


class Tuned(NamedTuple):
    """The settings of fewest nats on held-out text, and every one's loss in order."""

    best: DynamicEvaluation
    losses: list[float]


def tune(
    model: nn.Module,
    tokens: Int[Tensor, "*B N"],
    candidates: Sequence[DynamicEvaluation],
    statistics: Statistics | None = None,
    *,
    chosen: Chosen | None = None,
) -> Tuned:
    """Choose a rule, a rate and a decay on held-out text.

    >>> grid = [DynamicEvaluation(rate=r, decay=d) for r in (1e-5, 1e-4) for d in (0, 1e-3)]
    >>> best = tune(model, valid, grid, grid[0].statistics(model, train)).best
    """
    if not candidates:
        raise LongspanError("there is no candidate to choose from: give at least one.")
    losses = [candidate(model, tokens, statistics, chosen=chosen).loss for candidate in candidates]
    return Tuned(candidates[min(range(len(losses)), key=losses.__getitem__)], losses)


def _rows(tokens: Tensor) -> list[Tensor]:
    rows = list(tokens if tokens.dim() > 1 else tokens[None])
    if tokens.shape[-1] < 2:
        raise LongspanError(f"{tokens.shape[-1]} tokens leave nothing to score; give at least 2.")
    return rows


def _losses(
    model: nn.Module, tokens: Tensor, segment: int, context: int | None
) -> Iterator[tuple[Tensor, int]]:
    """The mean loss of each segment, with its graph, and its tokens; weights may change between."""
    tokens = tokens.to(next(model.parameters()).device).long()
    state: Any = None
    for first in range(0, len(tokens) - 1, segment):
        last = min(first + segment, len(tokens) - 1)
        start = first if context is None else max(first - context, 0)
        inputs = tokens[None, start:last]
        if context is None:
            output = model(input_ids=inputs, past_key_values=state, use_cache=True)
            state = _detached(output.past_key_values)
        else:
            output = model(input_ids=inputs, use_cache=False)
        logits = output.logits[0, first - start :].float()
        yield F.cross_entropy(logits, tokens[first + 1 : last + 1]), last - first


def _detached(cache: Any) -> Any:
    """A carried state without its history: a cache of ours, or one of transformers' layers."""
    if cache is None:
        raise LongspanError(
            "this model carries no state from segment to segment: give context=, the number of "
            "tokens to read again before each."
        )
    if hasattr(cache, "detach"):
        return cache.detach()
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    return cache


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradients, zeros where a parameter took no part."""
    found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


@contextmanager
def _adapting(
    model: nn.Module, chosen: Chosen | None, *, restore: bool = True
) -> Iterator[tuple[list[str], list[nn.Parameter], list[Tensor]]]:
    """Names, parameters and copies of those that adapt; tied ones come once.

    Only they require gradients meanwhile; the mode, the flags and the values are put back.
    """
    every = list(model.named_parameters())
    flags = [p.requires_grad for _, p in every]
    wanted = [(n, p) for n, p in every if (chosen(n) if chosen else p.requires_grad)]
    if not wanted:
        raise LongspanError("no parameter was chosen to adapt: `chosen` is asked by their names.")
    start = [p.detach().clone() for _, p in wanted]
    training = model.training
    own = {id(p) for _, p in wanted}
    try:
        model.eval()
        for _, p in every:
            p.requires_grad_(id(p) in own)
        with torch.enable_grad():
            yield [n for n, _ in wanted], [p for _, p in wanted], start
    finally:
        for (_, p), flag in zip(every, flags, strict=True):
            p.requires_grad_(flag)
        model.train(training)
        if restore:
            with torch.no_grad():
                for (_, p), value in zip(wanted, start, strict=True):
                    p.copy_(value)
