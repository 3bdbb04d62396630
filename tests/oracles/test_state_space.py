"""State spaces against dense recurrences written out, and SciPy's discrete systems."""

import copy
from typing import Any

import numpy as np
import pytest
import scipy
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import Tensor, nn
from torch.testing import assert_close

import longspan.mechanisms.state_space.s4 as s4
from longspan import LongspanError
from longspan.nn import Block, reset, state_bytes
from longspan.registry import build
from longspan.training import parameter_groups

signal: Any = scipy.signal  # its stubs know less than it does
FORMS = [
    *({"form": "diagonal", "init": init} for init in ("lin", "inv", "legs", "real")),
    {"form": "diagonal", "discretisation": "bilinear"},
    *({"form": "dplr", "measure": measure, "length": 16} for measure in ("legs", "legt", "lagt")),
]
EACH = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))


def layer(**arguments: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        mixer = build("s4", **({"width": 3, "state": 8, "step_min": 0.01} | arguments))
    return mixer.double()


def signals(batch: int, length: int, width: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, dtype=torch.float64, generator=generator)


def dense_system(mixer: s4.S4, feature: int, rate: float = 1.0) -> tuple[Any, ...]:
    """A_d, B_d and the rows C of one feature's system, complex, both halves, by SciPy."""
    value = {n: p.detach().numpy() for n, p in mixer.named_parameters()}
    pairs = {n: value[n][..., 0] + 1j * value[n][..., 1] for n in ("b", "c", "p") if n in value}

    def both(half: np.ndarray) -> np.ndarray:
        return np.concatenate([half, half.conj()], -1)

    a = np.diag(both(-np.exp(value["log_decay"][feature]) + 1j * value["frequency"][feature]))
    if "p" in pairs:
        p = both(pairs["p"][feature]).T
        a = a - p @ p.conj().T
    b, step = both(pairs["b"][feature])[:, None], np.exp(value["log_step"][feature])
    cs = both(pairs["c"][:, feature])
    unit = np.eye(len(a))
    if "p" in pairs:  # trained truncated, at rate 1
        ad, *_ = signal.cont2discrete((a, b, unit, b * 0), step, "bilinear")
        cs = cs @ np.linalg.inv(unit - np.linalg.matrix_power(ad, int(mixer.length)))
    ad, bd, *_ = signal.cont2discrete((a, b, unit, b * 0), step * rate, mixer.discretisation)
    return ad, bd[:, 0], cs


def recurrence(mixer: s4.S4, x: Tensor, rate: float = 1.0) -> Tensor:
    """C x_t + D u_t for every feature, a token at a time; the second C on the reversed axis."""
    total = x * mixer.skip.detach()
    for feature in range(x.shape[2]):
        ad, bd, cs = dense_system(mixer, feature, rate)
        for direction, c in enumerate(cs):
            u = x[..., feature].flip(1) if direction else x[..., feature]
            outs, h = [], np.zeros((len(x), len(ad)), dtype=complex)
            for t in range(x.shape[1]):
                h = h @ ad.T + u[:, t].numpy()[:, None] * bd
                outs.append(torch.from_numpy((h @ c).real))
            out = torch.stack(outs, 1)
            total[..., feature] += out.flip(1) if direction else out
    return total


def after(mixer: s4.S4, mixed: Tensor) -> Tensor:
    first, gate = mixer.output(F.gelu(mixed)).chunk(2, -1)
    return first * gate.sigmoid()


@EACH
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 16, 41])
def test_is_its_recurrence(form: dict, causal: bool, length: int) -> None:
    """Lengths beyond 16 also grow the dplr kernel for the call."""
    mixer, x = layer(causal=causal, **form), signals(2, length)
    with torch.no_grad():
        assert_close(mixer(x)[0], after(mixer, recurrence(mixer, x)))


def test_diagonal_is_scipys_dlsim() -> None:
    """S4D as a real system through dlsim, whose state lags ours by a token."""
    mixer, x = layer(width=1), signals(1, 50, width=1)
    ad, bd, (c,) = dense_system(mixer, 0)
    real = np.block([[ad.real, -ad.imag], [ad.imag, ad.real]])
    row, input = np.concatenate([c.real, -c.imag]), np.concatenate([bd.real, bd.imag])
    lagged = (real, input[:, None], row[None] @ real, np.array([[row @ input]]), 1.0)
    _, out, _ = signal.dlsim(lagged, x[0, :, 0].numpy())
    mixed = torch.from_numpy(out)[None] + mixer.skip * x
    assert_close(mixer(x)[0], after(mixer, mixed))


