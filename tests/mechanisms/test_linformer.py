"""Linformer: sharing, kinds of projection, lengths, masks, and the refusal of causality."""

from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError
from longspan.mechanisms.low_rank.linformer import layerwise
from longspan.models import LongspanConfig, LongspanForMaskedLM
from longspan.nn import Block, FeedForward, MultiHead
from longspan.registry import build

KINDS = ["linear", "mean", "max", "convolution"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linformer(**arguments: Any) -> Any:
    return build("linformer", **({"length": 24, "slots": 6} | arguments)).double()


def example(queries: int = 24, keys: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(normal(2, 3, n, 8, seed=i) for i, n in enumerate((queries, keys, keys)))  # pyright: ignore


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


@pytest.mark.parametrize(
    ("sharing", "copies"), [("none", 6), ("headwise", 2), ("key-value", 1), ("layerwise", 1)]
)
def test_sharing_counts_parameters(sharing: str, copies: int) -> None:
    op = linformer(sharing=sharing, heads=3)
    assert sum(p.numel() for p in op.parameters()) == copies * 6 * 24
    e, f = op.keys[0].weight, op.values[0].weight
    assert (e is f) == (sharing in ("key-value", "layerwise"))
    q, k, v = example()
    assert_close(op(q, k, v)[0], softmax(q, e @ k, f @ v))


def test_slots_differ_by_head() -> None:
    op = linformer(sharing="none", heads=3, slots=[2, 5, 9])
    assert sum(p.numel() for p in op.parameters()) == 2 * (2 + 5 + 9) * 24
    q, k, v = example(queries=10)
    for h, (got, e, f) in enumerate(zip(op(q, k, v)[0].unbind(1), op.keys, op.values, strict=True)):
        assert_close(got, softmax(q[:, h], e.weight[0] @ k[:, h], f.weight[0] @ v[:, h]))
    with pytest.raises(LongspanError, match="heads"):
        linformer(sharing="none", heads=2, slots=[2, 5])(q, k, v)


def test_slots_differ_by_layer() -> None:
    mixers: Any = [{"id": "linformer", "slots": m} for m in (8, 4)]
    config = LongspanConfig(vocab_size=11, width=12, heads=2, layers=2, length=16, mixers=mixers)
    model: Any = LongspanForMaskedLM(config)
    assert [layer.mixer.attention.keys[0].slots for layer in model.model.layers] == [8, 4]
    model(torch.randint(11, (2, 16)), labels=torch.randint(11, (2, 16))).loss.backward()


def test_identity_projection_is_softmax_attention() -> None:
    op = linformer(slots=24, sharing="key-value")
    with torch.no_grad():
        op.keys[0].weight.copy_(torch.eye(24))
    q, k, v = example()
    assert_close(op(q, k, v)[0], softmax(q, k, v))


def test_pools_and_convolutions_are_projections() -> None:
    q, k, v = example()
    mean, linear = linformer(kind="mean"), linformer()
    average = torch.eye(6).repeat_interleave(4, 1).double() / 4
    with torch.no_grad():
        for side in (linear.keys[0], linear.values[0]):
            side.weight.copy_(average)
    assert_close(mean(q, k, v), linear(q, k, v))
    convolution = linformer(kind="convolution", head_width=8)
    with torch.no_grad():
        for side in (convolution.keys[0], convolution.values[0]):
            side.weight.copy_(torch.eye(8).repeat(4, 1) / 4)
    assert_close(convolution(q, k, v), mean(q, k, v))
    by_conv1d = linformer(kind="convolution", head_width=8, sharing="none", heads=3)
    kernel = by_conv1d.keys[0].weight.view(3, 4, 8, 8).permute(0, 3, 2, 1)  # out in taps
    slots = [torch.nn.functional.conv1d(k[:, h].mT, kernel[h], stride=4).mT for h in range(3)]
    count = torch.full((2,), 24)
    assert_close(by_conv1d.keys[0](k, count), torch.stack(slots, 1))


def test_max_pool_is_of_keys_and_values_apart() -> None:
    q, k, v = example()
    pooled = (t.unflatten(2, (6, 4)).amax(3) for t in (k, v))
    assert_close(linformer(kind="max")(q, k, v)[0], softmax(q, *pooled))


@pytest.mark.parametrize("sharing", ["none", "headwise", "key-value", "layerwise"])
@pytest.mark.parametrize("kind", KINDS)
def test_short_and_masked_inputs_count_kept_tokens(kind: str, sharing: str) -> None:
    """Masked anywhere, with anything (NaN), equals the kept tokens alone; queries are free."""
    op = linformer(kind=kind, sharing=sharing, heads=3, head_width=8)
    q, k, v = example(queries=9)
    keep = torch.rand(2, 24, generator=torch.Generator().manual_seed(4)) > 0.4
    k, v = (t.masked_fill(~keep[:, None, :, None], torch.nan).requires_grad_() for t in (k, v))
    got, _ = op(q, k, v, keep=keep)
    for b in range(2):
        rows = [t[b : b + 1, :, keep[b]] for t in (k, v)]
        assert_close(got[b : b + 1], op(q[b : b + 1], *rows)[0])
    got.square().sum().backward()
    for t in (k, v):
        assert t.grad is not None
        assert t.grad.isfinite().all()
        assert not t.grad.mT[..., ~keep[0]][0].any()
    for p in op.parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all()


def test_layerwise_is_one_tensor() -> None:
    mixers: Any = [{"id": "linformer", "sharing": "layerwise", "slots": 4}]
    config = LongspanConfig(vocab_size=11, width=12, heads=2, layers=3, length=16, mixers=mixers)
    model: Any = LongspanForMaskedLM(config)
    before = sum(p.numel() for p in model.parameters())
    layerwise(model)
    ours = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if ".keys." in n}
    assert len(ours) == 1
    assert sum(p.numel() for p in model.parameters()) == before - 2 * 4 * 16
    mixers: Any = [{"id": "linformer", "sharing": "layerwise", "slots": m} for m in (4, 2)]
    other = LongspanForMaskedLM(LongspanConfig(layers=2, length=16, mixers=mixers))
    with pytest.raises(LongspanError, match="alike"):
        layerwise(other)
    with pytest.raises(LongspanError, match="no linformer"):
        layerwise(torch.nn.Linear(1, 1))


def test_layers_take_a_given_projection() -> None:
    first = build("linformer", length=16, slots=4, sharing="layerwise")
    second = build("linformer", length=16, slots=4, sharing="layerwise", projection=first.keys[0])
    stack = torch.nn.ModuleList(
        Block(MultiHead(op, width=8, heads=2), FeedForward(8), width=8) for op in (first, second)
    )
    x = normal(2, 11, 8).float()
    for block in stack:
        x, _ = block(x)
    x.sum().backward()
    shared = [n for n, p in stack.named_parameters() if p is first.keys[0].weight]
    assert shared == ["0.mixer.attention.keys.0.weight"]
    assert first.keys[0].weight is second.values[0].weight


def test_refusals() -> None:
    with pytest.raises(LongspanError, match="no causal form"):
        linformer(causal=True)
    with pytest.raises(LongspanError, match="at most 24 keys and got 25: build it with length=25"):
        linformer()(*example(3, 25))
    for wrong in (
        {"slots": 0},
        {"slots": 25},
        {"slots": []},
        {"sharing": "none"},
        {"slots": [2, 3]},
        {"kind": "convolution"},
        {"projection": linformer().keys[0]},
    ):
        with pytest.raises(LongspanError):
            linformer(**wrong)
    for unknown in ({"sharing": "rowwise"}, {"kind": "median"}):
        with pytest.raises((LongspanError, TypeCheckError)):  # the hook sees the Literal first
            linformer(**unknown)
