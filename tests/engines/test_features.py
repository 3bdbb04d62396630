"""Random directions, feature maps and the quotient of running sums."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from longspan.engines import features, scan
from longspan.errors import LongspanError

KINDS: list[Any] = ["orthogonal", "hadamard", "givens", "iid"]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=gen(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norms", ["chi", "fixed"])
def test_directions(kind: Any, norms: Any) -> None:
    """Orthogonal within each block, of the right norms, reproducible, none like another's."""
    rows = features.directions(20, 8, heads=2, kind=kind, norms=norms, generator=gen())
    assert rows.shape == (2, 20, 8)
    again = features.directions(20, 8, heads=2, kind=kind, norms=norms, generator=gen())
    assert torch.equal(rows, again)
    assert not torch.allclose(rows[0], rows[1])
    if kind != "iid":
        for block in rows.split(8, 1):
            gram = block @ block.mT
            off = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
            assert_close(off, torch.zeros_like(off), atol=1e-5, rtol=0)
    lengths = rows.norm(dim=-1)
    if norms == "fixed":
        assert_close(lengths, torch.full_like(lengths, 8**0.5))
    else:
        many = features.directions(4000, 8, kind=kind, generator=gen(1))
        assert lengths.std() > 0.3
        assert abs(many.square().sum(-1).mean().item() - 8) < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_directions_have_no_preferred_side(kind: Any) -> None:
    """LAPACK's signs would: mean 0 and covariance 1, over many small draws."""
    rows = features.directions(4, 4, heads=6000, kind=kind, generator=gen()).double()
    assert rows.mean(0).abs().max() < 0.06
    flat = rows.flatten(0, 1)
    assert_close(flat.mT @ flat / len(flat), torch.eye(4, dtype=torch.float64), atol=0.05, rtol=0)


def test_directions_refuse() -> None:
    with pytest.raises(LongspanError, match="power of two"):
        features.directions(4, 6, kind="hadamard", generator=gen())
    with pytest.raises(LongspanError, match="redraw_every=0"):
        features.Directions(4, 4, redraw_every=0)


def kernel(phi: Any, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """φ(x)·φ(y) of every draw."""
    (a, s), (b, t) = phi(x, rows), phi(y, rows)
    dots = (a * b).sum(-1)
    return dots if s is None else dots * (s + t).exp()


def moments(phi: Any, kind: Any, count: int = 8, draws: int = 3000) -> tuple[Tensor, Tensor]:
    x, y = normal(1, 1, 8, seed=1) * 0.4, normal(1, 1, 8, seed=2) * 0.4
    rows = features.directions(count, 8, heads=draws, kind=kind, generator=gen()).double()
    found = kernel(phi, x.expand(draws, -1, -1), y.expand(draws, -1, -1), rows)
    truth = (x * y).sum().exp()
    error = (found.mean() - truth) / (found.std() / draws**0.5)
    assert error.abs() < 4, f"the mean is {error:.1f} standard errors away"
    return found.var(), truth


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "phi",
    [features.positive, features.hyperbolic, features.trigonometric],
    ids=lambda f: f.__name__,
)
def test_products_of_features_are_unbiased(phi: Any, kind: Any) -> None:
    """E φ(x)·φ(y) = exp(x·y)."""
    moments(phi, kind)


def test_variances_are_in_the_papers_order() -> None:
    """Orthogonal below iid; hyperbolic at most positive with as many features."""
    for phi in (features.positive, features.trigonometric):
        assert moments(phi, "orthogonal")[0] < moments(phi, "iid")[0]
    assert moments(features.hyperbolic, "iid", 4)[0] <= moments(features.positive, "iid", 8)[0]


def test_phased_features_are_unbiased_too() -> None:
    x, y = normal(1, 1, 8, seed=1) * 0.4, normal(1, 1, 8, seed=2) * 0.4
    rows = features.directions(20000, 8, kind="iid", generator=gen()).double()
    phase = torch.rand(20000, generator=gen(3)).double() * 2 * torch.pi
    found = kernel(lambda t, w: features.phased(t, w, phase), x, y, rows)
    assert_close(found, (x * y).sum().exp().expand_as(found), rtol=0.05, atol=0)


