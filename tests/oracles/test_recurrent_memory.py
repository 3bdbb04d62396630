"""Transformer-XL against XLNet's one-directional form, one full pass, and its masks written out."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import XLNetConfig, XLNetModel

from longspan import LongspanError
from longspan.data import Segments
from longspan.engines import segment
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.nn import Block, FeedForward, MultiHead, Remember, detach, reset, state_bytes
from longspan.registry import build

WIDTH, HEADS = 12, 3
SIZES = [[1] * 15, [3] * 5, [7, 7, 1], [15], [4, 1, 10]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomised(module: Any) -> Any:
    """In float64 and evaluation, every parameter large enough to matter."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in module.double().parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 3)
    return module.eval()


def xl(**arguments: Any) -> Any:
    return randomised(build("transformer-xl", width=WIDTH, heads=HEADS, **arguments))


def stack(layers: int, *, order: Any = "post", **arguments: Any) -> Any:
    blocks = (
        Block(
            build("transformer-xl", width=WIDTH, heads=HEADS, **arguments),
            FeedForward(WIDTH, inner=20),
            width=WIDTH,
            order=order,
        )
        for _ in range(layers)
    )
    return randomised(nn.ModuleList(blocks))


def run(blocks: Any, x: Tensor, states: Any = None) -> tuple[Tensor, list]:
    carried = []
    for block, state in zip(blocks, states or [None] * len(blocks), strict=True):
        x, state = block(x, state)
        carried.append(state)
    return x, carried


def in_segments(call: Any, x: Tensor, sizes: list[int]) -> tuple[Tensor, Any]:
    outs, state = [], None
    for piece in x.split(sizes, 1):
        y, state = call(piece, state)
        outs.append(y)
    return torch.cat(outs, 1), state


