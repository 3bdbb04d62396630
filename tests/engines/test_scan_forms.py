"""Every decay with both rules, normalised, packed and in pieces, against one token at a time."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan.engines import scan
from longspan.engines.scan import plan
from longspan.errors import LongspanError

DECAYS = ["none", "head", "channel", "head and token", "channel and token"]
EXP = scan.Entrywise(torch.exp, lambda y: y)
HEADS, WIDTH, VALUE = 3, 4, 5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CHUNK", 8)
    monkeypatch.setattr(plan, "GROUP", 3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(length: int, *, batch: int = 2, sequences: int | None = None) -> dict[str, Tensor]:
    tokens = batch, HEADS, length
    q, k, e = (normal(*tokens, WIDTH, seed=i) for i in range(3))
    state = normal(sequences or batch, HEADS, WIDTH, VALUE, seed=4)
    given = {"q": q, "k": k, "v": normal(*tokens, VALUE, seed=3), "state": state, "erase": e}
    given["rate"] = normal(*tokens, seed=6).sigmoid()
    return {name: t.requires_grad_() for name, t in given.items()}


def decays(form: str, length: int, *, batch: int = 2, strength: float = 1.0) -> Tensor | None:
    shapes = {
        "head": (HEADS,),
        "channel": (HEADS, WIDTH),
        "head and token": (batch, HEADS, length),
        "channel and token": (batch, HEADS, length, WIDTH),
    }
    if form == "none":
        return None
    return (-strength * normal(*shapes[form], seed=5).square()).requires_grad_()


def recurrence(
    rule: str, x: dict[str, Tensor], decay: Tensor | None, s: Tensor, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token at a time; under a normaliser exp is the feature map."""
    q, k, v = x["q"], x["k"], x["v"]
    if eps is not None:
        q, k, v = q.exp(), k.exp(), torch.cat([v, torch.ones_like(v[..., :1])], -1)
    outs, earlier = [], k.shape[2] - q.shape[2]
    for t in range(k.shape[2]):
        if decay is not None:
            now = decay[:, :, t] if decay.dim() > 2 else decay[None]
            s = s * (now if now.dim() == 3 else now[..., None]).exp()[..., None]
        new = v[:, :, t]
        if rule == "delta":
            seen = torch.einsum("bhd,bhdv->bhv", x["erase"][:, :, t], s)
            new = x["rate"][:, :, t, None] * (new - seen)
        s = s + k[:, :, t, :, None] * new[:, :, None]
        if t >= earlier:
            outs.append(torch.einsum("bhd,bhdv->bhv", q[:, :, t - earlier], s))
    o = torch.stack(outs, 2) if outs else q.new_zeros(*q.shape[:3], v.shape[3])
    return (o if eps is None else o[..., :-1] / (o[..., -1:] + eps)), s


def run(
    rule: str, x: dict[str, Tensor], decay: Tensor | None, s: Tensor | None, **more: Any
) -> Any:
    if rule == "outer":
        return scan.outer(x["q"], x["k"], x["v"], s, decay=decay, **more)
    return scan.delta(x["q"], x["k"], x["v"], x["rate"], s, erase=x["erase"], decay=decay, **more)


def same(got: Any, want: Any, wrt: list[Tensor | None]) -> None:
    """Values, and gradients toward all outputs."""
    assert_close(got, want)
    toward = [normal(*t.shape, seed=9 + i) for i, t in enumerate(want)]
    leaves = [t for t in wrt if t is not None]
    options: Any = {"allow_unused": True, "materialize_grads": True}
    found, wanted = (torch.autograd.grad(outs, leaves, toward, **options) for outs in (got, want))
    assert_close(found, wanted)