def test_dpfp_by_loops() -> None:
    """roll(r, s)_i = r_{i−s}; at most e·ν non-zeros, as half of r is 0."""
    x = normal(5, 6)
    got = features.dpfp(x, 3)
    assert got.shape == (5, 36)
    for row, f in zip(x, got, strict=True):
        r = [max(float(t), 0) for t in (*row, *(-row))]
        want = [r[i] * r[i - s] for s in (1, 2, 3) for i in range(12)]
        assert_close(f, torch.tensor(want, dtype=torch.float64))
        assert (f > 0).sum() <= 6 * 3


def test_quotients_keep_away_from_zero() -> None:
    o = torch.tensor([[3.0, 2.0], [1.0, 1e-9], [1.0, -1e-9], [0.0, 0.0], [1.0, -4.0]])[None, None]
    got = features.quotient(o, 1e-3)[0, 0, :, 0]
    assert_close(got, torch.tensor([1.5, 1000.0, -1000.0, 0.0, -0.25]))


@pytest.mark.parametrize("phi", [features.positive, features.trigonometric, None])
@pytest.mark.parametrize("causal", [False, True])
def test_pieces_are_the_whole(causal: bool, phi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed piece by piece, in values, gradients and state, masked and gated."""
    monkeypatch.setattr(scan, "CHUNK", 4)
    rows = features.directions(6, 4, generator=gen()).double()

    def of(x: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (x.exp(), None) if phi is None else phi(x, rows)

    q, k, v = (normal(2, 2, 61, 4, seed=i).requires_grad_() for i in range(3))
    weight = normal(2, 2, 61, seed=4).sigmoid().requires_grad_()
    decay = -normal(2, 2, 61, seed=5).square() * 0.1 if causal else None
    keep = torch.rand(2, 61, generator=gen(6)) > 0.3
    wrt = (q, k, v, weight)

    def run() -> Any:
        o, _ = features.attend(
            of, q, k, v, causal=causal, size=6, eps=1e-3, keep=keep, weight=weight, decay=decay
        )
        return o, torch.autograd.grad((o * o).sum(), wrt)

    whole = run()
    monkeypatch.setattr(features, "PIECE", 16)
    assert_close(run(), whole)


def test_no_unit_is_taken_from_later_keys() -> None:
    """A later key 1e3 times as long leaves earlier outputs as they are, bit for bit."""
    rows = features.directions(16, 8, generator=gen())
    q, k, v = (normal(1, 1, 40, 8, seed=i).float() for i in range(3))

    def run(keys: Tensor) -> Tensor:
        phi: Any = lambda x, _: features.positive(x, rows)  # noqa: E731
        return features.attend(phi, q, keys, v, causal=True, size=16, eps=1e-12)[0]

    longer = k.clone()
    longer[:, :, 30:] *= 1e3
    assert torch.equal(run(longer)[:, :, :30], run(k)[:, :, :30])
    assert run(longer).isfinite().all()


def test_drawn_anew_after_some_training_calls_only() -> None:
    rows = features.Directions(8, 4, redraw_every=2)
    first = rows().clone()
    assert torch.equal(rows(), first)
    assert not torch.equal(rows(), first)
    rows.eval()
    kept = rows().clone()
    assert all(torch.equal(rows(), kept) for _ in range(5))
    rows.redraw(seed=0)
    assert torch.equal(rows(), features.Directions(8, 4, seed=0)())


def test_recomputation_draws_nothing() -> None:
    """Under activation checkpointing the second forward pass is not another call."""
    rows = features.Directions(8, 4, redraw_every=1)
    x = normal(3, 4).float().requires_grad_()
    seen: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        seen.append(rows())
        return (x @ seen[-1][0].mT).sin()

    checkpoint(run, x, use_reentrant=False).sum().backward()  # pyright: ignore
    assert torch.equal(seen[0], seen[1])
    assert int(rows.calls) == 1


def test_a_checkpoint_reproduces_the_sequence_of_draws() -> None:
    one, two = (features.Directions(8, 4, seed=s, redraw_every=1) for s in (3, 3))
    for _ in range(3):
        one()
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(), two())
