"""FLASH: both forms against their matrices, options, steps, and models of it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError, build
from longspan.models.flash import FlashConfig, FlashForCausalLM, FlashForMaskedLM
from longspan.nn.state import tensors
from longspan.testing import oracle_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(**arguments: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = build("flash-gau", **({"width": 12, "chunk": 4, "shared": 6} | arguments))
    with torch.no_grad():  # away from the start, where scores are near 0
        built.gamma.normal_(generator=torch.Generator().manual_seed(1)).mul_(2)
        for p in [] if built.bias is None else built.bias.parameters():
            p.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.5)
    return built.double().eval()


def streamed(op: Any, x: Tensor, keep: Tensor | None = None) -> Tensor:
    outs, state, at = [], None, 0
    for size in (1, 1, 1, 1, 1, 3, 9, 1, 1, x.shape[1] - 19):
        mask = None if keep is None else keep[:, at : at + size]
        y, state = op(x[:, at : at + size], state, keep=mask)
        outs.append(y)
        at += size
    return torch.cat(outs, 1)


def quadratic(op: Any, x: Tensor, weigh: Any) -> Tensor:
    """(U ∘ (A V)) W_o with A = weigh(Q Kᵀ, bias, seen)."""
    u, v, z = F.silu(op.up(op.norm(x))).split([op.inner, op.inner, op.shared], -1)
    q, k = (z * g + b for g, b in zip(op.gamma, op.beta, strict=True))
    i = torch.arange(x.shape[1])
    bias = op.bias((i - i[:, None]).flatten()).view(len(i), len(i))
    return op.output(u * (weigh(q @ k.mT, bias, op.causal, i) @ v))


def relu2(scores: Tensor, bias: Tensor, causal: bool, i: Tensor) -> Tensor:
    """Divided by the tokens there are, or causally those so far."""
    count = i[:, None] + 1 if causal else len(i)
    weights = F.relu(scores / count + bias) ** 2
    return weights.tril() if causal else weights


def softmax(scores: Tensor, bias: Tensor, causal: bool, i: Tensor) -> Tensor:
    later = torch.ones(len(i), len(i), dtype=torch.bool).triu(1) & torch.tensor(causal)
    return (scores / 6**0.5 + bias).masked_fill(later, -torch.inf).softmax(-1)


def laplace(scores: Tensor, bias: Tensor, causal: bool, i: Tensor) -> Tensor:
    count = i[:, None] + 1 if causal else len(i)
    normal = torch.distributions.Normal(0.5**0.5, (4 * torch.pi) ** -0.5)
    weights = normal.cdf((scores / count + bias).float()).double()
    return weights.tril() if causal else weights


# -- forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["t5", "rotary"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("activation", [relu2, softmax, laplace])
def test_quadratic_form_is_its_matrix(activation: Any, causal: bool, bias: str) -> None:
    op = unit(form="quadratic", causal=causal, activation=activation.__name__, bias=bias)
    x = normal(2, 23, 12)
    assert_close(op(x)[0], quadratic(op, x, activation), atol=1e-6, rtol=1e-5)


def test_quadratic_form_is_worked_on_in_tiles() -> None:
    from longspan.engines import chunked

    op, x = unit(form="quadratic", causal=True), normal(2, 70, 12)
    want = op(x)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "ELEMENTS", 900)
        assert_close(op(x)[0], want)


@pytest.mark.parametrize("causal", [False, True])
def test_quadratic_form_counts_kept_tokens_and_streams(causal: bool) -> None:
    op, x = unit(form="quadratic", causal=causal), normal(2, 31, 12)
    keep = torch.rand(2, 31, generator=torch.Generator().manual_seed(3)) > 0.3
    got, _ = op(x.masked_fill(~keep[..., None], torch.nan), keep=keep)
    for b in range(2):
        assert_close(got[b, keep[b]], op(x[b : b + 1, keep[b]])[0][0])
    if causal:
        assert_close(streamed(op, x), op(x)[0])
        assert_close(streamed(op, x, keep), got)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 30])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("divide", ["length", "chunk"])
def test_any_length_and_division(length: int, causal: bool, divide: str) -> None:
    op, other = unit(causal=causal), unit(causal=causal, divide=divide, length=40)
    x = normal(2, length, 12)
    oracle: Any = oracle_of("flash-gau")
    assert_close(op(x)[0], oracle(op, x, keep=None))
    by = 4 if divide == "chunk" else 40
    with torch.no_grad():  # the same, with what divides moved into K'
        op.gamma[3] *= (4 if causal else length) / by
    assert_close(other(x)[0], op(x)[0])


@pytest.mark.parametrize("length", [7, 16])
def test_one_chunk_is_the_quadratic_form(length: int) -> None:
    mixed = unit(causal=True, chunk=length)
    whole = unit(causal=True, form="quadratic", length=length)
    weights = mixed.state_dict()
    for name in ("gamma", "beta"):
        weights[name] = weights[name][[0, 2]]
    whole.load_state_dict(weights)
    x = normal(2, length, 12)
    assert_close(mixed(x)[0], whole(x)[0])


def test_linear_part_leaves_out_its_own_chunk() -> None:
    op = unit(causal=True)
    with torch.no_grad():
        op.gamma[0] = op.beta[0] = 0
        op.bias.values.fill_(-1)  # nothing within the chunk
        op.output.bias.zero_()
    y, _ = op(normal(1, 12, 12))
    assert not y[:, :4].any()
    assert y[:, 4:].any(-1).all()


@pytest.mark.parametrize("activation", ["relu2", "softmax", "laplace"])
def test_steps_equal_the_whole(activation: str) -> None:
    op, x = unit(causal=True, activation=activation, position=build("rope")), normal(2, 33, 12)
    assert_close(streamed(op, x), op(x)[0])


def test_state_is_a_chunk_and_a_sum() -> None:
    op = unit(causal=True)
    _, state = op(normal(2, 18, 12))
    assert [t.shape for t in tensors(state)] == [(2, 3, 2 * 6 + 24), (2, 6, 24), (2,)]
    assert state.tokens[:, :2].any()
    assert not state.tokens[:, 2:].any()


def test_padded_tokens_weigh_nothing() -> None:
    """Positive biases alone would give masked keys a weight."""
    op = unit(bias="t5")
    torch.nn.init.ones_(op.bias.values)
    x = normal(1, 6, 12)
    keep = torch.tensor([[True] * 6 + [False] * 5])
    longer = torch.cat([x, torch.full((1, 5, 12), torch.nan)], 1)
    assert_close(op(longer, keep=keep)[0][:, :6], op(x)[0])


# -- options ------------------------------------------------------------------------------------


def test_t5_buckets_are_those_of_transformers() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    apart = torch.arange(-300, 301)
    for causal in (False, True):
        op = unit(causal=causal)
        bucket = T5Attention._relative_position_bucket(apart, bidirectional=not causal)
        got, want = op.bias(apart), op.bias.values[bucket]
        past = apart <= 0 if causal else torch.ones_like(apart, dtype=torch.bool)
        assert torch.equal(got[past], want[past])


def test_rotary_bias_is_a_product_of_turned_vectors() -> None:
    op, rope = unit(bias="rotary"), build("rope", layout="half-split")
    i = torch.arange(9)
    a, c = (rope.rotate(t.expand(1, 1, 9, -1), i)[0, 0] for t in (op.bias.a, op.bias.c))
    assert_close(op.bias((i - i[:, None]).flatten()).view(9, 9), a @ c.T)


def test_positions_rotate_all_views() -> None:
    op, x = unit(causal=True, position=build("rope")), normal(2, 30, 12)
    moved = torch.cat([torch.zeros(2, 3, 12), x], 1)
    keep = torch.arange(33).expand(2, -1) >= 3
    assert_close(op(moved, keep=keep)[0][:, 3:], op(x)[0])
    assert not torch.allclose(op(x)[0], unit(causal=True)(x)[0])


def test_own_norms_replace_the_block_s() -> None:
    x, block = normal(2, 9, 12), torch.nn.LayerNorm(12)
    plain, own = unit(), unit(norm="scale")
    assert plain.take_norm(block) is block
    assert isinstance(own.take_norm(block), torch.nn.Identity)
    scaled = 12**0.5 * x / x.norm(dim=-1, keepdim=True)
    assert_close(own(x)[0], plain(scaled)[0])
    layered = unit(norm="layer")
    assert_close(layered(x)[0], plain(F.layer_norm(x, (12,)))[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"form": "linear"}, {"activation": "relu"}, {"bias": "alibi"}, {"norm": "rms"},
        {"divide": "two"}, {"chunk": 0}, {"shared": 7},
    ],
)  # fmt: skip
def test_refusals(arguments: dict[str, Any]) -> None:
    from jaxtyping import TypeCheckError

    with pytest.raises((LongspanError, TypeCheckError)):
        unit(**arguments)


# -- models -------------------------------------------------------------------------------------


def config(**options: Any) -> FlashConfig:
    mixer = {"id": "flash-gau", "chunk": 4, "shared": 6} | options
    return FlashConfig(vocab_size=13, width=12, heads=2, layers=2, length=32, mixers=[mixer])


@pytest.mark.parametrize("form", ["mixed", "quadratic"])
def test_causal_language_model_of_units_only(form: str) -> None:
    model: Any = FlashForCausalLM(config(form=form, norm="scale")).eval()
    assert all(layer.feed_forward is None for layer in model.model.layers)
    ids = torch.randint(13, (2, 11), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    out = model.generate(ids[:, :5], max_new_tokens=8, do_sample=False)
    slow = ids[:, :5]
    for _ in range(8):
        slow = torch.cat([slow, model(slow, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, slow)


def test_masked_language_model_of_units_only() -> None:
    model: Any = FlashForMaskedLM(config()).eval()
    ids = torch.randint(13, (2, 11), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, 8:] = 0
    short = model(ids[:1, :8]).logits
    assert_close(model(ids, mask).logits[:1, :8], short, atol=1e-5, rtol=1e-4)
