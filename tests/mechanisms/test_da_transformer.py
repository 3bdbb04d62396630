"""DA-Transformer: its function of distance, its switches, its masks."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import longspan
from longspan.errors import LongspanError
from longspan.testing.oracles import oracle_of


def example(length: int = 9) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 2, 3, length, 8)
    return tuple(torch.randn(*shape, dtype=torch.float64, generator=generator))


def test_alpha_zero_is_softmax_of_rectified_scores():
    q, k, v = example()
    attend = longspan.build("da-transformer", heads=3, alpha=0.0).double()
    assert_close(attend(q, k, v)[0], ((q @ k.mT).relu() / 8**0.5).softmax(-1) @ v)


def test_alpha_far_below_zero_leaves_only_the_diagonal_score():
    q, k, v = example()
    attend = longspan.build("da-transformer", heads=3).double()
    attend.alpha.data.fill_(-1e6)
    s = (q * k).sum(-1).relu() / 8**0.5
    own = s.exp() / (s.exp() + 8)
    other = 1 / (s.exp() + 8)  # a score of 0 is not a masked one
    want = (own - other)[..., None] * v + other[..., None] * v.sum(2, keepdim=True)
    assert_close(attend(q, k, v)[0], want)


def test_the_factor_is_1_at_0_and_bounded_both_ways():
    attend = longspan.build("da-transformer", heads=2, beta=1.5)
    attend.alpha.data = torch.tensor([-2.0, 2.0])
    factor = attend.factor(torch.arange(100), torch.arange(100)).detach()
    assert_close(factor.diagonal(dim1=1, dim2=2), torch.ones(2, 100))
    assert_close(factor[0, 0, -1], torch.tensor(0.0))
    assert_close(factor[1, 0, -1], 1 + torch.tensor(1.5).exp())
    assert bool((factor[0, 0].diff() <= 0).all() and (factor[1, 0].diff() >= 0).all())


@pytest.mark.parametrize("alpha", [-1e4, -3.0, 3.0, 1e4])
@pytest.mark.parametrize("beta", [-1e3, 0.0, 1e2])
def test_the_factor_is_finite_for_any_alpha_beta_and_distance(alpha, beta):
    attend = longspan.build("da-transformer", heads=1, beta=beta).to(torch.bfloat16)
    attend.alpha.data.fill_(alpha)
    factor = attend.factor(torch.arange(9000, 9004), torch.arange(9004))
    assert factor.isfinite().all() or beta == 1e2  # e^100 itself is beyond float32
    factor.clamp(max=1e3).sum().backward()
    assert attend.alpha.grad.isfinite().all()


@pytest.mark.parametrize("switch", ["rectified", "saturating"])
@pytest.mark.parametrize("causal", [True, False])
def test_ablations_are_the_formula_without_relu_or_sigmoid(switch, causal):
    attend = longspan.build("da-transformer", heads=3, causal=causal, **{switch: False}).double()
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[1, 4:6] = False
    oracle = oracle_of("da-transformer")
    assert oracle is not None
    got, _ = attend(*example(), keep=keep)
    assert_close(got, oracle(attend, *example(), keep=keep))
    assert len(list(attend.parameters())) == (1 if switch == "saturating" else 2)


def test_it_learns_two_numbers_a_head_and_starts_with_both_signs():
    attend = longspan.build("da-transformer", heads=4)
    assert sum(p.numel() for p in attend.parameters()) == 8
    assert {bool(a > 0) for a in attend.alpha} == {True, False}


def test_it_refuses_another_sequence():
    q, k, v = example()
    with pytest.raises(LongspanError, match="within one sequence"):
        longspan.build("da-transformer", heads=3).double()(q[:, :, :4], k, v)
