"""The laws: what anyone may rely on of every mechanism whose card claims the mode.

A law takes a card and raises AssertionError where it does not hold. `certificate` runs those that
apply; a card may skip one with a reason, and then the law must fail, or the skip is stale.
"""

import copy
import logging
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jaxtyping
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longspan.card import Card, Kind, Mode
from longspan.errors import LongspanError
from longspan.nn import load_state, reset, save_state, select, state_bytes
from longspan.registry import build, options, show
from longspan.testing import counting
from longspan.testing.oracles import oracle_of
from longspan.testing.subject import BATCH, HEADS, MODEL_WIDTH, WIDTH, Subject, parameters

Law = Callable[[Card], None]


@dataclass(frozen=True)
class Verdict:
    """How a law came out for one mechanism."""

    law: str
    result: Literal["pass", "fail", "skip"]
    reason: str | None = None


@dataclass(frozen=True)
class _Entry:
    check: Law
    modes: frozenset[Mode]
    kinds: frozenset[Kind]
    applies: Callable[[Card], bool]


LAWS: dict[str, _Entry] = {}
_SEQUENCE: frozenset[Kind] = frozenset({"attention", "mixer", "memory"})
_PLACED: frozenset[Kind] = frozenset({"attention", "mixer", "memory", "position"})


def law(
    *,
    modes: set[Mode] | None = None,
    kinds: frozenset[Kind] = _SEQUENCE,
    applies: Callable[[Card], bool] = lambda card: True,
) -> Callable[[Law], Law]:
    """Declare a law for cards of these kinds that have all of these modes."""

    def declare(check: Law) -> Law:
        name = getattr(check, "__name__", "law")
        LAWS[name] = _Entry(check, frozenset(modes or ()), kinds, applies)
        return check

    return declare


def laws_for(card: Card) -> list[str]:
    """Names of the laws that apply to a card, skipped ones included."""
    return [
        name
        for name, entry in LAWS.items()
        if card.kind in entry.kinds and entry.modes <= card.modes and entry.applies(card)
    ]


def check(name: str, card: Card) -> Verdict:
    """Run one law.

    Raises:
        LongspanError: no such law.
    """
    if name not in LAWS:
        raise LongspanError(f"no law '{name}'; known: {', '.join(LAWS)}.")
    excuse = card.skips.get(name)
    try:
        LAWS[name].check(card)
    except Exception as error:  # a law may fail in any way
        if excuse:
            return Verdict(name, "skip", excuse)
        last = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(last.filename).name}:{last.lineno}"
        return Verdict(name, "fail", f"{type(error).__name__} at {at}: {error}".strip())
    if excuse:
        return Verdict(name, "fail", f"the card skips this law, but it holds: remove '{excuse}'.")
    return Verdict(name, "pass")


def certificate(id: str) -> list[Verdict]:
    """Every law that applies to a mechanism, checked now.

    >>> all(verdict.result != "fail" for verdict in certificate("linear-transformer"))
    True
    """
    card = show(id)
    return [check(name, card) for name in laws_for(card)]


# -- helpers ---------------------------------------------------------------------------------


def _forms(card: Card, *, dtype: torch.dtype = torch.float64) -> Iterator[Subject]:
    """The mechanism in each masking form it has."""
    for form in ("bidirectional", "causal"):
        if form in card.modes:
            yield Subject.of(card, causal=form == "causal", dtype=dtype)


def _near(got: Tensor, want: Tensor, what: str, *, within: float = 1e-9) -> None:
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    assert got.isfinite().all(), f"{what}: not finite"
    if want.numel():
        scale = max(want.abs().max().item(), 1.0)
        error = (got - want).abs().max().item() / scale
        assert error <= within, f"{what}: error {error:.1e} > {within:.0e}"


