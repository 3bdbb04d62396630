"""Early exits: rules that say after which block a token leaves, and the driver that obeys them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from longspan.errors import LongspanError
from longspan.nn.depth import Depth, Step, Went, onward
from longspan.shapes import Inputs, Keep

Rows = Float[Tensor, "R E"]


def _no_logits(n: int, x: Tensor, at: Tensor) -> Tensor:
    raise LongspanError("this rule reads logits, and the driver was given no output classifier.")


class Given(NamedTuple):
    """What a model tells its driver beside the blocks.

    Attributes:
        read: the norm before every classifier; the identity where blocks end in one.
        logits: (n, the states at the places `at`: B L) → what the n-th classifier says of them.
        place: tokens generated before each one (B L).
        encoded: mean of an encoder's output (B E).
        floor: no token leaves before this block (B L, or one number).
        exits: where each token leaves (B L), in place of the rule.
        carries: whether anyone goes on from the states.
    """

    read: Callable[[Tensor], Tensor] = nn.Identity()
    logits: Callable[[int, Tensor, Tensor], Tensor] = _no_logits
    place: Tensor | None = None
    encoded: Tensor | None = None
    floor: Tensor | int = 1
    exits: Tensor | None = None
    carries: bool = True


class Asked(NamedTuple):
    """R tokens after block n of `blocks`: their states after any block so far, 0 the embedding."""

    n: int
    blocks: int
    state: Callable[[int], Tensor]
    read: Callable[[Tensor], Tensor]
    logits: Callable[[], Tensor]
    place: Int[Tensor, "R"]
    encoded: Rows | None


class Graded(NamedTuple):
    """Every token after every block, and how well the block's classifier does (N B L).

    Attributes:
        states: N + 1 of B L E, the embeddings first.
        nats: −log p of the right token. correct: whether it has the greatest logit.
        agrees: whether the greatest logit is that of the last block.
        counted: B L, the tokens that have a label.
    """

    states: Sequence[Tensor]
    read: Callable[[Tensor], Tensor]
    nats: Float[Tensor, "N B L"]
    correct: Bool[Tensor, "N B L"]
    agrees: Bool[Tensor, "N B L"]
    counted: Bool[Tensor, "B L"]
    encoded: Float[Tensor, "B E"] | None


class Exit(nn.Module, ABC):
    """Whether tokens leave after a block; stateless, so that a token's exit is its own affair.

    `thresholds` (blocks − 1, saved with the model) are the knob that calibration turns.
    """

    thresholds: Tensor

    def __init__(self, *, blocks: int, threshold: float | Sequence[float]) -> None:
        super().__init__()
        self.blocks = blocks
        self.register_buffer("thresholds", torch.ones(max(blocks - 1, 0)))
        self.set_threshold(threshold)

    def set_threshold(self, threshold: float | Sequence[float]) -> None:
        """One for all blocks but the last, or one each.

        Raises:
            LongspanError: another number of them.
        """
        given = torch.as_tensor(threshold, dtype=torch.float64)
        if given.dim() and len(given) != self.blocks - 1:
            raise LongspanError(
                f"{len(given)} thresholds were given for {self.blocks} blocks: give one, or "
                f"{self.blocks - 1}, since the last block needs none."
            )
        self.thresholds.copy_(given)

    @abstractmethod
    def forward(self, asked: Asked) -> Bool[Tensor, "R"]: ...

    def loss(self, graded: Graded) -> Float[Tensor, ""] | None:
        """What trains the rule; None where there is nothing to train."""
        return None


class Fixed(Exit):
    """Every token leaves after block `at` (any-time decoding)."""

    def __init__(self, at: int, *, blocks: int) -> None:
        super().__init__(blocks=blocks, threshold=1.0)
        if not 1 <= at <= blocks:
            raise LongspanError(f"no exit {at}: expected a block from 1 to {blocks}.")
        self.at = at

    def forward(self, asked: Asked) -> Bool[Tensor, "R"]:
        return torch.full_like(asked.place, asked.n >= self.at, dtype=torch.bool)


class EarlyExit(Depth):
    """A token that leaves after block n keeps h^n, which all later blocks take as its state.

    Their keys and values come from the copy, so that later tokens attend to something. Whole, in
    pieces and step by step give the same, each row and token with an exit of its own.

    Args:
        minimum: no token leaves before this block.
    """

    def __init__(self, rule: Exit, *, minimum: int = 1) -> None:
        super().__init__()
        self.rule, self.minimum = rule, minimum

    def forward(
        self,
        steps: Sequence[Step],
        x: Inputs,
        states: Sequence[Any] | None = None,
        *,
        keep: Keep | None = None,
        given: Given | None = None,
    ) -> Went:
        given = Given() if given is None else given
        active = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        place = given.place
        if place is None:
            place = torch.zeros_like(active, dtype=torch.long)
        taken = torch.zeros_like(active, dtype=torch.long)
        history, carried = [x], []
        for n, step in enumerate(steps, 1):
            taken = taken + active
            x, state = onward(step, x, states and states[n - 1], active, carries=given.carries)
            carried.append(state)
            if n == len(steps):
                break
            history.append(x)
            if given.exits is not None:
                active = active & (given.exits > n)
                continue
            ask = active & (n >= self.minimum) & (n >= given.floor)
            if bool(ask.any()):
                leave = self.rule(_asked(n, len(steps), history, place, ask, given))
                active = active.masked_scatter(ask, ~leave)
        return Went(x, tuple(carried), taken)


def _asked(
    n: int, blocks: int, history: list[Tensor], place: Tensor, ask: Tensor, given: Given
) -> Asked:
    encoded = given.encoded
    return Asked(
        n,
        blocks,
        lambda m: history[m][ask],
        given.read,
        lambda: given.logits(n, history[n][ask], ask),
        place[ask],
        None if encoded is None else encoded[ask.nonzero()[:, 0]],
    )


@dataclass
class Trace:
    """What the model's calls gave while it was traced: exits and classifiers of each token."""

    exits: list[Int[Tensor, "B _"]] = field(default_factory=list)
    projections: list[Int[Tensor, "B _"]] = field(default_factory=list)

    def generated(self) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Exits and classifiers of the steps that chose a token: the last of each call."""
        last = [torch.stack([t[:, -1] for t in kept], 1) for kept in (self.exits, self.projections)]
        return last[0], last[1]


@contextmanager
def traced(model: nn.Module) -> Iterator[Trace]:
    """Collects the exits of every token in the block, as of one `generate` without beams.

    >>> with traced(model) as trace:
    ...     model.generate(prompt, max_new_tokens=100)
    >>> model.work(*trace.generated()).depth
    """
    trace = Trace()

    def note(_: nn.Module, __: Any, output: Any) -> None:
        trace.exits.append(output.exits)
        trace.projections.append(output.projections)

    hook = model.register_forward_hook(note)
    try:
        yield trace
    finally:
        hook.remove()


@dataclass(frozen=True)
class Point:
    """A threshold on validation tokens: mean nats, share of right tokens, mean exit."""

    threshold: float | Sequence[float]
    nats: float
    accuracy: float
    depth: float


@torch.no_grad()
def curve(
    model: Any,
    tokens: Int[Tensor, "B L"],
    thresholds: Sequence[float | Sequence[float]],
    *,
    labels: Int[Tensor, "B T"] | None = None,
    mask: Tensor | None = None,
) -> list[Point]:
    """Quality against mean exit, a point for each threshold, given the right earlier tokens.

    The model's own thresholds are put back. Choosing among the points is calibration by grid
    search; `LearnThenTest` is the one with a guarantee.

    Args:
        labels: of a decoder beside an encoder; by default the tokens themselves, next ones.
    """
    rule, before = model.driver.rule, model.driver.rule.thresholds.clone()
    target = tokens if labels is None else labels
    points = []
    try:
        for threshold in thresholds:
            rule.set_threshold(threshold)
            output = model(tokens, attention_mask=mask, labels=target, use_cache=False)
            logits, right = (output.logits, target)
            if labels is None:
                logits, right = logits[:, :-1], target[:, 1:]
            counted = right != -100
            if labels is None and mask is not None:
                counted = counted & mask[:, :-1].bool() & mask[:, 1:].bool()
            scored = logits[counted]
            depth = output.exits[:, : counted.shape[1]][counted].double().mean()
            hits = (scored.argmax(-1) == right[counted]).double().mean()
            nats = F.cross_entropy(scored.float(), right[counted])
            points.append(Point(threshold, float(nats), float(hits), float(depth)))
    finally:
        rule.set_threshold(before.tolist())
    return points