@EACH
def test_steps_and_chunks_equal_whole(form: dict) -> None:
    mixer, x = layer(**form), signals(2, 37).requires_grad_()
    y, last = mixer(x)
    cotangent = signals(2, 37, seed=1)
    wanted = torch.autograd.grad((y * cotangent).sum(), [x, *mixer.parameters()])
    for sizes in ([1] * 37, [20, 17], [1, 3, 33]):
        outs, state = [], None
        for piece in x.split(sizes, 1):
            out, state = mixer(piece, state)
            outs.append(out)
        assert_close((torch.cat(outs, 1), state), (y, last))
        got = torch.autograd.grad((torch.cat(outs, 1) * cotangent).sum(), [x, *mixer.parameters()])
        assert_close(got, wanted, rtol=1e-6, atol=1e-9)
    assert state_bytes(last) == 2 * 3 * 8 * 8  # rows, features, N doubles: free of the length
    fresh = reset(last, torch.tensor([True, True]))
    assert_close(mixer(x, fresh)[0], y)


@EACH
@pytest.mark.parametrize("causal", [True, False])
def test_every_parameter_learns(form: dict, causal: bool) -> None:
    mixer = layer(causal=causal, **form)
    mixer(signals(2, 20))[0].square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A real mode (Λ and b real) does not hear the imaginary part of its C: not every entry.
        assert parameter.grad.flatten(1 if name == "c" else 0).any(-1).all(), name


@EACH
@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_not_seen(form: dict, causal: bool) -> None:
    mixer, x = layer(causal=causal, **form), signals(2, 12)
    y, state = mixer(x)
    for left, right in ((5, 0), (0, 5), (3, 2)):
        padded = F.pad(x, (0, 0, left, right), value=float("nan")).requires_grad_()
        keep = F.pad(torch.ones(2, 12, dtype=torch.bool), (left, right))
        out, last = mixer(padded, keep=keep)
        assert_close(out[keep].view_as(y), y)
        assert not out[~keep].any()
        if causal and not right:
            assert_close(last.x, state.x)
        (grad,) = torch.autograd.grad(out.sum(), padded)
        assert grad.isfinite().all()
        assert not grad[~keep].any()


@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_kernel_grows_for_good(measure: str) -> None:
    mixer, x = layer(form="dplr", measure=measure, length=8), signals(1, 50)
    with torch.no_grad():
        whole, _ = mixer(x)
        short, state = mixer(x[:, :5])
        stepped, _ = mixer(x[:, 5:6], state)
        grown = copy.deepcopy(mixer)
        grown.grow(50)
        assert int(grown.length) == 64
        assert not torch.equal(grown.c, mixer.c)
        assert_close(grown(x)[0], whole)
        assert_close(grown(x[:, :5])[0], short)
        assert_close(grown(x[:, 5:6], state)[0], stepped)
    again = layer(form="dplr", measure=measure, length=8)
    again.load_state_dict(grown.state_dict())
    assert_close(again(x)[0], whole)


@EACH
def test_rate_changes_the_sampling(form: dict) -> None:
    """Exactly the system of another step; nearly the same outputs on a signal resampled."""
    mixer, x = layer(**form), signals(2, 30)
    mixer.rate = 0.5
    with torch.no_grad():
        expected = after(mixer, recurrence(mixer, x, rate=0.5))
        assert_close(mixer(x)[0], expected)
        outs, state = [], None
        for piece in x.split([7, 1, 22], 1):
            out, state = mixer(piece, state)
            outs.append(out)
        assert_close(torch.cat(outs, 1), expected)
        time = torch.arange(2000, dtype=torch.float64)[None, :, None].expand(1, -1, 3)
        dense = mixer((time / 400).sin())[0]
        mixer.rate = 1.0
        coarse = mixer((time[:, ::2] / 400).sin())[0]
    # Between samples the signal moves by 1/400, so the systems differ by about that much.
    assert (dense[:, ::2] - coarse).abs().max() < 0.05 * coarse.abs().max()


