"""Deep equilibrium models: solvers and gradients against closed forms, and the language model."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from longspan import LongspanError, build
from longspan.engines.fixed_point import Solver, deq, jacobian_penalty
from longspan.hub import StateCache
from longspan.models.equilibrium import EquilibriumConfig, EquilibriumForCausalLM
from longspan.nn import Block, FeedForward, MultiHead
from longspan.nn.auxiliary import collect

D = 6
METHODS = ["plain", "anderson", "broyden"]


def linear(radius: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """A of a given spectral radius, B, x."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(D, D, generator=generator, dtype=torch.float64) for _ in range(2))
    a = a * radius / torch.linalg.eigvals(a).abs().max()
    return a, b, torch.randn(3, D, generator=generator, dtype=torch.float64)


def tight(method: Any, most: int = 400) -> Solver:
    return Solver(method, most, 1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_map_has_its_closed_form(method):
    """z* = (I − A)⁻¹ B x, with the exact gradients of A, B and x."""
    a, b, x = (t.requires_grad_() for t in linear())
    z, solved = deq(lambda z: z @ a.T + x @ b.T, torch.zeros(3, D).double(), forward=tight(method))
    want = torch.linalg.solve(torch.eye(D) - a, b @ x.T).T
    torch.testing.assert_close(z, want, rtol=0, atol=1e-10)
    for got, right in zip(
        torch.autograd.grad(z.pow(3).sum(), [a, b, x]),
        torch.autograd.grad(want.pow(3).sum(), [a, b, x]),
        strict=True,
    ):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-9)
    assert (solved.residual < 1e-14).all()


def bent(a: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return (0.7 * z @ a.T + x).tanh()


@pytest.mark.parametrize("method", METHODS)
def test_implicit_gradient_is_that_of_a_long_unrolled_iteration(method):
    a, _, x = (t.requires_grad_() for t in linear())
    z, _ = deq(lambda z: bent(a, x, z), torch.zeros(3, D).double(), forward=tight(method))
    want = torch.zeros(3, D).double()
    for _ in range(300):
        want = bent(a, x, want)
    torch.testing.assert_close(z, want, rtol=0, atol=1e-10)
    for got, right in zip(
        torch.autograd.grad(z.square().sum(), [a, x]),
        torch.autograd.grad(want.square().sum(), [a, x]),
        strict=True,
    ):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-8)


def test_gradcheck_of_the_whole():
    a, _, x = (t.requires_grad_() for t in linear())

    def run(a: Tensor, x: Tensor) -> Tensor:
        start = torch.zeros(2, D).double()
        return deq(lambda z: bent(a, x, z), start, forward=tight("anderson"))[0]

    assert torch.autograd.gradcheck(run, (a, x[:2]))


def test_the_three_solvers_agree_and_two_are_faster():
    a, b, x = linear(0.95)
    solved = [
        Solver(method, 500, 1e-10)(lambda z: z @ a.T + x @ b.T, torch.zeros(3, D).double())  # pyright: ignore
        for method in METHODS
    ]
    for one in solved[1:]:
        torch.testing.assert_close(one.z, solved[0].z, rtol=0, atol=1e-7)
        assert one.calls < 0.4 * solved[0].calls


@pytest.mark.parametrize("method", METHODS)
def test_rows_stop_on_their_own_and_are_the_same_alone(method):
    a, b, x = linear(0.9)
    x[1] = 0  # solved by z = 0 at once

    def run(x: Tensor) -> Any:
        return Solver(method, 60, 1e-8)(lambda z: z @ a.T + x @ b.T, torch.zeros_like(x))

    whole = run(x)
    assert whole.steps[1] < whole.steps[0]
    for row in range(3):
        alone = run(x[row : row + 1])
        torch.testing.assert_close(alone.z[0], whole.z[row], rtol=0, atol=1e-12)
        assert alone.steps[0] == whole.steps[row]


@pytest.mark.parametrize("method", METHODS)
def test_where_nothing_converges_the_best_point_is_returned(method):
    def f(z: Tensor) -> Tensor:
        return 3 * z.cos() * z + 1

    solved = Solver(method, 25, 1e-12)(f, torch.full((2, 4), 2.0).double())
    assert solved.z.isfinite().all()
    assert solved.calls <= 25
    assert (solved.residual < torch.inf).all()


