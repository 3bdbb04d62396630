"""External attention: double normalisation, shared memories, feature maps, EAMLP."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError
from longspan.mechanisms.low_rank.external_attention import EAMLP, ExternalAttention2d
from longspan.registry import build


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def external(**arguments: Any) -> Any:
    return build("external-attention", **({"width": 12, "slots": 5} | arguments)).double()


def test_double_normalisation() -> None:
    """Columns sum to 1 after the softmax over tokens, rows after the division over slots."""
    scores = normal(2, 3, 9, 5)
    weights = external().weights(scores)
    assert_close(weights.sum(-1), torch.ones(2, 3, 9).double())
    columns = scores.softmax(2)
    assert_close(columns.sum(2), torch.ones(2, 3, 5).double())
    assert_close(weights, columns / (1e-9 + columns.sum(-1, keepdim=True)), rtol=1e-12, atol=0)
    slots_first = scores.softmax(-1)
    assert not torch.allclose(weights, slots_first / slots_first.sum(2, keepdim=True))
    assert_close(external(norm="softmax").weights(scores), slots_first)


@pytest.mark.parametrize("heads", [1, 3])
def test_heads_share_small_memories(heads: int) -> None:
    op = external(heads=heads)
    assert op.keys.shape == op.values.shape == (5, 12 // heads)
    x, outs = normal(2, 9, 12), []
    for f in op.query(x).chunk(heads, -1):
        outs.append(op.weights((f @ op.keys.T)[:, None])[:, 0] @ op.values)
    assert_close(op(x)[0], op.output(torch.cat(outs, -1)))


def test_one_token_gets_the_mean_of_the_memory() -> None:
    op = external()
    assert_close(op(normal(2, 1, 12))[0], op.output(op.values.mean(0)).expand(2, 1, -1))


def test_tokens_are_a_set() -> None:
    op, x = external(heads=3), normal(2, 9, 12)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert_close(op(x[:, order])[0], op(x)[0][:, order])


@pytest.mark.parametrize("norm", ["double", "softmax"])
def test_padding_changes_nothing(norm: str) -> None:
    op, x = external(heads=3, norm=norm), normal(2, 9, 12)
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[1, 4:] = False
    y, _ = op(x.masked_fill(~keep[..., None], torch.nan), keep=keep)
    assert_close(y[1:, :4], op(x[1:, :4])[0])
    assert not y[1, 4:].any()


def test_normalises_in_float32() -> None:
    """Half precision keeps the shares of a long sequence, each about 1 / L."""
    scores = normal(1, 1, 20000, 4)
    got = external().weights(scores.to(torch.bfloat16))
    want = external().weights(scores.to(torch.bfloat16).double())
    assert_close(got.double(), want, rtol=0.01, atol=1e-3)


def test_widens_its_queries() -> None:
    op = external(heads=4, expand=4)
    assert op.query.out_features == 48
    assert op.keys.shape == (5, 12)
    assert op(normal(2, 9, 12))[0].shape == (2, 9, 12)


def test_feature_maps() -> None:
    layer = ExternalAttention2d(width=12, slots=5).double()
    x = normal(2, 12, 3, 4)
    tokens = layer.mixer(x.flatten(2).mT)[0]
    assert_close(layer(x), (x + tokens.mT.view_as(x)).relu())


def test_image_classifier_trains() -> None:
    torch.manual_seed(0)
    model = EAMLP(classes=2, image=8, patch=4, width=16, layers=2, heads=2, slots=4, expand=2)
    images = torch.randn(16, 3, 8, 8)
    labels = (images.mean((1, 2, 3)) > 0).long()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    with pytest.raises(LongspanError, match="patches"):
        model(torch.randn(1, 3, 16, 16))


def test_refusals() -> None:
    for wrong in ({"heads": 5}, {"slots": 0}, {"norm": "l2"}):
        with pytest.raises(LongspanError):
            external(**wrong)
    x = normal(2, 9, 12)
    with pytest.raises(LongspanError, match="one sequence"):
        external()(x, context=x)
    with pytest.raises(LongspanError, match="divisor"):
        EAMLP(classes=2, image=10, patch=4)