def test_readout_is_not_stale() -> None:
    """The recovered C is kept between steps and made anew once a parameter moves."""
    mixer, x = layer(form="dplr", length=8), signals(1, 4)
    with torch.no_grad():
        _, state = mixer(x)
        mixer(x[:, :1], state)
        for change in (lambda: mixer.c.mul_(2), lambda: mixer.log_step.add_(0.5)):
            change()
            expected = mixer(torch.cat([x, x[:, :1]], 1))[0][:, -1:]
            _, state = mixer(x)
            assert_close(mixer(x[:, :1], state)[0], expected)


def test_float32_and_bfloat16_follow_double() -> None:
    for form in ({"form": "diagonal"}, {"form": "dplr", "length": 64}):
        mixer, x = layer(**form), signals(1, 50)
        exact, _ = mixer(x)
        single = copy.deepcopy(mixer).float()
        assert_close(single(x.float())[0].double(), exact, rtol=1e-3, atol=2e-5)
        with torch.autocast("cpu", torch.bfloat16):
            y, state = single(x.float())
        assert state.x.dtype == torch.float32
        assert_close(y.double(), exact, rtol=0.05, atol=0.05)


def test_refuses_what_it_cannot_do() -> None:
    x = signals(1, 4)
    for arguments, message in (
        ({"state": 7}, "even"),
        ({"measure": "legs"}, "not a measure"),
        ({"form": "dplr", "init": "lin"}, "not an init"),
        ({"form": "dplr", "discretisation": "zoh"}, "bilinear only"),
        ({"step_min": 0.2}, "step_min"),
    ):
        with pytest.raises(LongspanError, match=message):
            build("s4", width=4, **arguments)
    # The tests' shape checker, where installed, refuses an unknown literal first.
    with pytest.raises((LongspanError, TypeCheckError), match="form"):
        build("s4", width=4, form="dense")
    with pytest.raises(LongspanError, match="context or marks"):
        layer()(x, context=x)
    with pytest.raises(LongspanError, match="causal=True"):
        layer(causal=False)(x, layer()(x)[1])


class Deep(nn.Module):
    """Embed, two blocks, read out: enough of a model to train S4 in."""

    def __init__(self, inputs: int, outputs: int, **arguments) -> None:
        super().__init__()
        self.embed = nn.Embedding(inputs, 16)
        self.blocks = nn.ModuleList(
            Block(build("s4", width=16, state=8, step_min=0.01, **arguments), None, width=16)
            for _ in range(2)
        )
        self.read = nn.Linear(16, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x, _ = block(x)
        return self.read(x)


def train(model: nn.Module, loss, steps: int) -> tuple[float, float]:
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2, weight_decay=0.1))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses[0], sum(losses[-5:]) / 5


@pytest.mark.parametrize("form", ["diagonal", "dplr"])
def test_learns_as_a_causal_language_model(form: str) -> None:
    """Copying the token of three steps ago needs the state."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Deep(6, 6, form=form, **({"length": 24} if form == "dplr" else {}))
    tokens = torch.randint(6, (8, 24), generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        return F.cross_entropy(model(tokens)[:, 3:].flatten(0, 1), tokens[:, :-3].flatten())

    start, end = train(model, loss, 60)
    assert end < 0.4 * start


def test_learns_as_a_bidirectional_classifier() -> None:
    """Which of two tokens comes first and which last in a row of others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Deep(4, 2, causal=False)
    tokens = torch.randint(2, 4, (32, 30), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(32) % 2
    tokens[:, 2], tokens[:, 27] = labels, 1 - labels

    def loss() -> Tensor:
        return F.cross_entropy(model(tokens).mean(1), labels)

    _, end = train(model, loss, 60)
    assert end < 0.1


def test_parameter_groups_spare_the_systems() -> None:
    model = Deep(4, 2, form="dplr", length=8)
    groups = parameter_groups(model, lr=4e-3, weight_decay=0.1)
    (slow,) = (group for group in groups if group["lr"] == 1e-3)
    assert slow["weight_decay"] == 0.0
    names = {id(p): n.rpartition(".")[2] for n, p in model.named_parameters()}
    assert {names[id(p)] for p in slow["params"]} == {
        "log_step",
        "log_decay",
        "frequency",
        "b",
        "p",
    }
    assert sum(len(group["params"]) for group in groups) == len(names)


@pytest.mark.slow
def test_runs_at_a_million_tokens() -> None:
    mixer = build("s4", width=8, state=16)
    x = torch.randn(1, 1 << 20, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y, _ = mixer(x)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    piece, _ = mixer(x[:, :1000])
    assert_close(y[:, :1000], piece, rtol=1e-4, atol=1e-5)