def test_phantom_gradients_are_those_of_damped_steps():
    a, _, x = (t.requires_grad_() for t in linear())
    start = torch.zeros(3, D).double()
    one, solved = deq(lambda z: bent(a, x, z), start, forward=tight("anderson"), phantom=1)
    want = bent(a, x, solved.z)
    for got, right in zip(
        torch.autograd.grad(one.square().sum(), [a, x]),
        torch.autograd.grad(want.square().sum(), [a, x]),
        strict=True,
    ):
        torch.testing.assert_close(got, right)
    exact = torch.autograd.grad(
        deq(lambda z: bent(a, x, z), start, forward=tight("anderson"))[0].square().sum(), x
    )[0]
    many, _ = deq(
        lambda z: bent(a, x, z), start, forward=tight("anderson"), phantom=200, damping=0.5
    )
    torch.testing.assert_close(torch.autograd.grad(many.square().sum(), x)[0], exact)


def test_jacobian_penalty_estimates_the_squared_norm():
    a, _, _ = linear()
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(50, D, dtype=torch.float64)
    got = jacobian_penalty(lambda z: z @ a.T, z, samples=200, generator=generator)
    torch.testing.assert_close(got, a.square().sum() / D, rtol=0.05, atol=0)


@pytest.mark.parametrize("wrong", [{"most": 0}, {"tolerance": -1.0}, {"memory": 0}], ids=str)
def test_a_solver_refuses(wrong):
    with pytest.raises(LongspanError):
        Solver(**wrong)


def test_refuses_gradients_that_do_not_exist():
    with pytest.raises(LongspanError, match="phantom"):
        deq(lambda z: z, torch.zeros(1, 2), forward=Solver(), phantom=-1)
    with pytest.raises(LongspanError, match="marks"):
        layer()(torch.zeros(1, 3, 24).double(), marks=torch.ones(1, 3, dtype=torch.bool))


E = 24


def layer(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes: Any = {"width": E, "heads": 3, "tolerance": 1e-6, "most": 150}
    return build("deq", **(sizes | changes)).double().eval()


def example(length: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, length, E, generator=generator, dtype=torch.float64)


def cell_formula(cell: Any, z: Tensor, x: Tensor, causal: bool) -> Tensor:
    """One evaluation, by head, query and key."""
    mixed = cell.project(z) + cell.inject(x)
    q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in mixed.chunk(3, -1))
    length, width = z.shape[1], E // 3
    p = cell.position
    c = torch.arange(E // 2, dtype=torch.float64)
    scores = torch.full((len(z), 3, length, length), -torch.inf, dtype=torch.float64)
    for i in range(length):
        for j in range(i + 1 if causal else length):
            angle = (i - j) / 10000 ** (2 * c / E)
            r = p.project(torch.cat([angle.sin(), angle.cos()])).view(3, width)
            content = ((q[:, :, i] + p.u) * k[:, :, j]).sum(-1)
            scores[:, :, i, j] = (content + ((q[:, :, i] + p.v) * r).sum(-1)) / width**0.5
    o = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    a = cell.norm(z + cell.output(o))
    hidden = cell.feed_forward.up(a).relu()
    return cell.feed_forward_norm(a + cell.feed_forward.down(hidden))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_the_layer_is_the_fixed_point_of_the_papers_cell(causal, solver):
    one, x = layer(causal=causal, solver=solver), example(5)
    z, _ = one(x)
    assert (one.solved.residual < 1e-6).all()
    torch.testing.assert_close(cell_formula(one.cell, z, x, causal), z, rtol=0, atol=2e-5)


def test_segments_attend_to_past_equilibria_as_one_sequence_does():
    one, x = layer(causal=True, memory=100), example(7)
    whole, state, outs = one(x)[0], None, []
    for piece in x.split([3, 1, 3], 1):
        y, state = one(piece, state)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=0, atol=3e-4)
    assert not state.z.requires_grad
    short = layer(causal=True, memory=4)
    assert short(x)[1].z.shape == (2, 4, E)


def test_weights_are_normalised():
    cell = layer().cell
    for linear in (cell.project, cell.output, cell.feed_forward.up, cell.feed_forward.down):
        gain, direction = (linear.parametrizations.weight[0], linear.parametrizations.weight)
        assert gain is not None
        norm = direction.original1.norm(dim=1, keepdim=True)
        torch.testing.assert_close(linear.weight, direction.original0 * direction.original1 / norm)


