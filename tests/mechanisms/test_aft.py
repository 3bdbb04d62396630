"""AFT's four forms: their laws, their identities, and exponentials that stay in range."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import build, show
from longspan.errors import LongspanError
from longspan.testing import check, laws_for
from longspan.testing.oracles import oracle_of

FORMS: dict[str, dict[str, Any]] = {
    "simple": {"form": "simple"},
    "full": {"form": "full", "rank": 4, "length": 200},
    "full, dense": {"form": "full", "rank": None, "length": 200},
    "local, 2d": {"window": 2, "columns": 5, "length": 200},
    "conv": {"form": "conv", "heads": 3, "kernel": 4},
    "conv, 2d": {"form": "conv", "heads": 3, "kernel": 3, "columns": 5},
    "conv, plain": {"form": "conv", "heads": 3, "kernel": 5, "reparameterised": False},
}
LAWS = [
    name
    for name in laws_for(show("aft"))
    if name not in ("compiles", "costs_what_it_says", "carries_what_it_says")
]


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


def qkv(length: int = 30, heads: int = 1, **kind: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (normal(2, heads, length, 3, **kind) for _ in range(3))
    return q, k, v


def randomised(**arguments: Any) -> Any:
    """Built with parameters of size 1, as after training."""
    module = build("aft", **arguments).double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    return module


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_keeps_the_laws(form: str, law: str) -> None:
    verdict = check(law, replace(show("aft"), tiny=FORMS[form]))
    if law == "every_parameter_learns" and form in ("conv", "conv, 2d"):
        # γ starts at 0 (Eq. 7), and no gradient passes it.
        assert verdict.result == "fail"
        assert "w gets no gradient" in str(verdict.reason)
    else:
        assert verdict.result == "pass", verdict.reason


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", [*FORMS, "local"])
def test_trained_biases_equal_the_written_out_ratio(form: str, causal: bool) -> None:
    module = randomised(causal=causal, **FORMS.get(form, {"window": 4, "length": 40}))
    inputs = [t.requires_grad_() for t in qkv(heads=3)]
    formula = oracle_of("aft")
    assert formula is not None
    got, want = module(*inputs)[0], formula(module, *inputs, keep=None)
    assert_close(got, want)
    wanted = [*inputs, *module.parameters()]
    toward = torch.randn_like(got)
    found = torch.autograd.grad(got, wanted, toward)
    assert_close(found, torch.autograd.grad(want, wanted, toward))


@pytest.mark.parametrize("causal", [False, True])
def test_full_without_bias_is_simple(causal: bool) -> None:
    full = build("aft", form="full", causal=causal, length=90, rank=None).double()
    torch.nn.init.zeros_(full.w)
    inputs = qkv(90)
    assert_close(full(*inputs)[0], build("aft", form="simple", causal=causal)(*inputs)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_local_with_a_window_over_all_is_full(causal: bool) -> None:
    length = 20
    local = randomised(window=length + 3, causal=causal, length=length)
    full = randomised(form="full", causal=causal, length=length, rank=None)
    with torch.no_grad():
        full.w.zero_()
        for j, offset in enumerate(local.offsets):
            for t in range(max(0, -offset), min(length, length - offset)):
                full.w[t, t + offset] = local.w[t, j]
    inputs = qkv(length)
    assert_close(local(*inputs)[0], full(*inputs)[0])


@pytest.mark.parametrize("columns", [None, 6])
@pytest.mark.parametrize("causal", [False, True])
def test_conv_of_one_head_is_a_relative_local(causal: bool, columns: int | None) -> None:
    kernel = 4 if causal and columns is None else 7
    conv = randomised(
        form="conv", heads=1, kernel=kernel, columns=columns, causal=causal, reparameterised=False
    )
    local = randomised(window=4, causal=causal, length=30, columns=columns)
    assert conv.near == local.near
    with torch.no_grad():
        local.w.copy_(conv.w.expand(30, -1))
    inputs = qkv()
    assert_close(conv(*inputs)[0], local(*inputs)[0])


def test_a_fresh_conv_is_simple() -> None:
    """γ = β = 0, so every bias is 0 (Eq. 7)."""
    conv, inputs = build("aft", form="conv", heads=1), qkv()
    assert_close(conv(*inputs)[0], build("aft", form="simple")(*inputs)[0])


@pytest.mark.parametrize("form", ["local", "full", "simple"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_constant_on_keys_or_biases_changes_nothing(form: str, causal: bool) -> None:
    options = {"window": 40} if form == "local" else {"rank": None} if form == "full" else {}
    module = randomised(form=form, causal=causal, length=30, **options)
    q, k, v = qkv()
    before = module(q, k, v)[0]
    assert_close(module(q, k + torch.tensor([700.0, -700.0, 3.0]), v)[0], before)
    if form == "full":
        module.w.data += 800
        assert_close(module(q, k, v)[0], before)
    if form == "local":  # its window holds every token
        module.w.data += 5
        assert_close(module(q, k, v)[0], before)


@pytest.mark.parametrize("form", [*FORMS, "local"])
@pytest.mark.parametrize("causal", [False, True])
def test_keys_of_any_size_stay_right(form: str, causal: bool) -> None:
    """exp(±500) in float32; the formula in float64 says what it should be."""
    arguments = FORMS.get(form, {"window": 4, "length": 40})
    module = build("aft", causal=causal, **arguments)
    q, k, v = qkv(heads=3, dtype=torch.float32)
    k = k * 200
    got, _ = module(q, k, v)
    formula = oracle_of("aft")
    assert formula is not None
    want = formula(module.double(), q.double(), k.double(), v.double(), keep=None)
    assert_close(got.double(), want, atol=1e-4, rtol=1e-4)


def test_a_bias_beyond_the_range_of_exp() -> None:
    module = build("aft", window=2, length=30, causal=True)
    module.w.data[:, 0] = 200.0  # the token before takes all the weight
    q, k, v = qkv(dtype=torch.float32)
    got, _ = module(q, k, v)
    assert_close(got[:, :, 1:], (torch.sigmoid(q)[:, :, 1:] * v[:, :, :-1]))


def test_outside_the_window_the_bias_is_0_not_minus_infinity() -> None:
    q, k, v = qkv(30)
    v = v.requires_grad_()
    build("aft", window=2, length=30).double()(q, k, v)[0][:, :, 0].sum().backward()
    assert v.grad is not None
    assert bool((v.grad[:, :, 20:] != 0).all())


@pytest.mark.parametrize(
    ("arguments", "reach"),
    [
        ({"form": "simple"}, 0),
        ({"window": 4, "length": 99}, 3),
        ({"form": "conv", "heads": 1, "kernel": 6}, 5),
        ({"form": "conv", "heads": 1, "kernel": 3, "columns": 7}, 8),
    ],
)
def test_the_state_holds_the_window_and_the_sums(arguments: dict[str, Any], reach: int) -> None:
    q, k, v = qkv(40)
    _, state = build("aft", causal=True, **arguments).double()(q, k, v)
    assert state.k.shape == state.v.shape == (2, 1, reach, 3)
    assert {t.shape for t in state.sums} == {(2, 1, 3)}


def test_later_queries_alone() -> None:
    """With S > L the last query stands at the last key."""
    for arguments in FORMS.values():
        module = randomised(causal=True, **arguments)
        q, k, v = qkv(heads=3)
        assert_close(module(q[:, :, 25:], k, v)[0], module(q, k, v)[0][:, :, 25:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"form": "conv"}, "give heads"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LongspanError, match=message):
        build("aft", **arguments)


def test_refuses_inputs_it_was_not_built_for() -> None:
    q, k, v = qkv(30)
    for form in ("local", "full"):
        module = build("aft", form=form, length=20, causal=True).double()
        with pytest.raises(LongspanError, match="at most 20 tokens and got 30"):
            module(q, k, v)
        _, state = module(q[:, :, :15], k[:, :, :15], v[:, :, :15])
        with pytest.raises(LongspanError, match="at most 20 tokens and got 25"):
            module(q[:, :, :10], k[:, :, :10], v[:, :, :10], state)
    module = build("aft", form="conv", heads=2).double()
    with pytest.raises(LongspanError, match="2 kernels and got 1 heads"):
        module(q, k, v)
    with pytest.raises(LongspanError, match="values of width 2"):
        build("aft", length=30).double()(q, k, v[..., :2])
    with pytest.raises(LongspanError, match="no cross form"):
        build("aft", length=30).double()(q[:, :, :9], k, v)
