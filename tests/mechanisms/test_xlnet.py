"""XLNet: both streams against transformers, and what each order lets them know."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers import XLNetConfig, XLNetLMHeadModel

from longspan import LongspanError
from longspan.engines import segment
from longspan.hub import StateCache
from longspan.models.xlnet import (
    XlnetConfig,
    XlnetForLanguageModeling,
    XlnetModel,
    hidden,
    permutation,
)
from longspan.registry import build

WIDTH, HEADS, TOKENS = 12, 3, 17


def randomised(model: Any) -> Any:
    """In float64 and evaluation, every parameter large enough to matter."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.double().parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 3)
    return model.eval()


def model(**arguments: Any) -> Any:
    config = XlnetConfig(
        vocab_size=TOKENS, width=WIDTH, heads=HEADS, layers=2, inner=20, **arguments
    )
    return randomised(XlnetForLanguageModeling(config))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(TOKENS, shape, generator=torch.Generator().manual_seed(seed))


def order(batch: int, length: int, seed: int = 0) -> Tensor:
    """Places of tokens in random full orders."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(length, generator=generator) for _ in range(batch)])


def pair(**arguments: Any) -> tuple[Any, Any]:
    """Theirs and ours, with the same weights."""
    config = XLNetConfig(
        vocab_size=TOKENS,
        d_model=WIDTH,
        n_layer=2,
        n_head=HEADS,
        d_inner=20,
        ff_activation="gelu",
        attn_type=arguments.get("attention", "bi"),
        bi_data=arguments.get("bi_data", False),
        clamp_len=arguments.get("clamp_len", -1),
        mem_len=arguments.get("memory", 0) or None,
        dropout=0.0,
        layer_norm_eps=1e-5,
    )
    theirs, ours = randomised(XLNetLMHeadModel(config)), model(**arguments)
    with torch.no_grad():
        ours.model.embed_tokens.weight.copy_(theirs.transformer.word_embedding.weight)
        ours.model.query.copy_(theirs.transformer.mask_emb[0, 0])
        ours.lm_head.bias.copy_(theirs.lm_loss.bias)
        for layer, block in zip(theirs.transformer.layer, ours.model.layers, strict=True):
            attention, mixer = layer.rel_attn, block.mixer
            for name in "qkvr":
                mixer.project[name].weight.copy_(getattr(attention, name).flatten(1).T)
            mixer.output.weight.copy_(attention.o.flatten(1))
            leans = attention.r_w_bias, attention.r_r_bias, attention.r_s_bias
            mixer.leans.copy_(torch.stack(leans))
            mixer.segments.copy_(attention.seg_embed)
            block.mixer_norm.load_state_dict(attention.layer_norm.state_dict())
            block.feed_forward.up.load_state_dict(layer.ff.layer_1.state_dict())
            block.feed_forward.down.load_state_dict(layer.ff.layer_2.state_dict())
            block.feed_forward_norm.load_state_dict(layer.ff.layer_norm.state_dict())
    positions = theirs.transformer.relative_positional_encoding
    theirs.transformer.relative_positional_encoding = lambda *a, **n: positions(*a, **n).double()
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    return theirs, ours


def near(got: Tensor, want: Tensor) -> None:
    """Their sinusoids are float32."""
    assert_close(got, want, atol=2e-5, rtol=2e-5)


# -- against transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["bi", "uni"])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("more", [{}, {"bi_data": True}, {"clamp_len": 3}, {"memory": 5}], ids=str)
def test_is_transformers_xlnet(attention: str, segments: bool, more: dict) -> None:
    """With segments, padding, memories, both directions of the data and clamped distances."""
    theirs, ours = pair(attention=attention, **more)
    cache, mems = StateCache(), None
    mask = torch.ones(2, 7)
    mask[1, 5:] = 0
    for n in range(3 if "memory" in more else 1):
        ids = tokens(2, 7, seed=n)
        kinds = (torch.arange(7) > 3).long().expand(2, 7) if segments else None
        # Theirs takes no mask in the causal form.
        padded = attention == "bi" and (n == 2 or "memory" not in more)
        keep = mask if padded else torch.ones(2, 7)
        want = theirs(
            ids,
            attention_mask=mask if padded else None,
            token_type_ids=kinds,
            mems=mems,
            use_mems="memory" in more,
        )
        mems = want.mems
        got = ours(
            ids,
            attention_mask=keep,
            token_type_ids=kinds,
            past_key_values=cache,
            use_cache=True,
        ).logits
        near(got[keep.bool()], want.logits[keep.bool()])


@pytest.mark.parametrize("memory", [0, 5])
@pytest.mark.parametrize("bi_data", [False, True])
def test_two_streams_are_transformers(memory: int, bi_data: bool) -> None:
    """Partial prediction: targets by the query stream, and gradients of all weights."""
    theirs, ours = pair(memory=memory, bi_data=bi_data)
    plan = permutation(
        torch.arange(9).expand(2, 9) % 8 == 0, targets=4, generator=torch.Generator()
    )
    mapping = F.one_hot(plan.targets, 9).double()
    cache, mems = StateCache(), None
    for n in range(2):
        ids = tokens(2, 9, seed=n)
        want = theirs(
            ids,
            perm_mask=plan.perm_mask.double(),
            target_mapping=mapping,
            mems=mems,
            use_mems=memory > 0,
        )
        mems = want.mems
        got = ours(
            ids,
            perm_mask=plan.perm_mask,
            targets=plan.targets,
            past_key_values=cache if memory else None,
        ).logits
        near(got, want.logits)
    got.square().sum().backward()
    want.logits.square().sum().backward()
    near(ours.model.query.grad, theirs.transformer.mask_emb.grad[0, 0])
    near(
        ours.model.embed_tokens.weight.grad / 100,
        theirs.transformer.word_embedding.weight.grad / 100,
    )


# -- identities -----------------------------------------------------------------------------------


def leak(perm_mask: Tensor, rank: Tensor, ours: Any) -> None:
    """No target's logits have a gradient in its own or later embeddings, in either stream."""
    length = rank.shape[1]
    x = torch.randn(1, length, WIDTH, dtype=torch.float64).requires_grad_()
    targets = torch.arange(length)[None]
    g = ours(inputs_embeds=x, perm_mask=perm_mask, targets=targets).logits
    h = ours(inputs_embeds=x, perm_mask=perm_mask).logits
    for t in range(length):
        of_g, of_h = (
            torch.autograd.grad(y[0, t].sum(), x, retain_graph=True, allow_unused=True)[0]
            for y in (g, h)
        )
        of_g = torch.zeros_like(x) if of_g is None else of_g
        assert of_g[0].any(-1).tolist() == (rank[0] < rank[0, t]).tolist()
        assert of_h[0].any(-1).tolist() == (rank[0] <= rank[0, t]).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_nothing_leaks_in_random_orders(seed: int) -> None:
    """The content stream sees itself, the query stream must not; exactly, through all layers."""
    rank = order(1, 7, seed)
    leak(hidden(rank), rank, model())