def test_dropout_is_one_mask_for_all_evaluations():
    one, x = layer(dropout=0.3).train(), example(4)
    before = torch.random.get_rng_state()
    torch.manual_seed(4)
    first, _ = one(x)
    assert (one.solved.residual < 1e-6).all()  # with a mask anew in each there is no fixed point
    torch.manual_seed(4)
    assert torch.equal(one(x)[0], first)
    assert not torch.equal(one(x)[0], first)
    torch.random.set_rng_state(before)


def test_any_block_takes_an_injected_input():
    torch.manual_seed(5)
    heads = MultiHead(build("linear-transformer", causal=True), width=E, heads=3)
    block = Block(heads, FeedForward(E), width=E, order="post")
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(0.6)
    one, x = layer(block=block, causal=True), example(10)
    z, _ = one(x)
    want = torch.zeros_like(x)
    for _ in range(200):
        want = block(want + x)[0]
    torch.testing.assert_close(z, want, rtol=0, atol=3e-4)
    first, state = one(x[:, :6])
    second, _ = one(x[:, 6:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), z, rtol=0, atol=3e-4)


def test_a_plain_solver_of_fixed_length_sees_no_future():
    one, x = layer(causal=True, solver="plain", tolerance=0.0, most=12), example()
    early = one(x)[0][:, :5]
    other = one(torch.cat([x[:, :5], 5 * x[:, 5:].flip(1)], 1))[0][:, :5]
    assert torch.equal(other, early)


def test_memory_of_activations_does_not_grow_with_the_solver():
    def saved(most: int) -> int:
        one, sizes = layer(solver="plain", tolerance=0.0, most=most), []

        def keep(t: Tensor) -> Tensor:
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            one(example().requires_grad_())
        return sum(sizes)

    assert saved(40) == saved(3)


def test_unrolled_warm_up_backpropagates_through_each_evaluation():
    one, x = layer().train(), example().requires_grad_()
    one.unrolled = 2
    y, _ = one(x)
    f = one.cell.begin(x, None, keep=None)
    want = f(f(torch.zeros_like(x))[0])[0]
    torch.testing.assert_close(y, want)
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), [x]),
        torch.autograd.grad(want.square().sum(), [x]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_jacobian_regularisation_is_reported():
    one, x = layer(jacobian=0.5).train(), example()
    one(x)
    value = collect(one)["jacobian"]
    assert value > 0
    grads = torch.autograd.grad(value, list(one.cell.output.parameters()))
    assert all(g.isfinite().all() for g in grads)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 32, shape, generator=torch.Generator().manual_seed(seed))


def model(**changes: Any) -> Any:
    torch.manual_seed(0)
    options: Any = {"vocab_size": 32, "width": E, "heads": 3, "most": 40, "tolerance": 1e-4}
    options["allow_leaks"] = True
    built = EquilibriumForCausalLM(EquilibriumConfig(**(options | changes))).eval()
    built.get_input_embeddings().weight.data.mul_(30)
    return built


def test_a_language_model_whose_solver_sees_the_future_is_refused() -> None:
    with pytest.raises(LongspanError, match=r"can see the future.*allow_leaks"):
        model(allow_leaks=False)
    model(allow_leaks=False, solver="plain", tolerance=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["relative", "block"])
def test_the_language_model_trains_streams_saves_and_pads(cell, tmp_path):
    one, x = model(cell=cell), tokens(2, 7)
    whole, cache = one(x).logits, StateCache()
    pieces = [one(p, past_key_values=cache).logits for p in x.split([3, 1, 3], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-2, atol=5e-3)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 7)], 1).long()
    padded = one(torch.cat([tokens(2, 3, seed=8), x], 1), mask).logits[:, 3:]
    torch.testing.assert_close(padded, whole, rtol=1e-2, atol=5e-3)
    one.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is EquilibriumForCausalLM
    torch.testing.assert_close(loaded(x).logits, whole)
    one.train()
    out = one(x, labels=x)
    out.loss.backward()
    for name, parameter in one.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert one.model.equilibrium.solved.calls <= 40
    assert one.eval().generate(x, max_new_tokens=1, do_sample=False).shape == (2, 8)
