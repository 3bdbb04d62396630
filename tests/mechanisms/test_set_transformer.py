"""Set Transformer: both conventions, symmetries, sets of unequal size, and its model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import longspan
from longspan import LongspanError
from longspan.mechanisms.latent.set_transformer import MAB, PMA, SetTransformer
from longspan.models.latents import SetTransformerConfig, SetTransformerModel

BOTH = pytest.mark.parametrize("convention", ["paper", "code"])


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def test_mab_of_the_paper_equals_torch_s_attention_with_its_weights() -> None:
    torch.manual_seed(0)
    ours, theirs = MAB(width=12, heads=3).double(), nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.double()
    a = ours.attention
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([a.q.weight, a.k.weight, a.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([a.q.bias, a.k.bias, a.v.bias]))
        assert isinstance(a.output, nn.Linear)
        theirs.out_proj.load_state_dict(a.output.state_dict())
    x, y = random(2, 4, 12), random(2, 7, 12, seed=1)
    keep = torch.arange(7) < torch.tensor([[7], [3]])
    h = ours.norms[0](x + theirs(x, y, y, key_padding_mask=~keep, need_weights=False)[0])
    assert_close(ours(x, y, keep=keep), ours.norms[1](h + ours.feed(h).relu()))


def test_the_code_s_convention_divides_by_the_whole_width_and_adds_projected_queries() -> None:
    torch.manual_seed(0)
    block = MAB(width=12, heads=3, convention="code", norm=False).double()
    x, y = random(1, 4, 12), random(1, 7, 12, seed=1)
    q, k, v = block.attention.q(x), block.attention.k(y), block.attention.v(y)
    heads = [
        a + (a @ b.mT / 12**0.5).softmax(-1) @ c
        for a, b, c in zip(q.split(4, 2), k.split(4, 2), v.split(4, 2), strict=True)
    ]
    h = torch.cat(heads, -1)
    assert_close(block(x, y), h + block.feed(h).relu())
    assert not any("output" in n for n in block.state_dict())


@BOTH
@pytest.mark.parametrize("inducing", [None, 4])
def test_blocks_are_equivariant_and_pooling_invariant(convention: Any, inducing: Any) -> None:
    torch.manual_seed(0)
    block = SetTransformer(width=12, heads=3, inducing=inducing, convention=convention).double()
    pool = PMA(width=12, heads=3, outputs=2, convention=convention).double()
    x, order = random(2, 9, 12), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert_close(block(x[:, order])[0], block(x)[0][:, order])
    assert_close(pool(x[:, order]), pool(x))
    assert pool(x).shape == (2, 2, 12)


@BOTH
@pytest.mark.parametrize("inducing", [None, 4])
def test_a_padded_set_is_the_set(convention: Any, inducing: Any) -> None:
    torch.manual_seed(0)
    config = SetTransformerConfig(
        width=12, heads=3, inducing=inducing, outputs=2, convention=convention
    )
    model = SetTransformerModel(config).double()
    x, mask = random(2, 9, 2), torch.ones(2, 9, dtype=torch.long)
    x[0, [1, 5, 8]], mask[0, [1, 5, 8]] = torch.nan, 0
    got = model(x, mask).last_hidden_state
    alone = model(x[:1, mask[0].bool()]).last_hidden_state
    assert_close(got[:1], alone)
    assert_close(got[1:], model(x[1:]).last_hidden_state)
    pool = PMA(width=2, heads=1, convention=convention).double()
    assert_close(pool(x, keep=mask.bool())[:1], pool(x[:1, mask[0].bool()]))


def test_one_set_attends_to_another() -> None:
    torch.manual_seed(0)
    block = SetTransformer(width=12, heads=3, inducing=4).double()
    x, y = random(2, 5, 12), random(2, 8, 12, seed=1)
    assert block.inner is not None
    assert block.points is not None
    want = block.outer(x, block.inner(block.points.expand(2, -1, -1), y))
    assert_close(block(x, context=y)[0], want)


def test_isab_stands_in_a_stack() -> None:
    from longspan.models import LongspanConfig, LongspanForMaskedLM

    mixers = [{"id": "set-transformer", "inducing": 4}]
    model = LongspanForMaskedLM(
        LongspanConfig(width=12, heads=2, layers=2, mixers=mixers, position="sinusoidal-position")
    )
    assert model(torch.arange(8)[None]).logits.shape == (1, 8, 256)


def test_without_norms_it_learns_the_maximum_of_a_set(tmp_path: Path) -> None:
    """The paper's first experiment (Sec. 5.1), by the code's convention, small."""
    torch.manual_seed(0)
    config = SetTransformerConfig(
        input_width=1, width=16, heads=2, layers=1, inducing=4, convention="code",
        layer_norm=False,
    )  # fmt: skip
    model = SetTransformerModel(config)
    assert not any("norm" in n for n, _ in model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(150):
        x = 10 * torch.rand(32, 6, 1, generator=generator)
        loss = (model(x).last_hidden_state[:, 0] - x.amax(1)).abs().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 1
    for name, p in model.named_parameters():
        assert p.grad is not None, name
    model.eval().save_pretrained(tmp_path)
    again = SetTransformerModel.from_pretrained(tmp_path).eval()
    x = torch.rand(1, 5, 1, generator=generator)
    assert_close(again(x).last_hidden_state, model(x).last_hidden_state)


def test_refuses() -> None:
    with pytest.raises(LongspanError, match="at least 1"):
        longspan.build("set-transformer", width=12, inducing=0)
    with pytest.raises(LongspanError, match="do not divide"):
        longspan.build("set-transformer", width=12, heads=5)
    with pytest.raises(LongspanError, match="numbers each"):
        SetTransformerModel(SetTransformerConfig(width=8, heads=2))(torch.zeros(1, 3, 5))
