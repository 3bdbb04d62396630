"""YOSO against transformers' expectation mode, explicit collisions, and the paper's claims."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import YosoConfig
from transformers.models.yoso.modeling_yoso import YosoSelfAttention

from longspan import LongspanError, build
from longspan.engines import bucket
from longspan.nn import MultiHead


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(length: int, keys: int | None = None) -> Any:
    sizes = enumerate((length, keys or length, keys or length))
    return [normal(2, 2, n, 8, seed=s).requires_grad_() for s, n in sizes]


def units(q: Tensor, k: Tensor) -> Any:
    return [t / t.norm(dim=-1, keepdim=True) for t in (q, k)]


@pytest.mark.parametrize("window", [None, 3])
def test_the_expectation_is_transformers_yoso(window: int | None) -> None:
    """Values and gradients, with their weights and padding."""
    config = YosoConfig(
        hidden_size=16,
        num_attention_heads=2,
        use_expectation=True,
        hash_code_len=5,
        conv_window=window,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = YosoSelfAttention(config).double().eval()
        op = build("yoso", bits=5, expectation=True, conv=window, heads=2)
        ours: Any = MultiHead(op, width=16, heads=2).double().eval()
    with torch.no_grad():
        for name, linear in zip("qkv", (theirs.query, theirs.key, theirs.value), strict=True):
            ours.project[name].load_state_dict(linear.state_dict())
        ours.output.weight.copy_(torch.eye(16))
        ours.output.bias.zero_()
        if window:
            ours.attention.conv.load_state_dict(theirs.conv.state_dict())
    x, keep = normal(2, 20, 16).requires_grad_(), torch.ones(2, 20, dtype=torch.bool)
    keep[0, 13:] = False
    want = theirs(x, attention_mask=(keep.double() - 1) * 10000)[0]
    if window:  # theirs masks the values of the convolution by the additive mask itself
        keep, want = keep | True, theirs(x, attention_mask=torch.ones(2, 20).double())[0]
    got = ours(x, keep=keep)[0]
    assert_close(got[keep], want[keep], atol=1e-9, rtol=1e-9)
    toward = normal(2, 20, 16, seed=3) * keep[..., None]
    assert_close(
        torch.autograd.grad(got, x, toward)[0],
        torch.autograd.grad(want, x, toward)[0],
        atol=1e-8,
        rtol=1e-8,
    )


def test_the_surrogate_gradient_written_out() -> None:
    (q, k, v), bits = qkv(9, 14), 4
    x, y = units(q, k)
    toward = normal(2, 2, 9, 8, seed=5)
    found = torch.autograd.grad(bucket.expected(x, y, v, bits=bits), (x, y, v), toward)
    w = (1 - (x @ y.mT).acos() / math.pi) ** bits
    slope = (toward @ v.mT) * w * bits / 2
    for got, want in zip(found, (slope @ y, slope.mT @ x, w.mT @ toward), strict=True):
        assert_close(got, want)


def test_the_exact_gradient_is_autograds() -> None:
    q, k, v = qkv(9, 14)
    x, y = (t.detach().requires_grad_() for t in units(q, k))
    toward = normal(2, 2, 9, 8, seed=5)
    got = bucket.expected(x, y, v, bits=4, exact=True)
    want = (1 - (x @ y.mT).acos() / math.pi) ** 4 @ v
    assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got, (x, y, v), toward),
        torch.autograd.grad(want, (x, y, v), toward),
        strict=True,
    ):
        assert_close(a, b)
    same = q.detach().requires_grad_()
    op = build("yoso", expectation=True, exact_gradient=True)
    assert torch.autograd.grad(op(same, same, v[:, :, :9])[0].sum(), same)[0].isfinite().all()


def hashed(q: Tensor, k: Tensor, bits: int, rounds: int, seed: int = 0) -> Any:
    signs = (2,) * bits
    generator = torch.Generator().manual_seed(seed)
    turns = bucket.rotations(2, rounds, 8, signs, generator=generator)
    return [bucket.hash_angles(t, turns, signs) for t in (q, k)]


def test_tables_are_the_collisions_summed() -> None:
    """Forward, and the sampled backward with the same codes."""
    (q, k, v), bits = qkv(17, 30), 3
    x, y = units(q, k)
    f, g = hashed(q, k, bits, 6)
    met = (f[..., :, None] == g[..., None, :]).double().mean(2)
    got = bucket.sampled(x, y, v, f, g, bits)
    assert_close(got, met @ v)
    toward = normal(2, 2, 17, 8, seed=5)
    slope = (toward @ v.mT) * met * bits / 2
    found = torch.autograd.grad(got, (x, y, v), toward)
    for a, b in zip(found, (slope @ y, slope.mT @ x, met.mT @ toward), strict=True):
        assert_close(a, b)


def test_the_workspace_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v), bits = qkv(17, 30), 3
    f, g = hashed(q, k, bits, 2)

    def run() -> Any:
        x, y = units(q, k)
        outs = [bucket.sampled(q, k, v, f, g, bits), bucket.expected(x, y, v, bits=bits)]
        total = outs[0].square().sum() + outs[1].square().sum()
        return *outs, *torch.autograd.grad(total, (q, k, v))

    whole = run()
    monkeypatch.setattr("longspan.engines.pattern.WORKSPACE", 512)
    assert_close(run(), whole)


def test_samples_converge_to_the_expectation() -> None:
    """At rate 1/√m, for outputs before they are normalised."""
    (q, k, v), bits = qkv(20), 3
    x, y = units(q, k)
    want = bucket.expected(x, y, v, bits=bits)
    errors = []
    for rounds in (16, 256, 4096):
        codes = [hashed(q, k, bits, rounds, seed) for seed in range(3)]
        runs = [bucket.sampled(x, y, v, f, g, bits) for f, g in codes]
        errors.append(torch.stack([(o - want).square().mean().sqrt() for o in runs]).mean().item())
    assert errors[1] / errors[0] == pytest.approx(1 / 4, rel=0.25)
    assert errors[2] / errors[1] == pytest.approx(1 / 4, rel=0.25)


def test_no_bits_sum_all_values() -> None:
    q, k, v = qkv(9, 14)
    total = v.sum(2, keepdim=True)
    want = (total / total.norm(dim=-1, keepdim=True)).expand_as(q)
    for expectation in (False, True):
        assert_close(build("yoso", bits=0, expectation=expectation)(q, k, v)[0], want)


def test_outputs_have_unit_length_or_are_zero() -> None:
    q, k, v = qkv(40)
    norms = build("yoso", bits=9, rounds=1)(q, k, v)[0].norm(dim=-1)
    assert ((norms - 1).abs() < 1e-9).logical_or(norms == 0).all()
    assert (norms == 0).any()


def test_hashes_are_fresh_in_training_and_follow_the_seed_in_evaluation() -> None:
    q, k, v = qkv(40)
    op = build("yoso", bits=4, rounds=2, seed=3)
    with torch.random.fork_rng():
        assert not torch.equal(op(q, k, v)[0], op(q, k, v)[0])
    op.eval()
    assert torch.equal(op(q, k, v)[0], op(q, k, v)[0])
    op.rounds = 64
    assert torch.equal(op(q, k, v)[0], build("yoso", bits=4, rounds=64, seed=3).eval()(q, k, v)[0])


def test_codes_use_every_bit() -> None:
    x = normal(1, 1, 4000, 16).float()
    codes = bucket.hash_angles(x, bucket.rotations(1, 1, 16, (2,) * 9), (2,) * 9)
    assert int(codes.max()) == 511
    assert len(codes.unique()) > 400


def test_a_key_mask_in_cross_attention() -> None:
    q, k, v = qkv(9, 14)
    keep = torch.ones(2, 14, dtype=torch.bool)
    keep[:, 10:] = False
    for expectation in (False, True):
        op = build("yoso", bits=3, expectation=expectation).eval()
        assert_close(op(q, k, v, keep=keep)[0], op(q, k[:, :, :10], v[:, :, :10])[0])


def test_what_cannot_be_built_is_refused() -> None:
    for wrong in ({"bits": -1}, {"rounds": 0}, {"exact_gradient": True}, {"conv": 3}):
        with pytest.raises(LongspanError, match="yoso got"):
            build("yoso", **wrong)
    with pytest.raises(LongspanError, match="without conv"):
        build("yoso", conv=3, heads=2).double()(*qkv(9, 14))