def written_out(layer: Any, x: Tensor, seen: Tensor, *, clamp: int | None = None) -> Tensor:
    """A_ij = (q_i + u)·k_j + (q_i + v)·r_{i−j} over the keys that `seen` (L × L) allows."""
    mixer = layer.mixer
    position = getattr(mixer.position, "position", mixer.position)
    q, k, v = (mixer.project[n](x).unflatten(-1, (HEADS, -1)) for n in ("q", "k", "v"))
    length = x.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    distance = distance if clamp is None else distance.clamp(max=clamp)
    rate = 10000 ** (-torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    angle = distance[..., None] * rate
    r = position.project(torch.cat([angle.sin(), angle.cos()], -1)).unflatten(-1, (HEADS, -1))
    scores = torch.einsum("bihd,bjhd->bhij", q + position.u, k)
    scores = scores + torch.einsum("bihd,ijhd->bhij", q + position.v, r)
    scores = (scores / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    o = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    return mixer.output(o.flatten(2))


# -- against transformers --------------------------------------------------------------------


def xlnet(layers: int, *, memory: int, clamp: int = -1) -> tuple[Any, Any]:
    """Their model and a stack of ours with its weights."""
    config = XLNetConfig(
        vocab_size=5,
        d_model=WIDTH,
        n_layer=layers,
        n_head=HEADS,
        d_inner=20,
        ff_activation="gelu",
        attn_type="uni",
        bi_data=False,
        clamp_len=clamp,
        mem_len=memory,
        dropout=0.0,
        layer_norm_eps=1e-5,
    )
    theirs = randomised(XLNetModel(config))
    ours = stack(layers, memory=memory, clamp_len=None if clamp < 0 else clamp)
    with torch.no_grad():
        for layer, block in zip(theirs.layer, ours, strict=True):
            attention, mixer = layer.rel_attn, block.mixer.mixer
            for name in ("q", "k", "v"):
                mixer.project[name].weight.copy_(getattr(attention, name).flatten(1).T)
            mixer.output.weight.copy_(attention.o.flatten(1))
            mixer.position.project.weight.copy_(attention.r.flatten(1).T)
            mixer.position.u.copy_(attention.r_w_bias)
            mixer.position.v.copy_(attention.r_r_bias)
            block.mixer_norm.load_state_dict(attention.layer_norm.state_dict())
            block.feed_forward.up.load_state_dict(layer.ff.layer_1.state_dict())
            block.feed_forward.down.load_state_dict(layer.ff.layer_2.state_dict())
            block.feed_forward_norm.load_state_dict(layer.ff.layer_norm.state_dict())
    return theirs, ours


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("memory", "clamp"), [(32, -1), (4, -1), (9, 3)])
def test_is_xlnet_segment_by_segment(memory: int, clamp: int, sizes: list[int]) -> None:
    """Outputs, memories and gradients; their sinusoids are float32, hence 1e−5."""
    theirs, ours = xlnet(3, memory=memory, clamp=clamp)
    x = normal(2, 15, WIDTH)
    mems, states = None, None
    for piece in x.split(sizes, 1):
        piece = piece.requires_grad_()
        out = theirs(inputs_embeds=piece, mems=mems, use_mems=True)
        mems, want = out.mems, out.last_hidden_state
        got, states = run(ours, piece, states)
        assert_close(got, want, atol=1e-5, rtol=1e-5)
        for queue, mem in zip(states, mems, strict=True):
            assert_close(queue.items, mem.transpose(0, 1), atol=1e-5, rtol=1e-5)
        toward = normal(*want.shape, seed=9)
        found, wanted = (torch.autograd.grad(t, piece, toward)[0] for t in (got, want))
        assert_close(found, wanted, atol=1e-4, rtol=1e-4)


# -- identities ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_segments_of_any_length_are_one_pass(sizes: list[int], order: str) -> None:
    """While M covers the past; under pre-norm memory and segment are normalised alike."""
    blocks = stack(3, order=order, memory=15)
    x = normal(2, 15, WIDTH)
    whole, _ = run(blocks, x)
    got, _ = in_segments(lambda piece, states: run(blocks, piece, states), x, sizes)
    assert_close(got, whole)


def test_one_layer_is_its_terms_written_out() -> None:
    """Each segment sees itself, causally, and the last M before it."""
    layer, x = xl(memory=4), normal(2, 15, WIDTH)
    i, j = torch.arange(15)[:, None], torch.arange(15)
    got, _ = in_segments(layer, x, [5, 5, 5])
    seen = (j <= i) & (j >= i // 5 * 5 - 4)
    assert_close(got, written_out(layer, x, seen))


@pytest.mark.parametrize("memory", [1, 3, 6])
@pytest.mark.parametrize("sizes", [[15], [1] * 15, [5, 5, 5], [7, 8]], ids=str)
def test_same_length_gives_every_query_exactly_m_keys(sizes: list[int], memory: int) -> None:
    """Itself and the M − 1 before it: whatever the segments."""
    layer, x = xl(memory=memory, same_length=True), normal(2, 15, WIDTH)
    i, j = torch.arange(15)[:, None], torch.arange(15)
    got, _ = in_segments(layer, x, sizes)
    assert_close(got, written_out(layer, x, (j <= i) & (i - j < memory)))
    for t in range(memory - 1, 15):
        (grad,) = torch.autograd.grad(layer(y := x.clone().requires_grad_())[0][:, t].sum(), y)
        assert int(grad[0].any(-1).sum()) == memory


def test_same_length_follows_the_memory_of_evaluation() -> None:
    layer, x = xl(memory=2, memory_eval=5, same_length=True), normal(2, 15, WIDTH)
    distance = torch.arange(15)[:, None] - torch.arange(15)
    for training, memory in ((True, 2), (False, 5)):
        got, _ = in_segments(layer.train(training), x, [4, 1, 10])
        assert_close(got, written_out(layer, x, (distance >= 0) & (distance < memory)))
    for wrong in ({"memory": 0}, {"memory": 3, "memory_eval": 0}):
        with pytest.raises(LongspanError, match="with same_length"):
            xl(same_length=True, **wrong)


@pytest.mark.parametrize("clamp", [0, 2, 5])
@pytest.mark.parametrize("sizes", [[15], [1] * 15, [4, 4, 7]], ids=str)
def test_clamp_len_counts_far_distances_as_one(sizes: list[int], clamp: int) -> None:
    layer, x = xl(memory=15, clamp_len=clamp), normal(2, 15, WIDTH)
    got, _ = in_segments(layer, x, sizes)
    seen = torch.ones(15, 15, dtype=torch.bool).tril()
    assert_close(got, written_out(layer, x, seen, clamp=clamp))
    assert not torch.allclose(got, written_out(layer, x, seen))


def test_a_stack_reaches_back_layers_times_memory() -> None:
    """One token a segment: layer n's memory holds what layer n − 1 read out of its own."""
    x, layers, memory = normal(1, 12, WIDTH), 3, 2
    blocks = stack(layers, memory=memory)
    changed = x.clone()
    changed[:, 0] += 1
    one, _ = in_segments(lambda p, s: run(blocks, p, s), x, [1] * 12)
    other, _ = in_segments(lambda p, s: run(blocks, p, s), changed, [1] * 12)
    moved = (one != other).any(-1)[0].nonzero()[:, 0].tolist()
    assert moved == list(range(layers * memory + 1))


# -- the memory ------------------------------------------------------------------------------


def test_the_queue_starts_empty_updates_and_is_cut() -> None:
    x = normal(2, 5, WIDTH)
    queue = segment.empty(x)
    assert queue.items.shape == (2, 0, WIDTH)
    everyone = torch.ones(2, 5, dtype=torch.bool)
    queue = segment.push(queue, x[:, :2], everyone[:, :2], capacity=4)
    assert torch.equal(queue.items, x[:, :2])
    queue = segment.push(queue, x[:, 2:], everyone[:, 2:], capacity=4)
    assert torch.equal(queue.items, x[:, 1:])
    queue = segment.push(queue, normal(2, 9, WIDTH, seed=1), torch.ones(2, 9) > 0, capacity=4)
    assert torch.equal(queue.items, normal(2, 9, WIDTH, seed=1)[:, -4:])
    assert segment.push(queue, x, everyone, capacity=0).items.shape[1] == 0


def test_the_memory_holds_the_layers_last_inputs_detached() -> None:
    blocks = stack(2, memory=4, order="pre")
    x = normal(2, 7, WIDTH).requires_grad_()
    middle, _ = blocks[0](x)
    _, (first, second) = run(blocks, x)
    assert torch.equal(first.items, x[:, -4:])  # before its norm
    assert torch.equal(second.items, middle[:, -4:])
    assert state_bytes(first) == 2 * 4 * (WIDTH * 8 + 1)
    _, (later, _) = run(blocks, normal(2, 50, WIDTH), [first, second])
    assert state_bytes(later) == state_bytes(first)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_a_segments_loss_has_no_gradient_in_the_one_before(order: str) -> None:
    """Exactly zero: the graph does not reach it at all."""
    blocks, embed = stack(2, memory=9, order=order), nn.Embedding(20, WIDTH).double()
    first, second = torch.arange(0, 7)[None], torch.arange(10, 17)[None]
    _, states = run(blocks, embed(first))
    y, _ = run(blocks, embed(second), states)
    y.square().sum().backward()
    assert embed.weight.grad is not None
    assert not embed.weight.grad[:10].any()
    assert embed.weight.grad[10:17].any(-1).all()


def test_a_memory_is_detached() -> None:
    """No segment's graph outlives it, and each can be differentiated on its own."""
    blocks, state = stack(2, memory=9), None
    for t in range(3):
        y, state = run(blocks, normal(2, 5, WIDTH, seed=t).requires_grad_(), state)
        assert not any(queue.items.requires_grad for queue in state)
        y.sum().backward()


def test_gradient_flows_into_the_memory_where_asked() -> None:
    attention = build("multi-head-attention", causal=True)
    mixer = MultiHead(attention, width=WIDTH, heads=HEADS)
    layer = randomised(Remember(mixer, memory=5, gradient=True))
    x = normal(2, 5, WIDTH).requires_grad_()
    _, state = layer(x)
    y, _ = layer(normal(2, 3, WIDTH, seed=1), state)
    assert torch.autograd.grad(y.sum(), x)[0].any()
    assert not detach(state).items.requires_grad


def test_memory_differs_in_training_and_evaluation() -> None:
    layer, x = xl(memory=2, memory_eval=6), normal(2, 15, WIDTH)
    assert layer.train()(x)[1].items.shape[1] == 2
    assert layer.eval()(x)[1].items.shape[1] == 6
    short, long = xl(memory=2), xl(memory=6)
    for training, alike in ((True, short), (False, long)):
        got, _ = in_segments(layer.train(training), x, [5] * 3)
        assert_close(got, in_segments(alike, x, [5] * 3)[0])


def test_a_row_is_reset_without_the_others() -> None:
    """As at the start of a document: what is empty takes no weight, as zeros would."""
    layer = xl(memory=6)
    x, more = normal(2, 7, WIDTH), normal(2, 4, WIDTH, seed=1)
    _, state = layer(x)
    kept, cleared = layer(more, state)[0], layer(more, reset(state, torch.tensor([True, False])))[0]
    assert_close(cleared[0], layer(more)[0][0])
    assert_close(cleared[1], kept[1])
    zeros = segment.Queue(torch.zeros_like(state.items), torch.ones_like(state.keep))
    assert not torch.allclose(layer(more, zeros)[0][0], cleared[0])


@pytest.mark.parametrize("memory", [{"memory": 0}, {"memory": 3, "memory_eval": 0}])
def test_no_memory_changes_nothing(memory: dict) -> None:
    layer, x = xl(**memory), normal(2, 6, WIDTH)
    state = layer(x)[1]
    assert state.items.shape[1] == 0
    more = normal(2, 4, WIDTH, seed=1)
    assert_close(layer(more, state)[0], layer(more)[0])


def test_a_padded_memory_is_not_seen() -> None:
    """Whether the padding lies within the memory or within the segment."""
    layer, x = xl(memory=9), normal(1, 9, WIDTH)
    keep = torch.tensor([[True, True, True, True, False, True, True, True, False]])
    padded = x.masked_fill(~keep[..., None], torch.nan)
    state, outs = None, []
    for piece, seen in zip(padded.split(3, 1), keep.split(3, 1), strict=True):
        y, state = layer(piece, state, keep=seen)
        outs.append(y)
    got = torch.cat(outs, 1)
    whole, _ = layer(padded, keep=keep)
    assert_close(got, whole)
    assert not got[~keep].any()


def test_negative_memories_and_contexts_are_refused() -> None:
    with pytest.raises(LongspanError, match="a memory of -1 vectors"):
        xl(memory=-1)
    with pytest.raises(LongspanError, match="a memory of -2 vectors"):
        xl(memory=1, memory_eval=-2)
    layer, x = xl(memory=3), normal(2, 4, WIDTH)
    with pytest.raises(LongspanError, match="no context, no marks"):
        layer(x, context=x)
    with pytest.raises(LongspanError, match="no context, no marks"):
        layer(x, marks=torch.ones(2, 4, dtype=torch.bool))


# -- the wrapper around others ---------------------------------------------------------------


def remembering(id: str, position: str | None, **arguments: Any) -> Any:
    place = None
    if position == "alibi":
        place = build("alibi", heads=HEADS)
    elif position == "rope":
        place = build("rope")
    attention = build(id, causal=True, **arguments)
    mixer = MultiHead(attention, width=WIDTH, heads=HEADS, position=place)
    return randomised(Remember(mixer, memory=15))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("id", "position", "arguments"),
    [
        ("multi-head-attention", None, {}),
        ("multi-head-attention", "rope", {}),
        ("multi-head-attention", "alibi", {}),
        ("multi-head-attention", "rope", {"backend": "tiled"}),
        ("linear-transformer", None, {}),
        ("linear-transformer", "rope", {}),
        ("longformer", None, {"window": 6}),
        ("longformer", "rope", {"window": 6}),
        ("longformer", None, {"window": 6, "dilation": 2}),
    ],
    ids=str,
)
def test_other_causal_attentions_remember(
    id: str, position: str | None, arguments: dict, sizes: list[int]
) -> None:
    """The same inner mixer without a memory, over the whole, is what segments must give."""
    layer, x = remembering(id, position, **arguments), normal(2, 15, WIDTH)
    got, state = in_segments(layer, x, sizes)
    whole, _ = layer.mixer(x)
    assert_close(got, whole)
    assert_close(state.items, x)


@pytest.mark.parametrize("id", ["reformer-lsh", "reformer-lsh-causal"])
def test_an_attention_whose_keys_are_its_queries_cannot_remember(id: str) -> None:
    layer = remembering(id, None, buckets=4)
    with pytest.raises(LongspanError, match="uses its queries as keys and has no cross form"):
        layer(normal(2, 4, WIDTH))


# -- the language model ----------------------------------------------------------------------


def language_model(**arguments: Any) -> Any:
    config = LongspanConfig(
        vocab_size=17,
        width=WIDTH,
        layers=3,
        heads=HEADS,
        inner=20,
        mixers=[{"id": "transformer-xl", **arguments}],
        position=None,
        norm_order="post",
        activation="relu",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LongspanForCausalLM(config).double().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) / 5)
    return model


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_language_model_reads_segments_as_the_whole(sizes: list[int]) -> None:
    model = language_model(memory=15)
    tokens = torch.randint(17, (2, 15), generator=torch.Generator().manual_seed(0))
    whole = model(tokens).logits
    cache: Any = None
    outs = []
    for piece in tokens.split(sizes, 1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        outs.append(output.logits)
    assert_close(torch.cat(outs, 1), whole)
    assert [queue.items.shape[1] for queue in cache.states] == [15] * 3


def test_the_language_model_is_its_blocks_under_a_tied_embedding() -> None:
    model = language_model(memory=15)
    tokens = torch.randint(17, (2, 9), generator=torch.Generator().manual_seed(0))
    x = model.get_input_embeddings()(tokens)
    for block in model.model.layers:
        seen = torch.ones(9, 9, dtype=torch.bool).tril()
        x = block.mixer_norm(x + written_out(block.mixer, x, seen))
        inner = F.relu(block.feed_forward.up(x))
        x = block.feed_forward_norm(x + block.feed_forward.down(inner))
    assert_close(model(tokens).logits, x @ model.get_input_embeddings().weight.T)


def test_streams_continue_from_segment_to_segment() -> None:
    """Row b of segment τ + 1 follows row b of segment τ, so memories belong to what they meet."""
    model, data = language_model(memory=30), (np.arange(64) * 5 % 17).astype(np.uint8)
    segments = Segments(data, batch=2, length=8)
    cache, losses = None, []
    for batch in segments:
        output = model(batch["input_ids"], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        losses.append(output.logits)
    rows = torch.from_numpy(data.astype(np.int64)).view(2, 32)
    assert_close(torch.cat(losses, 1), model(rows).logits)


def test_a_shuffled_stream_is_noticed() -> None:
    """The same segments in another order give other outputs: the order is part of the data."""
    model, data = language_model(memory=30), (np.arange(64) * 5 % 17).astype(np.uint8)
    segments = Segments(data, batch=2, length=8)

    def read(order: list[int]) -> dict[int, Tensor]:
        cache, outs = None, {}
        for t in order:
            output = model(segments[t]["input_ids"], past_key_values=cache, use_cache=True)
            cache, outs[t] = output.past_key_values, output.logits
        return outs

    assert not torch.allclose(read([0, 1, 2, 3])[2], read([0, 3, 1, 2])[2])