def test_in_the_order_of_the_text_it_is_a_left_to_right_model() -> None:
    rank = torch.arange(7)[None]
    leak(hidden(rank), rank, model())
    bi, uni = model(), model(attention="uni")
    ids, at = tokens(1, 7), torch.arange(7)[None]
    text = bi(ids, perm_mask=hidden(rank), targets=at)
    causal = uni(ids, targets=at)
    assert_close(text.logits, causal.logits)
    want = F.cross_entropy(text.logits[0], ids[0])
    loss = bi(ids, perm_mask=hidden(rank), targets=at, labels=ids).loss
    assert_close(loss, want.float(), check_dtype=False)


def test_without_a_permutation_it_is_a_bidirectional_encoder() -> None:
    """All orders' last token: everything is seen by everything."""
    ours, ids = model(), tokens(2, 7)
    nothing = torch.zeros(2, 7, 7, dtype=torch.bool)
    assert_close(ours(ids, perm_mask=nothing).logits, ours(ids).logits)
    x = ours.model.embed_tokens(ids).detach().requires_grad_()
    y = ours(inputs_embeds=x).logits
    assert torch.autograd.grad(y[:, 0].sum(), x)[0].any(-1).all()


def test_a_target_with_nothing_before_it_knows_nothing() -> None:
    """transformers attends to all that is masked, evenly; here it sees none of it."""
    ours, rank = model(), torch.arange(5)[None]
    at = torch.zeros(1, 1, dtype=torch.long)
    one, other = (
        ours(tokens(1, 5, seed=s), perm_mask=hidden(rank), targets=at).logits for s in (0, 1)
    )
    assert torch.equal(one, other)


