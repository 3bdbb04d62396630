"""Nyströmformer: landmarks, pseudo-inverses, convolution, and transformers' checkpoints."""

from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.testing import assert_close
from transformers import BertConfig, BertModel, NystromformerConfig, NystromformerModel

from longspan import LongspanError
from longspan.convert.nystromformer import nystromformer as convert
from longspan.engines import lowrank
from longspan.models import LongspanConfig, LongspanForMaskedLM
from longspan.registry import build
from longspan.testing.oracles import oracle_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def nystrom(**arguments: Any) -> Any:
    return build("nystromformer", **({"landmarks": 8} | arguments)).double()


def example(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(normal(2, 3, n, 8, seed=i) for i, n in enumerate((queries, keys, keys)))  # pyright: ignore


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 6, 8, 9, 24, 37])
def test_is_the_formula_with_convolution_and_masks(length: int, masked: bool) -> None:
    op = nystrom(kernel=5, heads=3)
    keep = None
    if masked:
        keep = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) > 0.5
        keep[:, 0] = True
    inputs = [t.requires_grad_() for t in example(length, length)]
    oracle = oracle_of("nystromformer")
    assert oracle is not None
    got, want = op(*inputs, keep=keep)[0], oracle(op, *inputs, keep=keep)
    if keep is not None:
        got, want = (t * keep[:, None, :, None] for t in (got, want))
    assert_close(got, want)
    wrt = [*inputs, op.weight]
    assert_close(
        *(torch.autograd.grad(t.square().sum(), wrt, retain_graph=True) for t in (got, want))
    )


def test_segments_are_means_over_kept_tokens() -> None:
    x = normal(2, 3, 23, 4)
    keep = torch.ones(2, 23, dtype=torch.bool)
    keep[0, 3:8] = keep[1, 4:] = False
    means, sizes = lowrank.segment_means(x, 5, keep)
    assert sizes.tolist() == [[4, 4, 4, 3, 3], [1, 1, 1, 1, 0]]
    for got, part in zip(
        means[0].unbind(1), x[0, :, keep[0]].split([4, 4, 4, 3, 3], 1), strict=True
    ):
        assert_close(got, part.mean(1))
    assert_close(means[1, :, :4], x[1, :, :4])
    assert not means[1, :, 4].any()
    everything = torch.ones_like(keep)
    assert_close(lowrank.segment_means(x, 5, everything), lowrank.segment_means(x, 5))


@pytest.mark.parametrize("keys", [3, 8])
def test_few_keys_get_softmax_attention(keys: int) -> None:
    q, k, v = example(30, keys)
    assert_close(nystrom()(q, k, v)[0], softmax(q, k, v))
    q, k, v = example(30, 30)
    keep = torch.zeros(2, 30, dtype=torch.bool)
    keep[:, 5 : 5 + keys], keep[1] = True, True
    got = nystrom()(q, k, v, keep=keep)[0]
    at = slice(5, 5 + keys)
    assert_close(got[:1, :, at], softmax(*(t[:1, :, at] for t in (q, k, v))))
    assert_close(got[1:], nystrom()(q[1:], k[1:], v[1:])[0])


def test_as_many_landmarks_as_tokens_is_exact_by_the_formula() -> None:
    """With m = L, F = A = B and F A⁺ B = A; the iteration finds that A⁺."""
    q, k, _ = example(6, 6)
    weights = (q @ k.mT / 8**0.5).softmax(-1)
    assert_close(weights @ torch.linalg.pinv(weights) @ weights, weights)
    assert_close(lowrank.inverse(weights, 30), torch.linalg.pinv(weights), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 7), (5, 9)])