def piece(x: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {n: t if n == "state" else t[:, :, start:stop] for n, t in x.items()}


def faded(decay: Tensor | None, start: int, stop: int) -> Tensor | None:
    return decay if decay is None or decay.dim() < 3 else decay[:, :, start:stop]


@pytest.mark.parametrize("length", [1, 2, 8, 9, 24, 53])
@pytest.mark.parametrize("form", DECAYS)
@pytest.mark.parametrize("rule", ["outer", "delta"])
def test_every_decay_is_its_recurrence(rule: str, form: str, length: int) -> None:
    x, decay = inputs(length), decays(form, length)
    got = run(rule, x, decay, x["state"])
    same(got, recurrence(rule, x, decay, x["state"]), [*x.values(), decay])


@pytest.mark.parametrize("length", [1, 8, 53])
@pytest.mark.parametrize("form", DECAYS)
def test_features_and_normaliser_within_the_groups(form: str, length: int) -> None:
    x, decay = inputs(length), decays(form, length)
    s = normal(2, HEADS, WIDTH, VALUE + 1, seed=7).abs().requires_grad_()
    got = scan.outer(x["q"], x["k"], x["v"], s, decay=decay, feature=EXP, normalise=0.1)
    want = recurrence("outer", x, decay, s, eps=0.1)
    same(got, want, [x["q"], x["k"], x["v"], s, decay])


def test_features_without_a_normaliser_and_a_normaliser_without_features() -> None:
    x = inputs(30)
    q, k, v = x["q"], x["k"], x["v"]
    assert_close(scan.outer(q, k, v, feature=EXP), scan.outer(q.exp(), k.exp(), v))
    got = scan.outer(q.exp(), k.exp(), v, normalise=0.1)
    assert_close(got, scan.outer(q, k, v, feature=EXP, normalise=0.1))


def test_total_maps_and_normalises_too() -> None:
    x = inputs(9)
    got = scan.total(x["q"], x["k"], x["v"], feature=EXP, normalise=0.1)
    weights = x["q"].exp() @ x["k"].exp().mT
    assert_close(got, weights @ x["v"] / (weights.sum(-1, keepdim=True) + 0.1))


@pytest.mark.parametrize("form", DECAYS)
@pytest.mark.parametrize("rule", ["outer", "delta"])
@pytest.mark.parametrize(("length", "keys"), [(1, 9), (20, 31)])
def test_earlier_keys_come_before_all_queries(rule: str, form: str, length: int, keys: int) -> None:
    x, decay = inputs(keys), decays(form, keys)
    x["q"] = normal(2, HEADS, length, WIDTH, seed=8).requires_grad_()
    got = run(rule, x, decay, x["state"])
    same(got, recurrence(rule, x, decay, x["state"]), [*x.values(), decay])


@pytest.mark.parametrize("pieces", [[1] * 40, [17, 1, 22], [39, 1]])
@pytest.mark.parametrize("form", DECAYS)
@pytest.mark.parametrize("rule", ["outer", "delta"])
def test_pieces_and_single_tokens_give_the_whole(rule: str, form: str, pieces: list[int]) -> None:
    x, decay = inputs(40), decays(form, 40)
    outs, s, start = [], x["state"], 0
    for count in pieces:
        span = start, start + count
        o, s = run(rule, piece(x, *span), faded(decay, *span), s)
        outs.append(o)
        start += count
    assert_close((torch.cat(outs, 2), s), run(rule, x, decay, x["state"]))


def test_normalised_pieces_give_the_whole() -> None:
    x, decay = inputs(40), decays("channel and token", 40)
    how: Any = {"feature": EXP, "normalise": 0.1}
    outs, s = [], None
    for start, stop in ((0, 17), (17, 18), (18, 40)):
        o, s = run("outer", piece(x, start, stop), faded(decay, start, stop), s, **how)
        outs.append(o)
    assert_close((torch.cat(outs, 2), s), run("outer", x, decay, None, **how))


BORDERS = [[0, 30], [0, 1, 2, 30], [0, 0, 8, 16, 16, 30, 30], [0, 25, 30]]


@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize("form", DECAYS)
@pytest.mark.parametrize("rule", ["outer", "delta", "normalised"])
def test_packed_sequences_are_each_as_if_alone(rule: str, form: str, borders: list[int]) -> None:
    """Values and gradients of tokens, decays and of every sequence's state."""
    count = len(borders) - 1
    x, decay = inputs(30, batch=1, sequences=count), decays(form, 30, batch=1)
    s, eps, how = x["state"], None, {}
    if rule == "normalised":
        s = normal(count, HEADS, WIDTH, VALUE + 1, seed=7).abs().requires_grad_()
        rule, eps, how = "outer", 0.1, {"feature": EXP, "normalise": 0.1}
    got = run(rule, x, decay, s, offsets=torch.tensor(borders), **how)
    outs, states = [], []
    for i, (start, stop) in enumerate(pairwise(borders)):
        alone = piece(x, start, stop), faded(decay, start, stop), s[i : i + 1]
        o, last = recurrence(rule, *alone, eps)
        outs.append(o)
        states.append(last)
        mine, kept = run(rule, *alone, **how)
        if stop - start != 1:  # a single token alone takes the step, which rounds differently
            assert torch.equal(got[0][:, :, start:stop], mine)
            assert torch.equal(got[1][i : i + 1], kept)
    want = torch.cat(outs, 2), torch.cat(states)
    same(got, want, [x["q"], x["k"], x["v"], x["erase"], x["rate"], s, decay])


def test_offsets_that_are_no_borders_say_so() -> None:
    x = inputs(9, batch=1)
    for wrong in ([0, 8], [1, 9], [0, 5, 3, 9], []):
        with pytest.raises(LongspanError, match="rise from 0 to the length 9"):
            run("outer", x, None, None, offsets=torch.tensor(wrong, dtype=torch.long))
    with pytest.raises(LongspanError, match="got 2 rows"):
        run("delta", inputs(9), None, None, offsets=torch.tensor([0, 9]))
    with pytest.raises(LongspanError, match="2 sequences need as many states and got 1"):
        run("outer", x, None, x["state"], offsets=torch.tensor([0, 4, 9]))


@pytest.mark.parametrize("rule", ["outer", "delta"])
@pytest.mark.parametrize("form", ["head and token", "channel and token"])
def test_gradcheck(rule: str, form: str) -> None:
    x = {n: t[:1, :1].detach().requires_grad_() for n, t in inputs(19).items()}
    decay = decays(form, 19)
    assert decay is not None
    decay = decay[:1, :1].detach().requires_grad_()

    def call(q: Tensor, k: Tensor, v: Tensor, s: Tensor, e: Tensor, r: Tensor, d: Tensor) -> Any:
        return run(rule, {"q": q, "k": k, "v": v, "erase": e, "rate": r}, d, s)

    assert torch.autograd.gradcheck(call, (*x.values(), decay), fast_mode=True)


@pytest.mark.parametrize("rule", ["outer", "delta"])
@pytest.mark.parametrize("form", DECAYS[1:])
def test_no_decay_overflows(rule: str, form: str) -> None:
    """Logarithms to −1e4 a token in float32, beside channels that hardly fade."""
    x = {n: (t.detach().float() / 2).requires_grad_() for n, t in inputs(40).items()}
    decay = decays(form, 40, strength=1e4)
    assert decay is not None
    decay = decay.detach().float()
    decay[..., ::2] *= 1e-7
    decay.requires_grad_()
    got = run(rule, x, decay, x["state"])
    want = recurrence(
        rule, {n: t.double() for n, t in x.items()}, decay.double(), x["state"].double()
    )
    assert_close(got, tuple(t.float() for t in want), rtol=1e-4, atol=1e-4)
    leaves = [x["q"], x["k"], x["v"], x["state"], decay]
    grads = torch.autograd.grad([t.sum() for t in got], leaves)
    wanted = torch.autograd.grad([t.sum() for t in want], leaves)
    assert_close(grads, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", DECAYS)
@pytest.mark.parametrize("rule", ["outer", "delta"])
def test_later_tokens_change_no_earlier_bit(rule: str, form: str) -> None:
    x, decay = inputs(40), decays(form, 40)
    before = run(rule, x, decay, x["state"])[0][:, :, :21]
    late = {n: t.detach().clone() for n, t in x.items()}
    for name in ("q", "k", "v", "erase", "rate"):
        late[name][:, :, 21:] = 3.0
    if decay is not None and decay.dim() > 2:
        decay = decay.clone()
        decay[:, :, 21:] = -7.0
    assert torch.equal(before, run(rule, late, decay, x["state"])[0][:, :, :21])


@pytest.mark.parametrize("form", DECAYS)
@pytest.mark.parametrize("length", [1, 30])
@pytest.mark.parametrize("rule", ["outer", "delta"])
def test_states_are_float32_under_bfloat16(rule: str, length: int, form: str) -> None:
    x = {n: t.detach().bfloat16().requires_grad_() for n, t in inputs(length).items()}
    decay = decays(form, length)
    decay = None if decay is None else decay.detach().bfloat16().requires_grad_()
    o, s = run(rule, x, decay, None)
    assert (o.dtype, s.dtype) == (torch.bfloat16, torch.float32)
    leaves = [t for n, t in x.items() if n in "qkv"] + ([] if decay is None else [decay])
    grads = torch.autograd.grad(o.float().sum() + s.sum(), leaves)
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in grads)