def _gradients(
    subject: Subject, inputs: tuple[Tensor, ...], out: Tensor, *, to_parameters: bool = True
) -> list[Tensor]:
    """Gradients of a fixed random projection of `out`, zeros where nothing depends."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    wanted = subject.distinct(inputs) + (parameters(subject.module) if to_parameters else [])
    found = torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


def _keep(length: int, *, batch: int = BATCH) -> Tensor:
    """A mask with holes; the first token of every row may be seen."""
    generator = torch.Generator().manual_seed(2)
    keep = torch.rand(batch, length, generator=generator) > 0.3
    keep[:, 0] = True
    return keep


def _whole_or_cross(card: Card) -> Iterator[tuple[Subject, int, int]]:
    """(subject, queries, keys) over odd lengths and the card's forms."""
    for subject in _forms(card):
        for length in (1, 7, 33, 130):
            yield subject, length, length
    if "cross" in card.modes and "bidirectional" in card.modes:
        subject = Subject.of(card, causal=False)
        if subject.attends:
            yield subject, 9, 21


# -- right -----------------------------------------------------------------------------------


@law(applies=lambda card: oracle_of(card.id) is not None)
def equals_its_oracle(card: Card) -> None:
    """Values and gradients equal the paper's formula written out, in float64."""
    oracle = oracle_of(card.id)
    assert oracle is not None
    for subject, length, keys in _whole_or_cross(card):
        for keep in (None, _keep(keys)):
            inputs = subject.example(length, keys=keys, gradient=True)
            got, _ = subject(inputs, keep=keep)
            want = oracle(subject.module, *inputs, keep=keep)
            if keep is not None and length == keys:  # padded queries may give anything
                rows = keep[:, None, :, None] if subject.attends else keep[..., None]
                got, want = got * rows, want * rows
            where = f"L {length}, S {keys}, causal {subject.causal}, masked {keep is not None}"
            _near(got, want, f"values at {where}")
            pairs = zip(
                _gradients(subject, inputs, got), _gradients(subject, inputs, want), strict=True
            )
            for i, (a, b) in enumerate(pairs):
                _near(a, b, f"gradient {i} at {where}", within=1e-8)


@law(applies=lambda card: card.exact is not None)
def equals_softmax_at_full_budget(card: Card) -> None:
    """At its `exact` arguments it is softmax attention."""
    for form in ("bidirectional", "causal"):
        if form not in card.modes:
            continue
        causal = form == "causal"
        subject = Subject.of(card, causal=causal, arguments=dict(card.exact or {}))
        q, k, v = subject.example(37)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if causal:
            scores = scores + torch.full((37, 37), -torch.inf, dtype=q.dtype).triu(1)
        _near(subject((q, k, v))[0], scores.softmax(-1) @ v, f"{form} values")


@law(modes={"causal"})
def no_peeking(card: Card) -> None:
    """Later tokens have gradient exactly 0, and changing them changes no bit of earlier outputs."""
    subject = Subject.of(card, causal=True)
    for length, at in ((37, (0, 5, 18, 35)), (97, (64,))):
        inputs = subject.example(length, gradient=True)
        out, _ = subject(inputs)
        for t in at:
            early = out.narrow(subject.axis, 0, t + 1)
            for g in _gradients(subject, inputs, early, to_parameters=False):
                late = g.narrow(subject.axis, t + 1, length - t - 1)
                assert not late.any(), f"outputs up to {t} of {length} have gradient in later ones"
            for seed, scale in ((7, 1.0), (8, 100.0)):
                other = subject.example(length, seed=seed, scale=scale)
                mixed = [
                    torch.cat(
                        [
                            a.narrow(subject.axis, 0, t + 1),
                            b.narrow(subject.axis, t + 1, length - t - 1),
                        ],
                        subject.axis,
                    )
                    for a, b in zip(subject.distinct(inputs), subject.distinct(other), strict=True)
                ]
                if subject.shared:
                    mixed = [mixed[0], mixed[0], mixed[1]]
                changed, _ = subject(tuple(mixed))
                same = torch.equal(changed.narrow(subject.axis, 0, t + 1), early)
                assert same, f"outputs up to {t} of {length} change with later tokens"