def test_the_query_stream_knows_where_but_not_what() -> None:
    ours, ids = model(), tokens(1, 7)
    rank = order(1, 7, 3)
    at = torch.arange(7)[None]
    base = ours(ids, perm_mask=hidden(rank), targets=at).logits
    last = int(rank.argmax())
    changed = ids.clone()
    changed[0, last] = (changed[0, last] + 1) % TOKENS
    assert torch.equal(ours(changed, perm_mask=hidden(rank), targets=at).logits, base)
    assert not torch.allclose(base[0, 1], base[0, 2])


def test_targets_alone_equal_targets_among_all() -> None:
    ours, ids, rank = model(), tokens(2, 7), order(2, 7)
    every = ours(ids, perm_mask=hidden(rank), targets=torch.arange(7).expand(2, 7)).logits
    at = torch.tensor([[3, 1], [6, 0]])
    some = ours(ids, perm_mask=hidden(rank), targets=at).logits
    assert_close(some, every.gather(1, at[..., None].expand(-1, -1, TOKENS)))


def test_segments_are_relative() -> None:
    """Swapping their numbers changes nothing; memory counts as segment 0."""
    ours, ids = model(memory=9), tokens(2, 7)
    kinds = (torch.arange(7) > 3).long().expand(2, 7)
    assert_close(ours(ids, token_type_ids=kinds).logits, ours(ids, token_type_ids=1 - kinds).logits)
    outs = []
    for kind in (kinds, 1 - kinds):
        cache = StateCache()
        ours(tokens(2, 4, seed=1), past_key_values=cache)
        outs.append(ours(ids, token_type_ids=kind, past_key_values=cache).logits)
    assert not torch.allclose(*outs)


# -- the permutation ------------------------------------------------------------------------------


def test_permutations_are_reproducible_and_leave_functional_tokens() -> None:
    functional = torch.zeros(50, 20, dtype=torch.bool)
    functional[:, [0, 7, 19]] = True
    plans = [
        permutation(functional, targets=6, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(plans[0], plans[1], strict=True))
    assert not torch.equal(plans[0].targets, plans[2].targets)
    at = plans[0].targets
    assert not functional.gather(1, at).any()
    assert all(len(row.unique()) == 6 for row in at)
    assert set(at.unique().tolist()) == set(range(20)) - {0, 7, 19}


def test_targets_come_in_spans() -> None:
    functional = torch.zeros(100, 40, dtype=torch.bool)

    def adjacent(span: int) -> float:
        plan = permutation(functional, targets=8, span=span, generator=torch.Generator())
        at = plan.targets.sort().values
        return ((at[:, 1:] - at[:, :-1]) == 1).double().mean().item()

    assert adjacent(5) > adjacent(1) + 0.3


def test_perm_mask_hides_targets_from_the_context_and_from_earlier_ones() -> None:
    """True means cannot see; context sees all context."""
    functional = torch.zeros(3, 12, dtype=torch.bool)
    plan = permutation(functional, targets=5, generator=torch.Generator().manual_seed(0))
    for mask, at in zip(plan.perm_mask, plan.targets.tolist(), strict=True):
        context = [i for i in range(12) if i not in at]
        for i in context:
            assert not mask[i, context].any()
            assert mask[i, at].all()
        for n, i in enumerate(at):
            assert not mask[i, context].any()
            assert not mask[i, at[:n]].any()
            assert mask[i, at[n:]].all()


def test_permutations_of_nothing_are_refused() -> None:
    functional = torch.ones(2, 6, dtype=torch.bool)
    functional[:, :3] = False
    for wrong in (0, 4):
        with pytest.raises(LongspanError, match="as few as 3"):
            permutation(functional, targets=wrong, generator=torch.Generator())


# -- the model ------------------------------------------------------------------------------------


def test_both_streams_share_every_weight_and_all_learn() -> None:
    ours = model().train()
    ids, plan = tokens(4, 9), None
    plan = permutation(torch.zeros(4, 9, dtype=torch.bool), targets=3, generator=torch.Generator())
    kinds = (torch.arange(9) > 3).long().expand(4, 9)
    out = ours(ids, token_type_ids=kinds, labels=ids, **plan._asdict())
    assert out.logits.shape == (4, 3, TOKENS)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in ours.parameters())


