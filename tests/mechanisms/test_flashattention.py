"""FlashAttention: the choice of backend, tiles, dropout, blocks and their cost, logsumexp."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from longspan import show
from longspan.engines import dense, pattern, tiles
from longspan.errors import LongspanError
from longspan.mechanisms.dense.flashattention import backend, butterfly, tile_sizes
from longspan.registry import build
from longspan.testing import check, counting
from longspan.testing.oracles import oracle_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def example(queries: int, keys: int, value: int = 8) -> list[Tensor]:
    shapes = (2, 3, queries, 8), (2, 3, keys, 8), (2, 3, keys, value)
    return [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def flash(**arguments: Any) -> Any:
    return build("flashattention", **arguments)


def same(got: Tensor, want: Tensor, wrt: list[Tensor]) -> None:
    assert_close(got, want)
    toward = normal(*want.shape, seed=9)
    assert_close(*(torch.autograd.grad(t, wrt, toward, retain_graph=True) for t in (got, want)))


def layout(*shape: int) -> Tensor:
    """Random blocks; the first row sees nothing."""
    found = torch.rand(*shape, generator=torch.Generator().manual_seed(3)) > 0.5
    found[..., 0, :] = False
    return found


@pytest.mark.parametrize("way", ["fused", "tiled"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (9, 21)])
def test_equals_sdpa_in_values_and_gradients(
    queries: int, keys: int, causal: bool, way: str
) -> None:
    """Values of another width; with S > L the last query sees the last key; the math backend."""
    q, k, v = example(queries, keys, 5)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries if causal else keys)
    got, _ = flash(causal=causal, backend=way, scale=0.6)(q, k, v)
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.6)
    same(got, want, [q, k, v])


@pytest.mark.parametrize("way", ["fused", "tiled"])
def test_padding_of_rows_of_several_lengths(way: str) -> None:
    q, k, v = example(9, 21)
    keep = torch.arange(21) < torch.tensor([[4], [17]])
    hidden = k.masked_fill(~keep[:, None, :, None], torch.nan)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None])
    same(flash(backend=way)(q, hidden, v, keep=keep)[0], want, [q, k, v])


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ({}, "fused"),
        ({"causal": True}, "fused"),
        ({"blocks": True}, "fused"),
        ({"queries": 3}, "fused"),
        ({"queries": 3, "blocks": True, "causal": True}, "fused"),
        ({"queries": 3, "blocks": True}, "tiled"),
        ({"bias": True}, "tiled"),
        ({"dropout": 0.1}, "tiled"),
    ],
)
def test_rule_of_the_backend(options: Any, way: str) -> None:
    known = {"causal": False, "blocks": False, "bias": False, "dropout": 0.0} | options
    queries = known.pop("queries", 7)
    assert backend(queries, 7, **known) == way


class Calls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.fused = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fused += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def test_auto_takes_the_fused_kernel_and_falls_back() -> None:
    q, k, v = example(9, 9)
    calls = Calls()
    with calls:
        flash(causal=True)(q, k, v)
        assert calls.fused == 1
        flash(causal=True, backend="tiled")(q, k, v)
        flash(causal=True, dropout=0.5).train()(q, k, v)
        flash()(q, k, v, bias=lambda q, k, i, j: q.new_zeros(1, 3, len(i), len(j)))
        assert calls.fused == 1
        flash(dropout=0.5).eval()(q, k, v)
        assert calls.fused == 2


def test_fused_refuses_what_it_lacks() -> None:
    q, k, v = example(9, 21)
    for op in (flash(backend="fused", dropout=0.5), flash(backend="fused", blocks="butterfly")):
        with pytest.raises(LongspanError, match="backend='auto'"):
            op.train()(q, k, v)


@pytest.mark.parametrize(
    "name", ["no_peeking", "streaming_equals_whole", "padding_changes_nothing"]
)
@pytest.mark.parametrize("way", ["fused", "tiled"])
def test_blocks_keep_the_laws(name: str, way: str) -> None:
    """Blocks count kept tokens, causally and not, whole and token by token."""
    card = show("flashattention")
    tiny = {"backend": way, "blocks": "butterfly", "block": 4}
    verdict = check(name, replace(card, tiny=tiny))
    assert verdict.result == "pass", verdict.reason


@pytest.mark.parametrize("way", ["fused", "tiled"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(), (3,)])
def test_block_sparse_equals_dense_under_the_expanded_mask(
    heads: tuple[int, ...], causal: bool, way: str
) -> None:
    blocks = layout(*heads, 6, 6)
    q, k, v = example(21, 21, 5)
    expanded = blocks.repeat_interleave(4, -1).repeat_interleave(4, -2)[..., :21, :21]
    op = flash(causal=causal, backend=way, blocks=blocks, block=4)
    seen = expanded.tril() if causal else expanded
    want = dense.explicit(q, k, v, seen=seen)[0]
    same(op(q, k, v)[0], want, [q, k, v])
    keep = torch.rand(2, 21, generator=torch.Generator().manual_seed(4)) > 0.3
    formula = oracle_of("flashattention")
    assert formula is not None
    got, want = op(q, k, v, keep=keep)[0], formula(op, q, k, v, keep=keep)
    same(got * keep[:, None, :, None], want * keep[:, None, :, None], [q, k, v])


def test_blocks_across_two_sequences_count_from_the_first_query() -> None:
    blocks = layout(3, 6)
    q, k, v = example(9, 21)
    seen = blocks.repeat_interleave(4, -1).repeat_interleave(4, -2)[:9, :21]
    op = flash(blocks=blocks, block=4)
    same(op(q, k, v)[0], dense.explicit(q, k, v, seen=seen)[0], [q, k, v])
    keep = torch.arange(21) < torch.tensor([[7], [21]])
    want = dense.explicit(q, k, v, seen=seen & keep[:, None, None])[0]
    same(op(q, k, v, keep=keep)[0], want, [q, k, v])


@pytest.mark.parametrize("way", ["fused", "tiled"])
def test_a_block_mask_of_ones_is_dense(way: str) -> None:
    q, k, v = example(21, 21)
    op = flash(blocks=torch.ones(6, 6, dtype=torch.bool), block=4, backend=way)
    same(op(q, k, v)[0], flash()(q, k, v)[0], [q, k, v])


def test_dropout_under_blocks_with_padding() -> None:
    """A hidden token changes nothing for the rest, its weights drawn alike."""
    q, k, v = example(14, 14)
    keep = torch.ones(2, 14, dtype=torch.bool)
    keep[:, :3] = False
    options: Any = {"blocks": "butterfly", "block": 4, "dropout": 0.4}
    padded, alone = (
        flash(**options, generator=torch.Generator().manual_seed(1)).train()(*t, keep=m)[0]
        for t, m in (((q, k, v), keep), ([t[:, :, 3:] for t in (q, k, v)], keep[:, 3:]))
    )
    assert not padded[:, :, :3].any()
    same(padded[:, :, 3:], alone, [q, k, v])


def test_butterfly_is_its_own_digits_and_neighbours() -> None:
    want = torch.tensor([[bin(i ^ j).count("1") <= 1 for j in range(13)] for i in range(13)])
    near = (torch.arange(13)[:, None] - torch.arange(13)).abs() <= 2
    assert torch.equal(butterfly(2).mask(13, 13), want | near)
    assert torch.equal(flash(blocks="butterfly", block=2).sees.head(0).mask(26, 26)[::2, ::2],
                       butterfly().mask(13, 13))  # fmt: skip


@pytest.mark.parametrize("way", ["fused", "tiled"])
def test_cost_follows_the_blocks(way: str) -> None:
    """FLOPs forward and backward are those of the blocks that the butterfly shows."""
    op = flash(blocks="butterfly", block=16, backend=way)
    found = {}
    for length in (128, 512):
        three = [normal(1, 1, length, 8, seed=i).requires_grad_() for i in range(3)]
        flops = counting.flops(lambda t=three: op(*t)[0].sum().backward())
        found[length] = flops / int(butterfly().mask(length // 16, length // 16).sum())
    if way == "tiled":
        assert found[128] == found[512]
    else:  # gathered lists are filled up to the longest
        assert found[512] < 1.25 * found[128]


def test_sizes_of_tiles_follow_the_memory() -> None:
    assert tile_sizes(64, 49152) == (64, 192)
    assert tile_sizes(128, 1000) == (2, 2)


def test_keys_split_between_decoders_merge_by_logsumexp() -> None:
    """Each part of a cache gives (o, logsumexp); together the token's attention to all of it."""
    q, k, v = example(1, 40)
    parts = [tiles.attend(q, a, b) for a, b in zip(k.split(16, 2), v.split(16, 2), strict=True)]
    o, lse = dense.merge(parts)
    same(o, flash(causal=True)(q, k, v)[0], [q, k, v])
    assert_close(lse, (q @ k.mT / 8**0.5).logsumexp(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["fused", "tiled"])
def test_low_precision_comes_out_as_it_went_in(way: str, dtype: torch.dtype) -> None:
    q, k, v = (t.detach() for t in example(9, 300))
    low = [t.to(dtype) for t in (q, k, v)]
    want = flash()(*(t.double() for t in low))[0]
    got = flash(backend=way)(*low)[0]
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert_close(got.double(), want, atol=2 * eps, rtol=2 * eps)


def test_autocast_leaves_tiles_in_float32() -> None:
    three = [t.detach().float() for t in example(9, 21)]
    op = flash(backend="tiled", tile=(4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        inside = op(*three)[0]
    assert_close(inside, op(*three)[0])


@pytest.mark.gpu
def test_equals_the_flash_kernel_on_a_gpu() -> None:
    q, k, v = (normal(2, 3, 200, 64, seed=i).to("cuda", torch.float16) for i in range(3))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    got, _ = flash(causal=True, backend="tiled")(q, k, v)
    assert_close(got, want, atol=2e-3, rtol=2e-3)
    assert_close(
        tiles.attend(q, k, v, shape=pattern.causal, dropout=0.5, seed=1)[0].cpu(),
        tiles.attend(q.cpu(), k.cpu(), v.cpu(), shape=pattern.causal, dropout=0.5, seed=1)[0],
        atol=2e-3,
        rtol=2e-3,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (0, 4)},
        {"block": 0},
        {"dropout": 1.0},
        {"blocks": "random"},
        {"blocks": torch.ones(4, 4)},
        {"blocks": torch.ones(4, dtype=torch.bool)},
    ],
)
def test_impossible_arguments_are_refused(options: Any) -> None:
    with pytest.raises(LongspanError):
        flash(**options)


def test_more_tokens_than_blocks_are_refused() -> None:
    blocks = torch.ones(4, 4, dtype=torch.bool)
    flash(blocks=blocks, block=4)(*example(16, 16))
    for queries, keys in ((17, 17), (3, 17), (17, 3)):
        with pytest.raises(LongspanError, match="larger matrix"):
            flash(blocks=blocks, block=4)(*example(queries, keys))
