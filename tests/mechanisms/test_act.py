"""ACT's own claims: Graves, 2016, against a loop over positions and steps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longspan import build
from longspan.errors import LongspanError
from longspan.nn import Block, FeedForward, MultiHead, detach
from longspan.nn.auxiliary import collect
from longspan.nn.depth import Packed, pointwise, step_of
from longspan.testing import counting

B, L, E = 2, 5, 6


def act(**arguments):
    torch.manual_seed(0)
    driver = build("act", width=E, **arguments).double()
    nn.init.normal_(driver.halt.weight)
    return driver


def modules(count: int = 5) -> list[nn.Module]:
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(E, E), nn.Tanh()).double() for _ in range(count)]


def example() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return 3 * torch.randn(B, L, E, generator=generator, dtype=torch.float64)


def reference(driver, layers, x, *, output="sum", reads="after"):
    """(y, N, R), one position and one step at a time."""
    ys, ns, rs = [], [], []
    for s in x.reshape(-1, E):
        total, y = torch.zeros((), dtype=s.dtype), torch.zeros_like(s)
        for n, layer in enumerate(layers):
            before, s = s, layer(s)
            p = driver.halt(before if reads == "before" else s)[0].sigmoid()
            last = total + p >= 1 - driver.eps or n + 1 == len(layers)
            weight = 1 - total if last else p
            y = y + weight * s if output == "sum" else weight * s + (1 - weight) * y
            if last:
                ns.append(n + 1)
                rs.append(weight)
                break
            total = total + p
        ys.append(y)
    return torch.stack(ys).view_as(x), torch.tensor(ns).view(x.shape[:2]), torch.stack(rs)


@pytest.mark.parametrize("output", ["sum", "running"])
@pytest.mark.parametrize("reads", ["after", "before"])
def test_batched_loop_equals_a_loop_over_positions(output, reads):
    driver, layers = act(bias=-0.2, output=output, reads=reads, cost=0.5).train(), modules()
    parameters = [*driver.parameters(), *nn.ModuleList(layers).parameters()]
    x = example().requires_grad_()
    want, steps, rest = reference(driver, layers, x, output=output, reads=reads)
    assert len(steps.unique()) > 1
    went = driver([pointwise(layer) for layer in layers], x)
    ponder = collect(driver)["ponder"]
    torch.testing.assert_close(went.y, want)
    assert torch.equal(went.taken, steps)
    torch.testing.assert_close(ponder, 0.5 * (steps.flatten() + rest).mean())
    got = torch.autograd.grad(went.y.square().sum() + ponder, [x, *parameters], allow_unused=True)
    right = torch.autograd.grad(
        want.square().sum() + 0.5 * rest.mean(), [x, *parameters], allow_unused=True
    )
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_away_from_the_boundaries():
    driver, layers = act(bias=-0.2).train(), modules(3)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        y = driver([pointwise(layer) for layer in layers], x).y
        return y, collect(driver)["ponder"]

    assert torch.autograd.gradcheck(run, (example()[:1, :2].requires_grad_(),))


def test_sure_of_halting_it_takes_one_step():
    driver, layers = act(bias=1000.0, cost=1.0).train(), modules()
    x = example()
    went = driver([pointwise(layer) for layer in layers], x)
    assert (went.taken == 1).all()
    assert torch.equal(went.y, layers[0](x))
    assert collect(driver)["ponder"] == 2  # N + R = 1 + 1


def test_never_halting_puts_the_remainder_on_the_last_step():
    driver, layers = act(bias=-4.0).eval(), modules()
    x, p = example(), 0.0
    nn.init.zeros_(driver.halt.weight)
    p = driver.halt.bias.detach().sigmoid()
    states, s = [], x
    for layer in layers:
        s = layer(s)
        states.append(s)
    want = sum(p * s for s in states[:-1]) + (1 - 4 * p) * states[-1]
    went = driver([pointwise(layer) for layer in layers], x)
    torch.testing.assert_close(went.y, want)
    assert (went.taken == 5).all()


def test_weights_sum_to_one():
    driver = act(bias=-0.7).eval()
    x = example()
    shift = pointwise(nn.Identity())
    went = driver([shift] * 6, x)
    torch.testing.assert_close(went.y, x, rtol=1e-15, atol=1e-15)


def test_threshold_counts_the_present_step():
    driver = act(bias=0.0).eval()
    nn.init.zeros_(driver.halt.weight)
    went = driver([pointwise(nn.Identity())] * 6, example())
    assert (went.taken == 2).all()  # 0.5 + 0.5 ≥ 0.99


def test_steps_have_no_gradient():
    """N counts as a constant: the ponder cost moves b through R alone, by −p' of step 1."""
    driver = act(bias=-0.2, cost=1.0).train()
    nn.init.zeros_(driver.halt.weight)
    driver([pointwise(nn.Identity())] * 6, example())
    p = driver.halt.bias.detach().sigmoid()
    (gradient,) = torch.autograd.grad(collect(driver)["ponder"], driver.halt.bias)
    torch.testing.assert_close(gradient, -2 * p * (1 - p))  # N = 3


