"""The cost of a mechanism alone: seconds, counted FLOPs and memory beside dense attention's."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.bench.settings import BASELINE, MIXING, Spec
from longspan.errors import LongspanError
from longspan.nn import Attention, MultiHead
from longspan.registry import build, options, show
from longspan.testing.counting import flops, held

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


def alone(
    run: Callable[[], object], *, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median seconds of a run, after one that warms up."""
    run()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        start = clock()
        run()
        taken.append(max(clock() - start, 1e-9))
    return statistics.median(taken)


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float | None:
    """The power of the length that the seconds grow with, by least squares in log-log."""
    if len(set(lengths)) < 2:
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
    """One mechanism at one length; the ratios are to dense attention, below 1 is faster or less.

    `roofline` is the least time that the counted FLOPs, and inputs and outputs read and written
    once, need at this process's ceilings, over the time taken. `memory` is the most bytes that
    tensors made by forward and backward hold at one time. Ratios are None where dense attention
    would outlast patience. The exponents are the powers of the length that training time and
    memory grow with.
    """

    id: str
    length: int
    forward: float
    training: float
    forward_ratio: float | None
    training_ratio: float | None
    flops: int
    training_flops: int
    moved: int
    roofline: float
    training_roofline: float
    memory: int
    memory_ratio: float | None
    exponent: float | None = None
    memory_exponent: float | None = None


def measure(
    spec: Spec,
    *,
    lengths: Sequence[int] = LENGTHS,
    seconds: float = 1.0,
    patience: float = 10.0,
    dense_patience: float = 10.0,
    dtype: torch.dtype = torch.float32,
    best: Ceilings | None = None,
    clock: Callable[[], float] = time.process_time,
) -> list[Cost]:
    """Cost of a bare mechanism, B 1, H 4, D 64, at rising lengths; causal where it can be.

    An attention is measured beside `scaled_dot_product_attention`; a mixer, which has its own
    projections, beside softmax attention with its projections. Each pair of runs takes about
    `seconds`. Lengths at which one run would outlast `patience` seconds are left out, and dense
    attention from where it would outlast `dense_patience`. `best` are this process's ceilings,
    measured now where they are not given.

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
    dense_seconds = [0.0, 0.0]
    for length in sorted(lengths):
        grown = (length / costs[-1].length) ** 2 if costs else 0.0
        if costs and costs[-1].training * grown > patience:
            break
        forward, training, *dense = _runs(spec, length, dtype)
        memory, memory_ratio = held(training), None
        ratios: list[float | None] = [None, None]
        taken = [0.0, 0.0]
        if dense_seconds[1] * grown <= dense_patience:
            memory_ratio = memory / held(dense[1])
            for i, own in enumerate((forward, training)):
                pair = paired(own, dense[i], seconds=seconds, clock=clock)
                taken[i], ratios[i], dense_seconds[i] = pair.first, pair.ratio, pair.second
        else:
            dense_seconds = [s * grown for s in dense_seconds]
            taken = [alone(run, seconds=seconds, clock=clock) for run in (forward, training)]
        counted, trained = flops(forward), flops(training)
        # q, k, v and o, or x and y; training reads them again and writes their gradients.
        moved = (4 if card.kind == "attention" else 2) * length * HEADS * HEAD_WIDTH
        moved *= dtype.itemsize
        costs.append(
            Cost(
                id=spec.id,
                length=length,
                forward=taken[0],
                training=taken[1],
                forward_ratio=ratios[0],
                training_ratio=ratios[1],
                flops=counted,
                training_flops=trained,
                moved=moved,
                roofline=best.least(counted, moved) / taken[0],
                training_roofline=best.least(trained, 3 * moved) / taken[1],
                memory=memory,
                memory_ratio=memory_ratio,
            )
        )
    sizes = [c.length for c in costs]
    slopes = (
        exponent(sizes, [c.training for c in costs]),
        exponent(sizes, [float(c.memory) for c in costs]),
    )
    return [replace(cost, exponent=slopes[0], memory_exponent=slopes[1]) for cost in costs]


Run = Callable[[], object]


def is_causal(spec: Spec) -> bool:
    """Whether it is measured causally, and beside causal attention."""
    return spec.arguments.get("causal", "causal" in show(spec.id).modes)


def bare(
    spec: Spec, length: int, *, batch: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Module, list[Tensor], dict[str, Tensor]]:
    """A mechanism for `length` tokens, H 4, D 64, in eval mode; its inputs, and those by name.

    Attention takes q, k, v (B 4 L 64) and other projections; anything else x (B L 256).
    """
    known = options(spec.id)
    own = {
        name: value
        for name, value in (
            ("causal", is_causal(spec)),
            ("width", HEADS * HEAD_WIDTH),
            ("heads", HEADS),
            ("head_width", HEAD_WIDTH),
            ("length", length),
        )
        if name in known and (name == "causal" or known[name].default is known[name].empty)
    }
    built = build(spec.id, **{**own, **spec.arguments}).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    if isinstance(built, Attention):
        shape = 3, batch, HEADS, length, HEAD_WIDTH
        q, k, v = torch.randn(shape, generator=generator).to(dtype)
        more = {name: {"q": q, "k": k, "v": v}[of] for name, of in built.extra.items()}
        return built, [q, q if built.shared else k, v], more
    return (
        built,
        [torch.randn(batch, length, HEADS * HEAD_WIDTH, generator=generator).to(dtype)],
        {},
    )


def _runs(spec: Spec, length: int, dtype: torch.dtype) -> tuple[Run, Run, Run, Run]:
    built, inputs, more = bare(spec, length, dtype=dtype)
    causal = is_causal(spec)
    if show(spec.id).kind == "attention":
        q, k, v = inputs

        def dense() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return *both(lambda: built(q, k, v, **more)[0], inputs, built), *both(dense, inputs)
    softmax = build(BASELINE, causal=causal)
    whole = MultiHead(softmax, width=HEADS * HEAD_WIDTH, heads=HEADS).to(dtype).eval()
    [x] = inputs
    return *both(lambda: built(x)[0], [x], built), *both(lambda: whole(x)[0], [x], whole)


def both(
    run: Callable[[], Tensor], inputs: list[Tensor], module: torch.nn.Module | None = None
) -> tuple[Run, Run]:
    """The forward alone, and with the gradients of inputs and parameters, as runs to time."""
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