# -- one form --------------------------------------------------------------------------------


@law(modes={"causal", "step"})
def streaming_equals_whole(card: Card) -> None:
    """In pieces of any size, token by token, or resumed from a file: the same as at once."""
    subject = Subject.of(card, causal=True)
    length, grain = 72 * card.grain, card.grain
    inputs = subject.example(length)
    keep = _keep(length)
    for mask in (None, keep):
        whole, _ = subject(inputs, keep=mask)
        for sizes in ([1] * 72, [5, 1, 30, 1, 35], [71, 1], [36, 36]):
            state, outs, at = None, [], 0
            for i, size in enumerate(sizes):
                stop = at + size * grain
                piece = None if mask is None else mask[:, at:stop]
                out, state = subject(subject.cut(inputs, at, stop), state, keep=piece)
                outs.append(out)
                if i == 1:
                    with tempfile.TemporaryDirectory() as folder:
                        save_state(state, Path(folder) / "state.safetensors")
                        state = load_state(Path(folder) / "state.safetensors")
                at = stop
            got = torch.cat(outs, subject.axis)
            if mask is not None:
                rows = mask[:, None, :, None] if subject.attends else mask[..., None]
                got, whole = got * rows, whole * rows
            _near(got, whole, f"pieces {sizes[:5]}, masked {mask is not None}")


@law(modes={"causal", "step"})
def state_rows_are_independent(card: Card) -> None:
    """Rows of a state can be reordered, and a row reset to zeros has seen nothing."""
    subject = Subject.of(card, causal=True)
    inputs, more = subject.example(20 * card.grain), subject.example(6 * card.grain, seed=5)
    _, state = subject(inputs)
    assert state is not None, "no state came back"
    after, _ = subject(more, state)
    swapped, _ = subject(
        subject.change(more, lambda t: t.flip(0)), select(state, torch.tensor([1, 0]))
    )
    _near(swapped.flip(0), after, "reordered rows")
    cleared, _ = subject(more, reset(state, torch.tensor([True, False])))
    fresh, _ = subject(more)
    _near(cleared[0], fresh[0], "a reset row")
    _near(cleared[1], after[1], "the row beside it")


@law()
def padding_changes_nothing(card: Card) -> None:
    """Left- or right-padded equals unpadded; what is masked may be NaN and gets gradient 0."""
    for subject in _forms(card):
        short = subject.example(23, gradient=True)
        alone, _ = subject(short)
        wanted = _gradients(subject, short, alone)
        for left, right in ((0, 9), (11, 0), (64, 0)):
            length = left + 23 + right
            keep = torch.zeros(BATCH, length, dtype=torch.bool)
            keep[:, left : left + 23] = True

            def pad(
                t: Tensor, left: int = left, right: int = right, axis: int = subject.axis
            ) -> Tensor:
                shape = list(t.shape)
                fill = []
                for tokens in (left, right):
                    shape[axis] = tokens
                    fill.append(t.new_full(shape, torch.nan))
                return torch.cat([fill[0], t, fill[1]], axis).detach()

            longer = subject.change(short, pad)
            if subject.attends and not subject.shared:
                # Masked queries are the caller's own; only keys and values carry the mask.
                longer = (longer[0].nan_to_num(0.5), *longer[1:])
            for t in subject.distinct(longer):
                t.requires_grad_()
            out, _ = subject(longer, keep=keep)
            out = out.narrow(subject.axis, left, 23)
            where = f"{left} tokens padded left, {right} right, causal {subject.causal}"
            _near(out, alone, where)
            for i, (a, b) in enumerate(zip(_gradients(subject, longer, out), wanted, strict=True)):
                if i < len(subject.distinct(longer)):
                    outside = torch.cat(
                        [a.narrow(subject.axis, 0, left), a.narrow(subject.axis, left + 23, right)],
                        subject.axis,
                    )
                    assert not outside.any(), f"masked inputs get gradient with {where}"
                    a = a.narrow(subject.axis, left, 23)
                _near(a, b, f"gradient {i} with {where}", within=1e-8)


