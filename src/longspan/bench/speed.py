"""The cost of a mechanism alone: seconds, counted FLOPs and memory beside dense attention's."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.bench.memory import temporaries
from longspan.bench.settings import BASELINE, MIXING, Spec
from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn import Attention, MultiHead
from longspan.registry import build, options, show
from longspan.testing.counting import flops

HEADS, HEAD_WIDTH = 4, 64
LENGTHS = (1024, 4096, 16384)


@dataclass(frozen=True)
class Paired:
    """Median seconds of two runs, and the median of the first over the second, pair by pair."""

    first: float
    second: float
    ratio: float


def paired(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    seconds: float = 1.0,
    least: int = 3,
    most: int = 50,
    clock: Callable[[], float] = time.perf_counter,
) -> Paired:
    """Time two runs in alternation, so that a slow spell of the machine meets both.

    One run of each warms up; then pairs follow until `seconds` of wall-clock are spent, at least
    `least` and at most `most`.
    """
    for run in (first, second):
        run()
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < least or (len(pairs) < most and time.perf_counter() < end):
        pair = [0.0, 0.0]
        # Who goes first alternates too: the second finds the caches the first left.
        for which in (0, 1) if len(pairs) % 2 == 0 else (1, 0):
            start = clock()
            (first, second)[which]()
            pair[which] = max(clock() - start, 1e-9)
        pairs.append((pair[0], pair[1]))
    return Paired(
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float | None:
    """The power of the length that the seconds grow with, by least squares in log-log."""
    if len(lengths) < 2:
        return None
    x, y = [math.log(n) for n in lengths], [math.log(s) for s in seconds]
    return statistics.linear_regression(x, y).slope


@dataclass(frozen=True)
class Ceilings:
    """What this process reaches at best: FLOPs a second in a large product, bytes in a copy."""

    flops: float
    bytes: float

    def least(self, flops: int, moved: int) -> float:
        """Seconds that so many FLOPs or bytes need at least, whichever is more."""
        return max(flops / self.flops, moved / self.bytes)


def ceilings(
    dtype: torch.dtype = torch.float32, *, clock: Callable[[], float] = time.process_time
) -> Ceilings:
    """Measure both ceilings, the best of five runs each."""
    size, room = 2048, 16 * 2**20
    a, b = torch.randn(2, size, size).to(dtype).unbind()
    product, source = torch.empty_like(a), torch.randn(room)
    target = torch.empty_like(source)

    def best(run: Callable[[], object]) -> float:
        seconds = []
        for _ in range(5):
            start = clock()
            run()
            seconds.append(max(clock() - start, 1e-9))
        return min(seconds)

    multiply = best(lambda: torch.mm(a, b, out=product))
    copy = best(lambda: target.copy_(source))
    return Ceilings(2 * size**3 / multiply, 2 * 4 * room / copy)


@dataclass(frozen=True)
class Cost:
    """One mechanism at one length; the ratios are to dense attention, below 1 is faster.

    `roofline` is the least time that the counted FLOPs, and inputs and outputs read and written
    once, need at this process's ceilings, over the time taken.
    """

    id: str
    length: int
    forward: float
    training: float
    forward_ratio: float
    training_ratio: float
    flops: int
    training_flops: int
    moved: int
    roofline: float
    training_roofline: float
    memory: int | None
    exponent: float | None = None


def measure(
    spec: Spec,
    *,
    lengths: Sequence[int] = LENGTHS,
    seconds: float = 1.0,
    patience: float = 10.0,
    dtype: torch.dtype = torch.float32,
    best: Ceilings | None = None,
    clock: Callable[[], float] = time.process_time,
) -> list[Cost]:
    """Cost of a bare mechanism, B 1, H 4, D 64, causal where it can be, at rising lengths.

    An attention is measured beside `scaled_dot_product_attention`; a mixer, which has its own
    projections, beside softmax attention with its projections. Each pair of runs takes about
    `seconds`. Lengths at which one run would outlast `patience` seconds are left out. `best` are
    this process's ceilings, measured now where they are not given.

    Raises:
        LongspanError: the mechanism mixes no sequence, or needs arguments that are not given.
    """
    card = show(spec.id)
    if card.kind not in MIXING:
        raise LongspanError(
            f"'{spec.id}' is of kind {card.kind}, which has no cost of its own: "
            f"bench takes the kinds {', '.join(MIXING)}."
        )
    best = best or ceilings(dtype, clock=clock)
    costs: list[Cost] = []
    for length in sorted(lengths):
        if costs and costs[-1].training * (length / costs[-1].length) ** 2 > patience:
            break
        forward, training, dense_forward, dense_training = _runs(
            card, length, spec.arguments, dtype
        )
        # First of all, while the allocator has kept nothing of this size.
        memory = temporaries(training)
        alone = paired(forward, dense_forward, seconds=seconds, clock=clock)
        both = paired(training, dense_training, seconds=seconds, clock=clock)
        counted, trained = flops(forward), flops(training)
        # q, k, v and o, or x and y; training reads them again and writes their gradients.
        moved = (4 if card.kind == "attention" else 2) * length * HEADS * HEAD_WIDTH
        moved *= dtype.itemsize
        costs.append(
            Cost(
                spec.id,
                length,
                alone.first,
                both.first,
                alone.ratio,
                both.ratio,
                counted,
                trained,
                moved,
                best.least(counted, moved) / alone.first,
                best.least(trained, 3 * moved) / both.first,
                memory,
            )
        )
    slope = exponent([c.length for c in costs], [c.forward for c in costs])
    return [Cost(**{**asdict(cost), "exponent": slope}) for cost in costs]


Run = Callable[[], object]


def _runs(
    card: Card, length: int, arguments: dict[str, Any], dtype: torch.dtype
) -> tuple[Run, Run, Run, Run]:
    generator = torch.Generator().manual_seed(0)
    causal = "causal" in card.modes
    known = options(card.id)
    own = {
        name: value
        for name, value in (
            ("causal", causal),
            ("width", HEADS * HEAD_WIDTH),
            ("heads", HEADS),
            ("head_width", HEAD_WIDTH),
            ("length", length),
        )
        if name in known and (name == "causal" or known[name].default is known[name].empty)
    }
    built = build(card.id, **{**own, **arguments}).to(dtype).eval()
    if card.kind == "attention":
        assert isinstance(built, Attention)
        q, k, v = torch.randn(3, 1, HEADS, length, HEAD_WIDTH, generator=generator).to(dtype)
        more = {name: {"q": q, "k": k, "v": v}[of] for name, of in built.extra.items()}
        inputs = [q, k, v]

        def attend() -> Tensor:
            return built(q, q if built.shared else k, v, **more)[0]

        def dense() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return *_both(attend, inputs, built), *_both(dense, inputs)
    x = torch.randn(1, length, HEADS * HEAD_WIDTH, generator=generator).to(dtype)
    softmax = build(BASELINE, causal=causal)
    whole = MultiHead(softmax, width=HEADS * HEAD_WIDTH, heads=HEADS).to(dtype).eval()
    mixer = (
        MultiHead(built, width=HEADS * HEAD_WIDTH, heads=HEADS).to(dtype).eval()
        if isinstance(built, Attention)
        else built
    )
    return *_both(lambda: mixer(x)[0], [x], mixer), *_both(lambda: whole(x)[0], [x], whole)


def _both(
    run: Callable[[], Tensor], inputs: list[Tensor], module: torch.nn.Module | None = None
) -> tuple[Run, Run]:
    """The forward alone, and with the gradients of inputs and parameters."""
    learnt = [] if module is None else list(module.parameters())

    def forward() -> object:
        with torch.no_grad():
            return run()

    def training() -> None:
        for t in inputs:
            t.requires_grad_(True)
        for t in (*inputs, *learnt):
            t.grad = None
        o = run()
        o.backward(torch.ones_like(o))

    return forward, training
