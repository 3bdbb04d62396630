"""Whole, in pieces, resumed, padded and batched agree, and nothing looks ahead."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from longspan.card import Card
from longspan.nn import load_state, reset, save_state, select
from longspan.testing.laws.comparing import forms, gradients, holes, near
from longspan.testing.laws.registry import law
from longspan.testing.subject import BATCH, Subject


@law(modes={"causal", "step"})
def streaming_equals_whole(card: Card) -> None:
    """In pieces of any size, token by token, or resumed from a file: the same as at once."""
    subject = Subject.of(card, causal=True)
    length, grain = 72 * card.grain, card.grain
    inputs = subject.example(length)
    keep = holes(length)
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
            near(got, whole, f"pieces {sizes[:5]}, masked {mask is not None}")


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
    near(swapped.flip(0), after, "reordered rows")
    cleared, _ = subject(more, reset(state, torch.tensor([True, False])))
    fresh, _ = subject(more)
    near(cleared[0], fresh[0], "a reset row")
    near(cleared[1], after[1], "the row beside it")


@law()
def padding_changes_nothing(card: Card) -> None:
    """Left- or right-padded equals unpadded; what is masked may be NaN and gets gradient 0."""
    for subject in forms(card):
        short = subject.example(23, gradient=True)
        alone, _ = subject(short)
        wanted = gradients(subject, short, alone)
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
            near(out, alone, where)
            for i, (a, b) in enumerate(zip(gradients(subject, longer, out), wanted, strict=True)):
                if i < len(subject.distinct(longer)):
                    outside = torch.cat(
                        [a.narrow(subject.axis, 0, left), a.narrow(subject.axis, left + 23, right)],
                        subject.axis,
                    )
                    assert not outside.any(), f"masked inputs get gradient with {where}"
                    a = a.narrow(subject.axis, left, 23)
                near(a, b, f"gradient {i} with {where}", within=1e-8)


@law()
def rows_do_not_meet(card: Card) -> None:
    """A row's output is the same alone, in a batch, and in another order."""
    for subject in forms(card):
        inputs = subject.example(19, batch=5)
        out, _ = subject(inputs)
        alone, _ = subject(subject.change(inputs, lambda t: t[2:3]))
        near(alone, out[2:3], "one row alone")
        turned, _ = subject(subject.change(inputs, lambda t: t.flip(0)))
        near(turned.flip(0), out, "rows in another order")


@law()
def nothing_to_see_gives_zero(card: Card) -> None:
    """A row whose tokens are all masked gives 0, with finite gradients."""
    for subject in forms(card):
        inputs = subject.example(11, gradient=True)
        keep = torch.ones(BATCH, 11, dtype=torch.bool)
        keep[0] = False
        out, _ = subject(inputs, keep=keep)
        assert not out[0].any(), "a row with nothing to see does not give 0"
        for g in gradients(subject, inputs, out):
            assert g.isfinite().all(), "gradients beside an empty row are not finite"
        for g in gradients(subject, inputs, out, to_parameters=False):
            assert not g[0].any(), "an empty row has gradient"


@law()
def any_shape_and_layout(card: Card) -> None:
    """One token, odd lengths, an empty batch and strided inputs all work."""
    for subject in forms(card):
        for length in (1, 2, 17):
            inputs = subject.example(length)
            out, _ = subject(inputs)
            assert out.isfinite().all(), f"not finite at length {length}"

            def strided(t: Tensor) -> Tensor:
                return t.transpose(-1, -2).contiguous().transpose(-1, -2)

            near(subject(subject.change(inputs, strided))[0], out, f"strides at length {length}")
        none, _ = subject(subject.example(5, batch=0))
        assert none.shape[0] == 0, "an empty batch grew rows"
