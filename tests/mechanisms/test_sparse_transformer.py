"""Sparse Transformer's patterns, its three uses and its claims."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import longspan
from longspan.errors import LongspanError
from longspan.testing.oracles import oracle_of

FORMS: list[dict[str, Any]] = [
    {"form": "strided", "stride": 7},
    {"form": "strided", "stride": 7, "inclusive": True},
    {"form": "strided", "stride": 1},
    {"form": "fixed", "stride": 8, "summary": 2},
    {"form": "fixed", "stride": 9, "summary": 3, "stripes": 3},
]
USES = [
    {"use": "merged"},
    {"use": "heads"},
    {"use": "interleaved", "layer": 1},
    {"use": "interleaved"},
]


def inputs(length: int, heads: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, heads, length, 4)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("use", USES, ids=lambda u: f"{u['use']}{u.get('layer', '')}")
@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
@pytest.mark.parametrize("length", [1, 6, 40, 65])
def test_every_form_and_use_is_its_mask(
    length: int, form: dict[str, Any], use: dict[str, Any], causal: bool
) -> None:
    attend = longspan.build("sparse-transformer", causal=causal, **form, **use)
    oracle = oracle_of("sparse-transformer")
    assert oracle
    qkv = [t.requires_grad_() for t in inputs(length)]
    got, want = attend(*qkv)[0], oracle(attend, *qkv, keep=None)
    assert_close(got, want)
    weight = inputs(length)[0].flip(2)
    found, wanted = (
        torch.autograd.grad(t, qkv, weight, materialize_grads=True) for t in (got, want)
    )
    assert_close(found, wanted)


@pytest.mark.parametrize("use", USES, ids=lambda u: f"{u['use']}{u.get('layer', '')}")
@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
def test_steps_equal_the_whole(form: dict[str, Any], use: dict[str, Any]) -> None:
    attend = longspan.build("sparse-transformer", causal=True, **form, **use)
    q, k, v = inputs(30)
    whole, state, outs = attend(q, k, v)[0], None, []
    for sizes in (slice(0, 11), slice(11, 12), *(slice(t, t + 1) for t in range(12, 30))):
        o, state = attend(q[:, :, sizes], k[:, :, sizes], v[:, :, sizes], state)
        outs.append(o)
    assert_close(torch.cat(outs, 2), whole)


def masks(length: int, causal: bool = True, **form: Any) -> tuple[Tensor, Tensor]:
    built = [
        longspan.build("sparse-transformer", causal=causal, use="interleaved", layer=n, **form)
        for n in (0, 1)
    ]
    first, second = (b.sees.head(0).mask(length, length) for b in built)
    return first, second


@pytest.mark.parametrize("length", [1, 20, 37])
def test_two_steps_reach_every_earlier_token(length: int) -> None:
    """Strided in either order; fixed with A1 first and then A2 and itself (Sec. 4.2)."""
    whole = torch.ones(length, length, dtype=torch.bool).tril()
    for first, second in (
        masks(length, stride=6),
        masks(length, stride=6)[::-1],
        masks(length, form="fixed", stride=6, summary=1),
    ):
        later = second | torch.eye(length, dtype=torch.bool)
        assert torch.equal((later.int() @ first.int()) > 0, whole)


def test_limits_are_full_attention() -> None:
    whole = torch.ones(20, 20, dtype=torch.bool).tril()
    assert torch.equal(masks(20, stride=20)[0], whole)
    assert torch.equal(masks(20, form="fixed", stride=20)[0], whole)
    assert torch.equal(masks(20, stride=1)[1], whole)


def test_edges_grow_with_the_root() -> None:
    """O(L √L) with l = √L: each key of the union is counted once."""
    for root in (16, 32):
        for form in ({"form": "strided"}, {"form": "fixed", "summary": 4}):
            sees = longspan.build("sparse-transformer", causal=True, stride=root, **form).sees
            pattern = sees.head(0)
            length = root * root
            assert pattern.edges(length, length) == int(pattern.mask(length, length).sum())
            assert pattern.edges(length, length) <= 2.6 * length * root


def test_it_refuses() -> None:
    for arguments in ({"stride": 0}, {"form": "fixed", "stride": 8, "summary": 9}):
        with pytest.raises(LongspanError, match="must be positive and fit"):
            longspan.build("sparse-transformer", **arguments)