def test_it_trains_to_fill_what_it_must() -> None:
    """Rows of one repeated token: any target is told by any other place."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = XlnetConfig(vocab_size=TOKENS, width=WIDTH, heads=HEADS, layers=1)
        ours = XlnetForLanguageModeling(config).train()
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(ours.parameters(), 0.02)
    losses = []
    for _ in range(60):
        ids = torch.randint(TOKENS, (16, 1), generator=generator).expand(16, 6).contiguous()
        plan = permutation(torch.zeros(16, 6, dtype=torch.bool), targets=2, generator=generator)
        loss = ours(ids, labels=ids, **plan._asdict()).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("sizes", [[1] * 9, [4, 4, 1], [3, 6]], ids=str)
def test_uni_streams_segments_and_generates(sizes: list[int]) -> None:
    """As Transformer-XL: a memory that covers the past gives the whole."""
    ours, ids = model(attention="uni", memory=20), tokens(2, 9)
    whole, cache, outs = ours(ids).logits, StateCache(), []
    for piece in ids.split(sizes, 1):
        outs.append(ours(piece, past_key_values=cache).logits)
    assert_close(torch.cat(outs, 1), whole)
    made = ours.generate(ids, max_new_tokens=4, do_sample=False)
    at, want = ids, []
    for _ in range(4):
        want = ours(at).logits[:, -1:].argmax(-1)
        at = torch.cat([at, want], 1)
    assert torch.equal(made, at)


def test_memory_is_detached_and_seen_whatever_the_order() -> None:
    ours, cache = model(memory=4), StateCache()
    x = torch.randn(1, 6, WIDTH, dtype=torch.float64).requires_grad_()
    ours(inputs_embeds=x, past_key_values=cache)
    assert [m.items.shape[1] for m in cache.states] == [4, 4]
    assert not any(m.items.requires_grad for m in cache.states)
    rank, at = order(1, 6), torch.arange(6)[None]
    with_, without = (
        ours(tokens(1, 6), perm_mask=hidden(rank), targets=at, past_key_values=c).logits
        for c in (cache, None)
    )
    assert not torch.isclose(with_, without).all(-1).any()


def test_padding_changes_nothing() -> None:
    ours, ids = model(), tokens(2, 6)
    padded = F.pad(ids, (0, 3))
    mask = F.pad(torch.ones(2, 6), (0, 3))
    assert_close(ours(padded, attention_mask=mask).logits[:, :6], ours(ids).logits)
    left = F.pad(ids, (3, 0))
    mask = F.pad(torch.ones(2, 6), (3, 0))
    assert_close(ours(left, attention_mask=mask).logits[:, 3:], ours(ids).logits)


def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    ours, ids = model(), tokens(2, 6)
    ours.save_pretrained(tmp_path)
    again = XlnetForLanguageModeling.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(again(ids).logits, ours(ids).logits)
    assert isinstance(XlnetModel.from_pretrained(tmp_path), XlnetModel)


def test_what_cannot_work_is_refused() -> None:
    ids = tokens(3, 4)
    with pytest.raises(LongspanError, match="no half"):
        model(bi_data=True)(ids)
    with pytest.raises(LongspanError, match="nothing to learn"):
        model()(ids, labels=ids)
    with pytest.raises(LongspanError, match="not both"):
        model()()
    with pytest.raises(LongspanError, match="attention_mask is"):
        model()(ids, attention_mask=torch.ones(3, 2))
    with pytest.raises(LongspanError, match="memory=-1"):
        model(memory=-1)
    for wrong in ({"width": 10, "heads": 3}, {"width": 12, "heads": 3, "clamp_len": -1}):
        with pytest.raises(LongspanError):
            build("xlnet", **wrong)


def test_a_layer_alone_takes_an_empty_memory() -> None:
    layer = build("xlnet", width=WIDTH, heads=HEADS)
    x = torch.randn(2, 5, WIDTH)
    y, none = layer(x, memory=segment.empty(x), seen=torch.ones(1, 5, 5, dtype=torch.bool))
    assert y.shape == x.shape
    assert none is None