def test_one_decision_for_a_sequence_by_its_mean():
    driver, layers = act(bias=-0.2, each="sequence").eval(), modules()
    keep = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    went = driver([pointwise(layer) for layer in layers], example(), keep=keep)
    assert (went.taken == went.taken[:, :1]).masked_fill(~keep, True).all()
    assert not went.taken[~keep].any()
    short = driver([pointwise(layer) for layer in layers], example()[1:, :3])
    torch.testing.assert_close(went.y[1:, :3], short.y)


def test_padding_takes_no_step_and_costs_nothing():
    driver, layers = act(bias=-0.2).train(), modules()
    keep = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    steps = [pointwise(layer) for layer in layers]
    dirty = example().masked_fill(~keep[..., None], torch.nan)
    went, ponder = driver(steps, dirty, keep=keep), collect(driver)["ponder"]
    rows = [driver(steps, example()[:1]), driver(steps, example()[1:, :3])]
    torch.testing.assert_close(went.y[1:, :3], rows[1].y)
    count = sum(float((row.taken).sum()) for row in rows)
    assert went.taken.sum() == count
    assert ponder.isfinite()
    for g in torch.autograd.grad(ponder, list(driver.parameters())):
        assert g.isfinite().all()


def test_first_step_is_flagged():
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append(x[:, -1].unique().tolist())
            return x[:, :-1]

    watch = Watch()
    act(bias=-9.0)([pointwise(watch, first=n == 0) for n in range(3)], example())
    assert seen == [[1.0], [0.0], [0.0]]


def test_halted_positions_cost_nothing():
    """FLOPs of the module are those of the steps taken, and of no more."""
    driver, layers = act(bias=-0.2).eval(), modules()
    steps, x = [pointwise(layer) for layer in layers], example()
    went = driver(steps, x)
    halting = 2 * B * L * E * int(went.taken.max())
    one = 2 * E * E
    spent = counting.flops(lambda: driver(steps, x))
    assert spent <= one * int(went.taken.sum()) + 2 * B * L * E * 5
    assert spent >= one * int(went.taken.sum()) + halting


def block(*, causal: bool, order: Any = "pre", cross: bool = False, width: int = 24) -> Block:
    torch.manual_seed(3)

    def heads(causal: bool, position=None) -> MultiHead:
        attention = build("multi-head-attention", causal=causal)
        return MultiHead(attention, width=width, heads=3, position=position)

    own = heads(causal, build("rope"))
    other = heads(False) if cross else None
    built = Block(own, FeedForward(width), width=width, order=order, cross=other)
    return built.double().eval()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("cross", [False, True])
def test_a_block_for_some_positions_is_the_whole_block_there(causal, order, cross):
    one, x = block(causal=causal, order=order, cross=cross), torch.randn(3, 11, 24).double()
    x = x.requires_grad_()
    encoded = torch.randn(3, 11, 24).double() if cross else None
    active = torch.rand(3, 11, generator=torch.Generator().manual_seed(4)) > 0.6
    active[2] = False
    for keep in (None, torch.rand(3, 11, generator=torch.Generator().manual_seed(5)) > 0.3):
        part, state = x, None
        if causal:
            _, state = one(torch.ones_like(x[:, :4]), encoded=encoded)
            state = detach(state)
        some = active if keep is None else active & keep
        whole, after = one(x, state, keep=keep, encoded=encoded)
        want = torch.where(some[..., None], whole, x)
        got, carried = step_of(one, keep=keep, encoded=encoded)(part, state, some)
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got.square().sum(), [x, *one.parameters()], allow_unused=True),
            torch.autograd.grad(want.square().sum(), [x, *one.parameters()], allow_unused=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
        if causal:
            for a, b in zip(carried.attention, after.attention, strict=True):
                torch.testing.assert_close(a, b)
            assert torch.equal(carried.seen, after.seen)


def test_a_block_computes_no_query_of_a_halted_position():
    one, x = block(causal=True, width=48), torch.randn(1, 64, 48).double()
    few = torch.zeros(1, 64, dtype=torch.bool)
    few[:, 5:13] = True
    whole = counting.flops(lambda: one(x))
    part = counting.flops(lambda: step_of(one)(x, None, few))
    keys_and_values = 2 * 2 * 64 * 48 * 48
    assert part - keys_and_values < 0.2 * (whole - keys_and_values)
    none = counting.flops(lambda: step_of(one)(x, None, few & False))
    assert none == keys_and_values


def test_packed_positions_end_together():
    active = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]]).bool()
    packed = Packed.of(active)
    assert packed.at[packed.valid].tolist() == [0, 2, 3]
    assert packed.valid.tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize("eps", [0.0, 1.0, -0.5])
def test_refuses_a_threshold_outside_its_range(eps):
    with pytest.raises(LongspanError, match="between 0 and 1"):
        act(eps=eps)


def test_refuses_what_would_peek_and_no_steps():
    driver = build("act", width=24, each="sequence").double().eval()
    x = torch.randn(2, 5, 24).double()
    with pytest.raises(LongspanError, match="carry on"):
        driver([step_of(block(causal=True))], x)
    driver([step_of(block(causal=False))], x)
    with pytest.raises(LongspanError, match="no steps"):
        driver([], x)