@law()
def rows_do_not_meet(card: Card) -> None:
    """A row's output is the same alone, in a batch, and in another order."""
    for subject in _forms(card):
        inputs = subject.example(19, batch=5)
        out, _ = subject(inputs)
        alone, _ = subject(subject.change(inputs, lambda t: t[2:3]))
        _near(alone, out[2:3], "one row alone")
        turned, _ = subject(subject.change(inputs, lambda t: t.flip(0)))
        _near(turned.flip(0), out, "rows in another order")


@law()
def nothing_to_see_gives_zero(card: Card) -> None:
    """A row whose tokens are all masked gives 0, with finite gradients."""
    for subject in _forms(card):
        inputs = subject.example(11, gradient=True)
        keep = torch.ones(BATCH, 11, dtype=torch.bool)
        keep[0] = False
        out, _ = subject(inputs, keep=keep)
        assert not out[0].any(), "a row with nothing to see does not give 0"
        for g in _gradients(subject, inputs, out):
            assert g.isfinite().all(), "gradients beside an empty row are not finite"
        for g in _gradients(subject, inputs, out, to_parameters=False):
            assert not g[0].any(), "an empty row has gradient"


@law()
def any_shape_and_layout(card: Card) -> None:
    """One token, odd lengths, an empty batch and strided inputs all work."""
    for subject in _forms(card):
        for length in (1, 2, 17):
            inputs = subject.example(length)
            out, _ = subject(inputs)
            assert out.isfinite().all(), f"not finite at length {length}"

            def strided(t: Tensor) -> Tensor:
                return t.transpose(-1, -2).contiguous().transpose(-1, -2)

            _near(subject(subject.change(inputs, strided))[0], out, f"strides at length {length}")
        none, _ = subject(subject.example(5, batch=0))
        assert none.shape[0] == 0, "an empty batch grew rows"


# -- robust ----------------------------------------------------------------------------------


@law(applies=lambda card: oracle_of(card.id) is not None)
def rounds_as_well_as_the_formula(card: Card) -> None:
    """Errors in float32 and bfloat16 are at most 2× the plain formula's, gradients 3×."""
    oracle = oracle_of(card.id)
    assert oracle is not None
    for exact in _forms(card):
        for dtype in (torch.float32, torch.bfloat16):
            subject = Subject.of(card, causal=exact.causal, dtype=dtype)
            inputs = subject.example(48, gradient=True)
            exact.module.load_state_dict(
                {
                    n: t.to(torch.float64) if t.is_floating_point() else t
                    for n, t in subject.module.state_dict().items()
                }
            )
            same = exact.change(inputs, lambda t: t.detach().double().requires_grad_())
            truth = oracle(exact.module, *same, keep=None)
            ours = subject(inputs)[0]
            assert ours.dtype == dtype, f"{dtype} went in and {ours.dtype} came out"
            plain = oracle(subject.module, *inputs, keep=None)
            truths = [truth, *_gradients(exact, same, truth)]
            found = [ours, *_gradients(subject, inputs, ours)]
            plains = [plain, *_gradients(subject, inputs, plain.to(dtype))]
            for i, (t, a, b) in enumerate(zip(truths, found, plains, strict=True)):
                floor = torch.finfo(dtype).eps * max(t.abs().max().item(), 1e-3)
                error, bar = ((x.double() - t).abs().max().item() for x in (a, b))
                times = 3 if i else 2
                what = f"gradient {i - 1}" if i else "values"
                assert error <= times * max(bar, floor), (
                    f"{what} in {dtype}: error {error:.1e}, the formula's {bar:.1e}"
                )


