"""Adaptive spans, fixed and by token: the paper's own claims (Sukhbaatar et al., 2019)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import LongspanError, build
from longspan.engines import span as engine
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.nn.auxiliary import collect
from longspan.testing import counting
from longspan.testing.oracles.adaptive_span import spanned

H, D = 3, 8


def static(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes: Any = {"heads": H, "head_width": D, "span": 256, "ramp": 8.0}
    return build("adaptive-attention-span", **(sizes | changes)).double().eval()


def dynamic(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes: Any = {"width": H * D, "heads": H, "span": 256, "ramp": 8.0}
    built = build("dynamic-attention-span", **(sizes | changes)).double().eval()
    torch.nn.init.normal_(built.project["query_span"].weight, std=0.5)
    return built


def qkv(length: int, seed: int = 1, heads: int = H) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, heads, length, D, generator=generator, dtype=torch.float64) for _ in range(3)
    ]


def test_whole_spans_are_a_plain_window_of_exactly_s_past_keys():
    q, k, v = qkv(90)
    window = static(span=32, start=1.0, relative=False)
    far = torch.arange(90)[:, None] - torch.arange(90)
    scores = (q @ k.mT / D**0.5).masked_fill((far < 1) | (far > 32), -torch.inf)
    want = scores.softmax(-1).nan_to_num(0) @ v
    torch.testing.assert_close(window(q, k, v)[0], want)
    assert not window(q, k, v)[0][:, :, 0].any()  # nothing lies before the first


def test_counting_itself_the_window_is_that_of_softmax_attention():
    q, k, v = qkv(50)
    whole = static(span=50, start=1.0, relative=False, itself=True)
    want, _ = build("multi-head-attention", causal=True)(q, k, v)
    torch.testing.assert_close(whole(q, k, v)[0], want)


@pytest.mark.parametrize("start", [0.0, 0.2, 0.6])
def test_trimmed_equals_untrimmed(start, monkeypatch):
    one, given = static(start=start), [t.requires_grad_() for t in qkv(300)]
    wanted = [*given, one.ratio, one.table]

    def outcome() -> list[Tensor]:
        o, _ = one(*given)
        return [o.detach(), *torch.autograd.grad(o.square().sum(), wanted)]

    trimmed = outcome()
    monkeypatch.setattr(engine, "reach", lambda span, ramp, *, near, most: most)
    for a, b in zip(trimmed, outcome(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_short_spans_save_compute():
    """FLOPs follow the longest span in use, in whole 64s, forward and backward."""
    q, k, v = [t.float().requires_grad_() for t in qkv(2048)]

    def spent(start: float) -> int:
        one = static(span=1024, start=start, ramp=32.0).float()
        return counting.flops(lambda: one(q, k, v)[0].sum().backward())

    least, some, most = (spent(start) for start in (0.0, 0.25, 1.0))
    assert least < 0.15 * most
    assert some < 0.4 * most


def test_short_spans_save_state():
    q, k, v = qkv(600)
    sizes = [static(span=512, start=start)(q, k, v)[1].k.shape[2] for start in (0.0, 0.3, 1.0)]
    assert sizes == [64, 192, 512]
    training = static(span=512, start=0.0).train()
    assert training(q, k, v)[1].k.shape[2] == 128  # 64 more, for spans may grow


def test_one_long_head_does_not_widen_the_others_weights():
    one, (q, k, v) = static(span=128, ramp=4.0, relative=False), qkv(100)
    one.ratio.data = torch.tensor([0.0, 0.5, 1.0]).double()
    k[:, 0, :90] += 100.0
    far = qkv(100, seed=5)[2]
    v2 = torch.cat([far[:, :, :60], v[:, :, 60:]], 2)
    same = (one(q, k, v)[0] == one(q, k, v2)[0])[:, :, 70:].flatten(2).all(-1).all(0)
    assert same.tolist() == [True, False, False]


def test_the_ramp_reaches_beyond_the_span():
    m = engine.mask(torch.arange(12.0), torch.tensor(4.0), 4.0)
    assert m.tolist() == [1.0] * 5 + [0.75, 0.5, 0.25] + [0.0] * 4
    assert engine.reach(4.0, 4.0, near=1, most=512) == 64
    assert engine.reach(62.0, 4.0, near=1, most=512) == 128
    assert engine.reach(900.0, 32.0, near=1, most=512) == 512


def test_gradient_of_the_span_by_finite_differences():
    q, k, v = (t[:, :, :40, :] for t in qkv(40))
    one = static(span=64, ramp=8.0)

    def run(ratio: Tensor, table: Tensor) -> Tensor:
        z = (64 * ratio)[:, None]
        return engine.attend(q, k, v, z, table=table, ramp=8.0, most=64)[0]

    ratio = torch.tensor([0.0512, 0.2031, 0.4047], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (ratio, one.table.detach()), atol=1e-6)


@pytest.mark.parametrize("each", ["head", "layer"])
def test_the_loss_is_the_mean_span(each):
    one, given = static(cost=0.5, start=0.25, each=each).train(), qkv(20)
    one(*given)
    value = collect(one)["span"]
    torch.testing.assert_close(value, torch.tensor(0.5 * 64.0).double())
    (gradient,) = torch.autograd.grad(value, one.ratio)
    count = len(one.ratio)
    torch.testing.assert_close(gradient, torch.full((count,), 0.5 * 256 / count).double())
    assert count == (H if each == "head" else 1)


def test_ratios_are_clamped_after_an_update_and_before_use():
    one, given = static(start=0.0).train(), qkv(20)
    optimiser = torch.optim.SGD([one.ratio], lr=1e6, momentum=0.9)
    (one(*given)[0].sum() + sum(collect(one).values())).backward()
    one.ratio.grad.fill_(1.0)
    optimiser.step()
    assert one.ratio.max() < 0
    one(*given)
    assert (one.ratio == 0).all()
    one.ratio.data.fill_(7.0)
    one.clamp()
    assert (one.ratio == 1).all()
    (gradient,) = torch.autograd.grad(one(*given)[0].sum(), one.ratio)
    assert gradient.isfinite().all()


def test_reports_spans_and_what_they_cost():
    one = static(span=1024, ramp=32.0)
    one.ratio.data = torch.tensor([0.0, 0.1, 0.2]).double()
    used = one.usage()
    assert used.mean == pytest.approx(102.4)
    assert used.largest == pytest.approx(204.8)
    assert used.keys == 256  # 204.8 + 32, in 64s
    given = [t.requires_grad_(False) for t in qkv(1024)]
    spent = counting.flops(lambda: one(*given))
    # Blocks of 64 queries meet 63 keys more than one query does.
    assert 2 * 1024 * used.flops <= spent <= 2 * 1024 * used.flops * (256 + 64) / 256


def test_serves_any_attention_as_gate_or_bias():
    """As a gate the weights lose mass, which a column of ones gives back; as a bias they do not."""
    q, k, v = qkv(70)
    one = static(span=48, start=0.3, relative=False, itself=True)
    want, _ = one(q, k, v)
    plain = build("multi-head-attention", causal=True, backend="explicit")
    torch.testing.assert_close(plain(q, k, v, bias=one.bias)[0], want)
    gated = build("multi-head-attention", causal=True, backend="explicit", gate=one.mask)
    o, _ = gated(q, k, torch.cat([v, torch.ones_like(v[..., :1])], -1))
    assert (o[..., -1] < 0.999).any()
    torch.testing.assert_close(o[..., :-1] / o[..., -1:], want)


def test_dropout_is_of_weights_and_the_same_backward():
    one = static(dropout=0.5, start=0.5).train()
    q, k, v = qkv(150)
    v = torch.ones_like(v).requires_grad_()
    torch.manual_seed(3)
    o, _ = one(q, k, v)
    assert o[:, :, 100:].mean().item() == pytest.approx(1.0, abs=0.05)
    (gradient,) = torch.autograd.grad(o.sum(), v)
    torch.testing.assert_close(gradient.sum(), o.sum())  # Σ_ij a_ij, if the same a


# By token.


def test_without_input_a_dynamic_span_is_the_static_one():
    """v = 0 and S σ(b) = z: the same values, and gradients of b as of z."""
    moving, x = dynamic(), torch.randn(2, 90, H * D, dtype=torch.float64)
    asked = moving.project["query_span"]
    torch.nn.init.zeros_(asked.weight)
    asked.bias.data = torch.tensor([-3.0, -2.0, -1.0]).double()
    fixed = static()
    share = asked.bias.detach().sigmoid()
    fixed.ratio.data, fixed.table = share, moving.attention.table

    def heads(name: str) -> Tensor:
        return moving.project[name](x).unflatten(-1, (H, D)).transpose(1, 2)

    o, _ = fixed(heads("q"), heads("k"), heads("v"))
    want = moving.output(o.transpose(1, 2).flatten(2))
    got, _ = moving(x)
    torch.testing.assert_close(got, want)
    (of_bias,) = torch.autograd.grad(got.square().sum(), asked.bias)
    (of_ratio,) = torch.autograd.grad(want.square().sum(), fixed.ratio)
    torch.testing.assert_close(of_bias, of_ratio * share * (1 - share))


def test_spans_by_query_have_gradients_and_are_traced():
    one, x = dynamic(start=-2.0), torch.randn(2, 40, H * D, dtype=torch.float64)
    trace = one.spans(x)
    assert trace.shape == (2, H, 40)
    asked = one.project["query_span"]
    want = 256 * (x @ asked.weight.T + asked.bias).sigmoid().transpose(1, 2)
    torch.testing.assert_close(trace, want)
    one(x)[0].square().sum().backward()
    assert asked.weight.grad.abs().min() > 0
    assert asked.bias.grad.abs().min() > 0


def test_blocks_are_trimmed_each_on_its_own():
    """One far-seeing token widens its own block of 64 and no other."""
    q, k, v = [t.float() for t in qkv(1024)]
    z = torch.zeros(2, H, 1024)

    def spent() -> int:
        return counting.flops(lambda: engine.attend(q, k, v, z, ramp=8.0, most=512))

    least = spent()
    z[0, 1, 700] = 500.0
    one = spent()
    z[:] = 500.0
    most = spent()
    assert one - least == pytest.approx((most - least) / 16, rel=1e-6)
    want = spanned(q, k, v, z := z * torch.rand(z.shape), None, None, R=8.0, S=512, first=1)
    torch.testing.assert_close(engine.attend(q, k, v, z, ramp=8.0, most=512)[0], want)


def test_the_dynamic_loss_leaves_padding_out():
    one, x = dynamic(cost=1.0, start=-1.0).train(), torch.randn(2, 20, H * D, dtype=torch.float64)
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[1, 12:] = False
    one(x, keep=keep)
    spans = one.spans(x)
    want = torch.cat([spans[0].flatten(), spans[1, :, :12].flatten()]).mean()
    torch.testing.assert_close(collect(one)["span"], want)


@pytest.mark.parametrize("id", ["adaptive-attention-span", "dynamic-attention-span"])
def test_streams_through_gaps_in_the_padding(id):
    """Distances count kept tokens across calls, wherever the padding stands."""
    torch.manual_seed(0)
    config = LongspanConfig(
        vocab_size=32,
        width=24,
        heads=3,
        layers=2,
        position=None,
        mixers=[{"id": id, "span": 16, "ramp": 4.0, "start": 0.3}],
    )
    model = LongspanForCausalLM(config).eval()
    model.get_input_embeddings().weight.data.mul_(20)
    x = torch.randint(1, 32, (2, 30))
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, 9:14] = 0
    mask[1, :3] = mask[1, 20:22] = 0
    cache, outs = None, []
    for at in torch.arange(30).split([12, 1, 7, 10]):
        out = model(x[:, at], mask[:, : int(at[-1]) + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        outs.append(out.logits)
    got = torch.cat(outs, 1)
    for row in range(2):
        some = mask[row].bool()
        want = model(x[row : row + 1, some]).logits[0]
        torch.testing.assert_close(got[row, some], want, rtol=1e-4, atol=1e-5)


def test_a_model_reports_the_span_loss():
    config = LongspanConfig(
        vocab_size=32,
        width=24,
        heads=3,
        layers=2,
        position=None,
        mixers=[{"id": "adaptive-attention-span", "span": 64, "start": 0.5, "cost": 0.01}],
    )
    model, x = LongspanForCausalLM(config).train(), torch.randint(1, 32, (2, 30))
    out = model(x, labels=x)
    torch.testing.assert_close(out.auxiliary["span"], torch.tensor(2 * 0.01 * 32))


@pytest.mark.parametrize(
    "wrong", [{"span": 0}, {"ramp": 0.5}, {"start": 1.5}, {"causal": False}], ids=str
)
def test_refuses(wrong):
    with pytest.raises(LongspanError):
        static(**wrong)
    if "start" not in wrong and "causal" not in wrong:
        with pytest.raises(LongspanError):
            dynamic(**wrong)