def test_iteration_converges_to_the_pseudo_inverse(shape: tuple[int, int]) -> None:
    a = (normal(2, 3, *shape) + 4 * torch.eye(*shape)).softmax(-1)
    errors = [
        (lowrank.inverse(a, steps) - torch.linalg.pinv(a)).abs().max().item()
        for steps in (2, 4, 20)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-9
    assert_close(lowrank.inverse(a, 20, together=True), torch.linalg.pinv(a))


def test_starting_scales() -> None:
    """Per matrix, rows are apart; together, as first released, they are not."""
    q, k, v = example(33, 33)
    q = q * torch.tensor([0.1, 3.0]).view(2, 1, 1, 1)
    for inverse, apart in (("iterative", True), ("iterative-together", False), ("exact", True)):
        op = nystrom(inverse=inverse)
        both, alone = op(q, k, v)[0][:1], op(q[:1], k[:1], v[:1])[0]
        assert torch.allclose(both, alone, rtol=1e-9, atol=1e-12) == apart
    many, exact = nystrom(steps=40), nystrom(inverse="exact")
    assert_close(many(q, k, v)[0], exact(q, k, v)[0], rtol=1e-4, atol=1e-4)


def test_rows_of_the_approximation_sum_to_one() -> None:
    q, k, v = example(40, 40)
    op = nystrom(inverse="exact")
    assert_close(op(q, k, torch.ones_like(v))[0], torch.ones_like(v))
    few = nystrom(steps=2)(q, k, torch.ones_like(v))[0]
    assert not torch.allclose(few, torch.ones_like(v), atol=1e-9)


def test_half_precision_inverts_in_float32() -> None:
    q, k, v = (t.to(torch.bfloat16) for t in example(40, 40))
    got = build("nystromformer", landmarks=8)(q, k, v)[0]
    want = nystrom()(*(t.double() for t in (q, k, v)))[0]
    assert got.dtype == torch.bfloat16
    assert_close(got.double(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kernel", [3, 33])
@pytest.mark.parametrize("landmarks", [4, 16])
def test_equals_transformers(kernel: int, landmarks: int) -> None:
    """A whole NystromformerModel at its fixed length, in values; then at any length, padded."""
    torch.manual_seed(0)
    config = NystromformerConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=32,
        max_position_embeddings=32,
        segment_means_seq_len=16,
        num_landmarks=landmarks,
        conv_kernel_size=kernel,
    )
    original = NystromformerModel(config).double().eval()
    ours: Any = convert(original)
    for layer in ours.encoder.layer:
        layer.attention.self.mixer.attention.inverse = "iterative-together"
    tokens = torch.randint(2, 40, (2, 16))
    with torch.no_grad():
        want = original(tokens).last_hidden_state
        assert_close(ours(tokens).last_hidden_state, want)
        free: Any = convert(original)
        assert_close(free(tokens).last_hidden_state, want, rtol=0.2, atol=0.2)
        longer = torch.cat([tokens[:, :13], torch.ones(2, 7, dtype=torch.long)], 1)
        mask = torch.ones(2, 20)
        mask[:, 13:] = 0
        padded = free(longer, attention_mask=mask).last_hidden_state[:, :13]
        assert_close(padded, free(tokens[:, :13]).last_hidden_state)


def test_other_checkpoints_are_refused() -> None:
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=8, vocab_size=10))  # fmt: skip
    with pytest.raises(LongspanError, match="bert"):
        convert(bert)  # pyright: ignore[reportArgumentType]


def test_encoder_trains() -> None:
    mixers: Any = [{"id": "nystromformer", "landmarks": 4, "kernel": 3}]
    config = LongspanConfig(vocab_size=11, width=12, heads=2, layers=2, mixers=mixers)
    model = LongspanForMaskedLM(config)
    tokens = torch.randint(11, (2, 19))
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_refusals() -> None:
    for wrong, said in (
        ({"causal": True}, "no causal form"),
        ({"landmarks": 0}, "landmarks=0"),
        ({"steps": 0}, "steps=0"),
        ({"kernel": 4, "heads": 3}, "odd"),
        ({"kernel": 3}, "heads"),
    ):
        with pytest.raises(LongspanError, match=said):
            nystrom(**wrong)
    with pytest.raises((LongspanError, TypeCheckError)):  # the hook sees the Literal first
        nystrom(inverse="cubic")
    with pytest.raises(LongspanError, match="convolution"):
        nystrom(kernel=3, heads=3)(*example(20, 30))
    with pytest.raises(LongspanError, match="heads=3"):
        nystrom(kernel=3, heads=2)(*example(20, 20))