@law(kinds=frozenset({"attention"}))
def large_scores_stay_finite(card: Card) -> None:
    """|q·k| up to 1e4 gives finite outputs and gradients."""
    for dtype in (torch.float32, torch.bfloat16):
        for subject in _forms(card, dtype=dtype):
            base = subject.example(40)
            top = (base[0].float() @ base[1].float().mT).abs().max().item()
            inputs = subject.example(40, scale=(1e4 / top) ** 0.5, gradient=True)
            out, _ = subject(inputs)
            assert out.isfinite().all(), f"outputs are not finite in {dtype}"
            for g in _gradients(subject, inputs, out):
                assert g.isfinite().all(), f"gradients are not finite in {dtype}"


@law()
def deterministic_and_quiet(card: Card) -> None:
    """Two calls agree bit for bit in evaluation, and the global random state is untouched."""
    for subject in _forms(card):
        inputs = subject.example(33)
        before = torch.get_rng_state()
        first, second = subject(inputs)[0], subject(inputs)[0]
        assert torch.equal(first, second), "two calls differ"
        assert torch.equal(before, torch.get_rng_state()), "the global random state moved"


@law()
def every_parameter_learns(card: Card) -> None:
    """Every trainable parameter gets a gradient that is finite and not all 0."""
    for subject in _forms(card):
        inputs = subject.example(33)
        out, _ = subject(inputs)
        (out.square().sum()).backward() if parameters(subject.module) else None
        for name, p in subject.module.named_parameters():
            if p.requires_grad:
                assert p.grad is not None, f"{name} is not reached"
                assert p.grad.any(), f"{name} gets no gradient"
                assert p.grad.isfinite().all(), f"{name}'s gradient is not finite"


@law(kinds=_PLACED)
def copies_and_reloads(card: Card) -> None:
    """`deepcopy` and a strict `state_dict` round trip keep every bit of the output."""
    if card.kind == "position":
        module = build(card.id, **card.tiny)
        build(card.id, **card.tiny).load_state_dict(copy.deepcopy(module).state_dict(), strict=True)
        return
    for subject in _forms(card):
        inputs = subject.example(21)
        out, _ = subject(inputs)
        twin = Subject.of(card, causal=subject.causal)
        with torch.no_grad():
            for p in twin.module.parameters():
                p.add_(1)
        twin.module.load_state_dict(subject.module.state_dict(), strict=True)
        assert torch.equal(twin(inputs)[0], out), "a reloaded module differs"
        twin.module = copy.deepcopy(subject.module)
        assert torch.equal(twin(inputs)[0], out), "a deep copy differs"


@law()
def recomputes_alike(card: Card) -> None:
    """Under activation checkpointing, outputs and gradients are the same."""
    for subject in _forms(card):
        inputs = subject.example(25, gradient=True)
        out, _ = subject(inputs)
        again = checkpoint(lambda *t: subject(t)[0], *inputs, use_reentrant=False)  # noqa: B023
        _near(again, out, "outputs")
        pairs = zip(
            _gradients(subject, inputs, again), _gradients(subject, inputs, out), strict=True
        )
        for i, (a, b) in enumerate(pairs):
            _near(a, b, f"gradient {i}")


@law()
def compiles(card: Card) -> None:
    """`torch.compile` gives the same values and gradients (graph breaks are allowed)."""
    for subject in _forms(card):
        inputs = subject.example(21, gradient=True)
        out, _ = subject(inputs)
        wanted = _gradients(subject, inputs, out)
        torch._dynamo.reset()
        with _quiet_dynamo():
            compiled = torch.compile(subject.module, backend="aot_eager")
            again = compiled(*inputs)[0]
            _near(again, out, "outputs")
            for i, (a, b) in enumerate(
                zip(_gradients(subject, inputs, again), wanted, strict=True)
            ):
                _near(a, b, f"gradient {i}")
        torch._dynamo.reset()


@contextmanager
def _quiet_dynamo() -> Iterator[None]:
    logger = logging.getLogger("torch._dynamo")
    level, checks = logger.level, jaxtyping.config.jaxtyping_disable
    logger.setLevel(logging.ERROR)  # dynamo warns of every graph break
    jaxtyping.config.update("jaxtyping_disable", True)  # and cannot trace shape checks
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        jaxtyping.config.update("jaxtyping_disable", checks)


