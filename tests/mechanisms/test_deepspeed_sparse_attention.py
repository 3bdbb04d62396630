"""DeepSpeed's layouts by brute force, its masks, and its utilities."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.testing import assert_close
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from longspan import build
from longspan.convert.deepspeed_sparse_attention import (
    pad_to_block_size,
    sparse_attention,
    unpad,
)
from longspan.errors import LongspanError
from longspan.testing import counting
from longspan.testing.oracles.deepspeed import fixed

HEADS = 4


def layout(form: str, blocks: int, *, causal: bool = False, **options: Any) -> Tensor:
    module = build("deepspeed-sparse-attention", causal=causal, sparsity={"form": form, **options})
    return module.layout(HEADS, blocks)


def grid(blocks: int) -> Tensor:
    return torch.zeros(HEADS, blocks, blocks, dtype=torch.bool)


def window(blocks: int, near: int, causal: bool) -> Tensor:
    made = grid(blocks)
    for i in range(blocks):
        made[:, i, max(0, i - near // 2) : (i if causal else i + near // 2) + 1] = True
    return made


CAUSAL = pytest.mark.parametrize("causal", [False, True])


@CAUSAL
@pytest.mark.parametrize(("local", "hubs"), [(4, 1), (4, 2), (6, 2), (3, 1), (1, 1), (4, 4)])
def test_fixed(local: int, hubs: int, causal: bool) -> None:
    """Hubs count from the window's end; a short last window gives its last blocks."""
    for patterns in range(1, local // hubs + 1):
        for horizontal in (False, True)[: 1 if causal else 2]:
            options = {"local": local, "hubs": hubs, "patterns": patterns, "horizontal": horizontal}
            for blocks in range(hubs, 2 * local + 2):
                got = layout("fixed", blocks, causal=causal, **options)
                assert torch.equal(got, fixed(HEADS, blocks, causal, **options))


GROUPS = [([0], None), ([0, 3], None), ([1, 6], [3, 9]), ([], None)]


@CAUSAL
@pytest.mark.parametrize(("hubs", "ends"), GROUPS, ids=str)
@pytest.mark.parametrize("local", [[4], [2, 3], [1, 5, 2]], ids=str)
def test_variable(local: list[int], hubs: list[int], ends: Any, causal: bool) -> None:
    for horizontal in (False, True)[: 1 if causal else 2]:
        for blocks in range(1, 15):
            want, start = grid(blocks), 0
            for size in [*local, *[local[-1]] * blocks]:
                for i in range(start, min(start + size, blocks)):
                    want[:, i, start : i + 1 if causal else start + size] = True
                start += size
            for a, b in zip(hubs, ends or [h + 1 for h in hubs], strict=True):
                want[:, a if causal else 0 :, a:b] = True
                if horizontal:
                    want[:, a:b] = True
            options = {"local": local, "hubs": hubs, "ends": ends, "horizontal": horizontal}
            assert torch.equal(layout("variable", blocks, causal=causal, **options), want)


@CAUSAL
@pytest.mark.parametrize("near", [1, 3, 4, 5])
def test_bslongformer_sliding_and_bigbird(near: int, causal: bool) -> None:
    for blocks in range(1, 13):
        band = window(blocks, near, False)
        for hubs, ends in GROUPS:
            want = band.clone()
            for a, b in zip(hubs, ends or [h + 1 for h in hubs], strict=True):
                want[:, a:b] = True
                want[:, :, a:b] = True
            got = layout("bslongformer", blocks, causal=causal, near=near, hubs=hubs, ends=ends)
            assert torch.equal(got, want.tril() if causal else want)
        for count in (0, 1, 2):
            want = band.clone()
            want[:, :count] = True
            want[:, :, :count] = True
            got = layout("bigbird", blocks, causal=causal, near=near, hubs=count, chance=0)
            assert torch.equal(got, want.tril() if causal else want)
        got = layout("sliding", blocks, causal=causal, near=near)
        assert torch.equal(got, window(blocks, near, causal))


def test_dense_is_all_ones() -> None:
    assert layout("dense", 7).all()


@CAUSAL
@pytest.mark.parametrize(("form", "more"), [("bigbird", {"hubs": 0, "near": 1}), ("variable", {})])
def test_random_blocks(form: str, more: dict[str, Any], causal: bool) -> None:
    """As many as asked for, or as are left; one draw for all heads unless told otherwise."""
    if form == "variable":
        more = {"hubs": [], "local": [1]}
    options = {"causal": causal, "chance": 3, **more}
    plan = layout(form, 20, **options)
    torch.manual_seed(5)
    assert torch.equal(plan, layout(form, 20, **options))
    assert (plan == plan[:1]).all()
    counts = (plan & ~torch.eye(20, dtype=torch.bool)).sum(2)
    assert counts.max() == 3
    assert counts[:, 3:].min() >= 2  # one may be the block itself
    assert not causal or not plan.triu(1).any()
    apart = layout(form, 20, alike=False, **options)
    assert not torch.equal(apart[0], apart[1])
    assert not torch.equal(plan, layout(form, 20, seed=1, **options))


def example(length: int, *, heads: int = HEADS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, length, 8, generator=g, dtype=torch.float64) for _ in range(3))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


