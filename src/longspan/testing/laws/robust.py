"""Precision, determinism, recomputation, compilation and reloading."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
import torch
from torch._functorch import config as functorch
from torch.utils.checkpoint import checkpoint

from longspan.card import Card
from longspan.registry import build
from longspan.testing.laws.comparing import forms, gradients, near
from longspan.testing.laws.registry import PLACED, law
from longspan.testing.oracles import oracle_of
from longspan.testing.subject import Subject, parameters


@law(applies=lambda card: oracle_of(card.id) is not None)
def rounds_as_well_as_the_formula(card: Card) -> None:
    """Errors in float32 and bfloat16 are at most 2× the plain formula's, gradients 3×."""
    oracle = oracle_of(card.id)
    assert oracle is not None
    for exact in forms(card):
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
            truths = [truth, *gradients(exact, same, truth)]
            found = [ours, *gradients(subject, inputs, ours)]
            plains = [plain, *gradients(subject, inputs, plain.to(dtype))]
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
        for subject in forms(card, dtype=dtype):
            base = subject.example(40)
            top = (base[0].float() @ base[1].float().mT).abs().max().item()
            inputs = subject.example(40, scale=(1e4 / top) ** 0.5, gradient=True)
            out, _ = subject(inputs)
            assert out.isfinite().all(), f"outputs are not finite in {dtype}"
            for g in gradients(subject, inputs, out):
                assert g.isfinite().all(), f"gradients are not finite in {dtype}"


@law()
def deterministic_and_quiet(card: Card) -> None:
    """Two calls agree bit for bit in evaluation, and the global random state is untouched."""
    for subject in forms(card):
        inputs = subject.example(33)
        before = torch.get_rng_state()
        first, second = subject(inputs)[0], subject(inputs)[0]
        assert torch.equal(first, second), "two calls differ"
        assert torch.equal(before, torch.get_rng_state()), "the global random state moved"


@law()
def every_parameter_learns(card: Card) -> None:
    """Every trainable parameter gets a gradient that is finite and not all 0."""
    for subject in forms(card):
        inputs = subject.example(33)
        out, _ = subject(inputs)
        (out.square().sum()).backward() if parameters(subject.module) else None
        for name, p in subject.module.named_parameters():
            if p.requires_grad:
                assert p.grad is not None, f"{name} is not reached"
                assert p.grad.any(), f"{name} gets no gradient"
                assert p.grad.isfinite().all(), f"{name}'s gradient is not finite"


@law(kinds=PLACED)
def copies_and_reloads(card: Card) -> None:
    """`deepcopy` and a strict `state_dict` round trip keep every bit of the output."""
    if card.kind == "position":
        module = build(card.id, **card.tiny)
        build(card.id, **card.tiny).load_state_dict(copy.deepcopy(module).state_dict(), strict=True)
        return
    for subject in forms(card):
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
    for subject in forms(card):
        inputs = subject.example(25, gradient=True)
        out, _ = subject(inputs)
        again = checkpoint(lambda *t: subject(t)[0], *inputs, use_reentrant=False)  # noqa: B023
        near(again, out, "outputs")
        pairs = zip(gradients(subject, inputs, again), gradients(subject, inputs, out), strict=True)
        for i, (a, b) in enumerate(pairs):
            near(a, b, f"gradient {i}")


@law()
def compiles(card: Card) -> None:
    """`torch.compile` gives the same values and gradients (graph breaks are allowed)."""
    for subject in forms(card):
        inputs = subject.example(21, gradient=True)
        out, _ = subject(inputs)
        wanted = gradients(subject, inputs, out)
        torch._dynamo.reset()
        with _quiet_dynamo():
            compiled = torch.compile(subject.module, backend="aot_eager")
            again = compiled(*inputs)[0]
            near(again, out, "outputs")
            for i, (a, b) in enumerate(zip(gradients(subject, inputs, again), wanted, strict=True)):
                near(a, b, f"gradient {i}")
        torch._dynamo.reset()


@contextmanager
def _quiet_dynamo() -> Iterator[None]:
    logger = logging.getLogger("torch._dynamo")
    level, checks = logger.level, jaxtyping.config.jaxtyping_disable
    logger.setLevel(logging.ERROR)  # dynamo warns of every graph break
    jaxtyping.config.update("jaxtyping_disable", True)  # and cannot trace shape checks
    try:
        # Gradients are taken twice of one graph, whose buffers must then not be given away.
        with warnings.catch_warnings(), functorch.patch(donated_buffer=False):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        jaxtyping.config.update("jaxtyping_disable", checks)