# -- as cheap as it says ---------------------------------------------------------------------

_SHORT, _LONG = 512, 2048


def _letters(length: int) -> dict[str, int]:
    return {
        "L": length,
        "S": length,
        "D": WIDTH,
        "V": WIDTH,
        "H": HEADS,
        "E": MODEL_WIDTH,
        "C": 16,
        "M": 16,
    }


@law()
def costs_what_it_says(card: Card) -> None:
    """FLOPs and bytes, forward and backward, grow from L to 4 L no faster than `time` says."""
    claimed = card.cost("time", **_letters(_LONG)) / card.cost("time", **_letters(_SHORT))
    for subject in _forms(card, dtype=torch.float32):
        costs = []
        for length in (_SHORT, _LONG):
            inputs = subject.example(length, batch=1, gradient=True)

            def call(inputs: tuple[Tensor, ...] = inputs, subject: Subject = subject) -> None:
                out, _ = subject(inputs)
                out.sum().backward()

            costs.append(counting.count(call))
        for name in ("flops", "bytes"):
            less, more = getattr(costs[0], name), getattr(costs[1], name)
            assert more <= 1.15 * claimed * max(less, 1), (
                f"{name} grow {more / max(less, 1):.1f}× from L {_SHORT} to {_LONG}; "
                f"'{card.time}' allows {claimed:.1f}×"
            )


@law(modes={"causal", "step"})
def carries_what_it_says(card: Card) -> None:
    """The state's bytes grow from L to 4 L no faster than `memory` says."""
    subject = Subject.of(card, causal=True, dtype=torch.float32)
    lengths = (_SHORT, _LONG)
    with torch.no_grad():
        less, more = (state_bytes(subject(subject.example(n, batch=1))[1]) for n in lengths)
    claimed = card.cost("memory", **_letters(_LONG)) / card.cost("memory", **_letters(_SHORT))
    assert more <= 1.05 * claimed * less, (
        f"the state grows {more / less:.2f}× from L {_SHORT} to {_LONG}; "
        f"'{card.memory}' allows {claimed:.2f}×"
    )


# -- loud ------------------------------------------------------------------------------------


@law(kinds=_PLACED)
def refuses_bad_arguments(card: Card) -> None:
    """Wrong arguments and inputs raise LongspanError, never a torch error or a silent result."""
    _refused(lambda: build(card.id, no_such_argument=1), "an unknown argument")
    if "causal" in options(card.id):
        for form, causal in (("causal", True), ("bidirectional", False)):
            if form not in card.modes:
                _refused(lambda c=causal: build(card.id, **card.tiny, causal=c), f"no {form} form")
    if card.kind == "position":
        return
    for subject in _forms(card):
        inputs = subject.example(8)
        wrong = {
            "a mask of another length": torch.ones(BATCH, 9, dtype=torch.bool),
            "a mask of floats": torch.ones(BATCH, 8),
        }
        for what, keep in wrong.items():
            _refused(lambda k=keep: subject(inputs, keep=k), what)  # noqa: B023
        _refused(lambda: subject(subject.change(inputs, lambda t: t[0])), "a missing axis")  # noqa: B023
        if subject.attends:
            q, k, v = inputs
            _refused(lambda: subject((q, k[:1], v)), "keys of another batch")  # noqa: B023
            _refused(lambda: subject((q, k[..., :-1], v)), "keys of another width")  # noqa: B023
            if not subject.causal:
                state = (torch.zeros(BATCH, 1),)
                _refused(lambda: subject(inputs, state), "a state without causality")  # noqa: B023


def _refused(call: Callable[[], Any], what: str) -> None:
    try:
        call()
    except LongspanError:
        return
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__}: {error}") from error
    raise AssertionError(f"{what} was accepted")