FORMS: list[Any] = [
    "dense",
    {"form": "fixed", "hubs": 2, "patterns": 2},
    {"form": "variable", "local": [1, 2], "hubs": [1], "horizontal": True},
    {"form": "bigbird", "chance": 1, "alike": False},
    "bslongformer",
    "sliding",
]
NO_HORIZON = [f if f == "dense" or "horizontal" not in f else "variable" for f in FORMS]


def expanded(module: Any, length: int) -> Tensor:
    """kron of the layout with a block of ones, and element-wise causality."""
    blocks = -(-length // module.block)
    ones = torch.ones(module.block, module.block, dtype=torch.long)
    each = [torch.kron(one.long(), ones) for one in module.layout(HEADS, blocks)]
    seen = torch.stack(each).bool()[:, :length, :length]
    return seen.tril() if module.causal and module.elementwise else seen


def softmax(scores: Tensor, v: Tensor) -> Tensor:
    raised = (scores - scores.detach().amax(-1, keepdim=True).nan_to_num(neginf=0)).exp()
    total = raised.sum(-1, keepdim=True)
    return raised / total.masked_fill(total == 0, 1) @ v


@pytest.mark.parametrize(("causal", "elementwise"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("at", range(len(FORMS)), ids=lambda i: str(FORMS[i]))
def test_blocks_are_the_expanded_layout(at: int, causal: bool, elementwise: bool) -> None:
    """With rpe, key padding and attention masks, each in both modes, and their gradients.

    Rows that see no key give 0; rpe is added after scaling.
    """
    form = (NO_HORIZON if causal else FORMS)[at]
    length, g = 32, torch.Generator().manual_seed(7)
    rpe = torch.randn(1, HEADS, length, length, generator=g, dtype=torch.float64).requires_grad_()
    hidden = torch.rand(length, length, generator=g) < 0.2
    padded = torch.arange(length) < torch.tensor([[32], [3]])
    for modes in (("add", "mul"), ("mul", "add")):
        module = build(
            "deepspeed-sparse-attention",
            causal=causal,
            block=4,
            sparsity=form,
            elementwise=elementwise,
            key_padding_mask_mode=modes[0],
            attn_mask_mode=modes[1],
        )
        q, k, v = example(length)
        masks = [
            shown.double() if mode == "mul" else (~shown).double() * -1e4
            for shown, mode in zip((padded, ~hidden), modes, strict=True)
        ]
        got, _ = module(q, k, v, rpe=rpe, key_padding_mask=masks[0], attn_mask=masks[1])
        added = [
            torch.where(m == 0, -torch.inf, 0.0) if mode == "mul" else m
            for m, mode in zip(masks, modes, strict=True)
        ]
        scores = q @ k.mT / 8**0.5 + rpe + added[0][:, None, None] + added[1]
        want = softmax(scores.masked_fill(~expanded(module, length), -torch.inf), v)
        assert_close(got, want)
        inputs = (q, k, v, rpe)
        found = torch.autograd.grad(got.square().sum(), inputs)
        assert_close(found, torch.autograd.grad(want.square().sum(), inputs))
        bare, _ = module(q, k, v)
        plain = (q @ k.mT / 8**0.5).masked_fill(~expanded(module, length), -torch.inf)
        assert_close(bare, softmax(plain, v))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_under_the_same_layout() -> None:
    module = build("deepspeed-sparse-attention", sparsity={"form": "fixed", "patterns": 2})
    seen = expanded(module, 128)
    q, k, v = (t.detach().float() for t in example(128))
    blocks = create_block_mask(lambda b, h, i, j: seen[h, i, j], None, HEADS, 128, 128, "cpu")
    want = flex_attention(q, k, v, block_mask=blocks)
    assert_close(module(q, k, v)[0], want, atol=1e-5, rtol=1e-5)


def test_masks_reach_over_the_state() -> None:
    module = build("deepspeed-sparse-attention", causal=True, block=4, attn_mask_mode="add")
    q, k, v = example(21)
    rpe = example(21, seed=3)[0] @ example(21, seed=4)[1].mT
    whole, _ = module(q, k, v, rpe=rpe)
    state, outs = None, []
    for a, b in ((0, 5), (5, 6), (6, 21)):
        piece = (t[:, :, a:b] for t in (q, k, v))
        o, state = module(*piece, state, rpe=rpe[:, :, a:b, :b])
        outs.append(o)
    assert_close(torch.cat(outs, 2), whole)


def test_the_cost_follows_the_blocks() -> None:
    """A window costs as many FLOPs a token whatever the length, a dense layout as the square."""

    def flops(sparsity: str, length: int, biased: bool) -> int:
        module = build("deepspeed-sparse-attention", sparsity=sparsity)
        q, k, v = (t.float() for t in example(length))
        rpe = torch.zeros(1, 1, length, length) if biased else None

        def run() -> None:
            module(q, k, v, rpe=rpe)[0].sum().backward()

        return counting.count(run).flops

    for biased in (False, True):
        assert flops("sliding", 1024, biased) < 2.3 * flops("sliding", 512, biased)
        assert flops("sliding", 1024, biased) < 0.25 * flops("dense", 1024, biased)


SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 40,
}


def encoder(kind: str) -> Any:
    torch.manual_seed(0)
    config: Any = BertConfig(**SMALL) if kind == "bert" else RobertaConfig(**SMALL, pad_token_id=1)
    return (BertModel if kind == "bert" else RobertaModel)(config).eval()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_modules_are_swapped_and_positions_extended(kind: str) -> None:
    model = encoder(kind)
    ids = torch.randint(2, 50, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(30) < torch.tensor([[30], [17]])).long()
    want = model(ids, mask).last_hidden_state * mask[..., None]
    same = sparse_attention(model, sparsity="dense")
    got = same(ids, mask).last_hidden_state * mask[..., None]
    assert_close(got, want, atol=1e-5, rtol=1e-5)
    long = sparse_attention(model, sparsity="sliding", block=4, length=90)
    first = 2 if kind == "roberta" else 0
    table, old = (m.embeddings.position_embeddings.weight for m in (long, model))
    known = len(old) - first
    assert long.config.max_position_embeddings == len(table) == 90 + first
    assert_close(table[first : first + 2 * known], old[first:].repeat(2, 1))
    wide = torch.randint(2, 50, (1, 90), generator=torch.Generator().manual_seed(0))
    out = long(wide).last_hidden_state
    out.sum().backward()
    assert out.isfinite().all()
    assert long.encoder.layer[0].attention.self.mixer.project["q"].weight.grad.any()


def test_padding_to_whole_blocks_changes_nothing() -> None:
    model = sparse_attention(encoder("bert"), sparsity="bslongformer", block=8)
    ids = torch.randint(2, 50, (2, 21), generator=torch.Generator().manual_seed(0))
    padded, added = pad_to_block_size({"input_ids": ids}, block=8, pad_token_id=0)
    assert added == 3
    assert padded["attention_mask"].sum(1).tolist() == [21, 21]
    got = unpad(model(**padded).last_hidden_state, added)
    assert_close(got, model(ids).last_hidden_state, atol=1e-5, rtol=1e-5)
    whole, none = pad_to_block_size(
        {"inputs_embeds": torch.ones(2, 16, 3)}, block=8, pad_token_id=0
    )
    assert none == 0
    assert unpad(whole["inputs_embeds"], none).shape == (2, 16, 3)
    more, _ = pad_to_block_size({"inputs_embeds": torch.ones(2, 15, 3)}, block=8, pad_token_id=0)
    assert more["inputs_embeds"].shape == (2, 16, 3)


def test_refusals() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"sparsity": "fixd"}, "no layout 'fixd'"),
        ({"sparsity": {"form": "sliding", "nearr": 3}}, "no option 'nearr'"),
        ({"sparsity": {"form": "fixed", "hubs": 3}}, "hubs must divide local"),
        ({"sparsity": {"form": "fixed", "horizontal": True}, "causal": True}, "no horizontal"),
        ({"sparsity": {"form": "variable", "local": []}}, "at least one block"),
        ({"sparsity": {"form": "bslongformer", "hubs": [3], "ends": [2]}}, "beyond its start"),
        ({"block": 0}, "at least one token"),
    ]
    for arguments, message in wrong:
        with pytest.raises(LongspanError, match=message):
            build("deepspeed-sparse-attention", **arguments)
    with pytest.raises(LongspanError, match="nothing to pad"):
        pad_to_block_size({}, block=8, pad_token_id=0)
    with pytest.raises(LongspanError, match="encoders and got a bert decoder"):
        sparse_attention(BertModel(BertConfig(**SMALL, is_decoder=True)))
