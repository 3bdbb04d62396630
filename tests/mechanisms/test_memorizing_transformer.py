"""Memorizing Transformer: what is stored, what is found, how it joins local attention."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError
from longspan.engines import nearest
from longspan.mechanisms.retrieval.memorizing_transformer import Indexed
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.nn import MultiHead, load_state, reset, save_state, tensors
from longspan.registry import build

WIDTH, HEADS, D = 12, 3, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(**arguments: Any) -> Any:
    """In float64 and evaluation, every parameter large enough to matter."""
    arguments = {"window": 5, "segment": 4, "memory": 12, "top": 3} | arguments
    module = build("memorizing-transformer", width=WIDTH, heads=HEADS, **arguments).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
    return module.eval()


def parts(module: Any, x: Tensor) -> list[Tensor]:
    """q, k, v: B H L D, q and k of length 1."""
    q, k, v = (module.mixer.project[n](x).unflatten(-1, (HEADS, D)).transpose(1, 2) for n in "qkv")
    return [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v]


def outputs(module: Any, o: Tensor) -> Tensor:
    return module.mixer.output(o.transpose(1, 2).flatten(2))


def in_pieces(module: Any, x: Tensor, sizes: Any) -> tuple[Tensor, Any]:
    outs, state = [], None
    for piece in x.split(sizes, 1):
        y, state = module(piece, state)
        outs.append(y)
    return torch.cat(outs, 1), state


# -- the store --------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [3, 4, 10, 100])
def test_the_store_is_a_list_of_segments_with_resets(memory: int) -> None:
    """Against Python lists over eight segments; a row is reset before the fifth."""
    module, state = layer(memory=memory), None
    held: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for n in range(8):
        if n == 4:
            state = reset(state, torch.tensor([False, True]))
            held[1] = []
        x = normal(2, 4, WIDTH, seed=n)
        _, state = module(x, state)
        _, k, v = parts(module, x)
        for b in range(2):
            held[b] = [*held[b], *((k[b, :, t], v[b, :, t]) for t in range(4))][-memory:]
            store = state.memory.store
            real = store.keep[b]
            assert int(real.sum()) == len(held[b])
            assert_close(store.k[b][:, real], torch.stack([k for k, _ in held[b]], 1))
            assert_close(store.v[b][:, real], torch.stack([v for _, v in held[b]], 1))


def test_stored_tensors_have_no_gradient() -> None:
    module = layer().train()
    x = normal(2, 8, WIDTH).requires_grad_()
    _, state = module(x)
    assert not any(t.requires_grad for t in tensors(state.memory))
    y, _ = module(normal(2, 4, WIDTH, seed=1), state)
    (found,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
    assert found is None or not found.any()


def test_gradient_reaches_queries_gate_and_scale_through_what_was_found() -> None:
    module, x = layer(window=1, cache=0), normal(1, 8, WIDTH).requires_grad_()
    o = module(x)[0][:, 4:].square().sum()
    found = torch.autograd.grad(
        o, [x, module.gate, module.scale, module.mixer.project["q"].weight], retain_graph=True
    )
    assert all(g.any() for g in found)
    assert not found[0][:, :4].any()


def test_a_state_is_saved_and_loaded(tmp_path: Any) -> None:
    module, x = layer(), normal(2, 10, WIDTH)
    _, state = module(x)
    save_state(state, tmp_path / "state.safetensors")
    again = load_state(tmp_path / "state.safetensors")
    more = normal(2, 6, WIDTH, seed=1)
    assert torch.equal(module(more, again)[0], module(more, state)[0])


def test_queries_look_up_before_their_segment_is_stored() -> None:
    """In the first segment nothing is found, in the second only the first's."""
    module = layer(window=1, cache=0, top=100)
    x = normal(1, 8, WIDTH)
    q, k, v = parts(module, x)
    weights = (q[:, :, 4:] @ k[:, :, :4].mT * module.scale.abs()[:, None, None]).softmax(-1)
    found = weights @ v[:, :, :4]
    g = module.gate.sigmoid()[:, None, None]
    want = torch.cat([v[:, :, :4], g * found + (1 - g) * v[:, :, 4:]], 2)
    assert_close(module(x)[0], outputs(module, want))


# -- the look-up ------------------------------------------------------------------------------


def looked_up(module: Any, x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(y_loc, y_mem) of the last segment of 4, by sorting, with a window of 1 and no cache."""
    q, k, v = parts(module, x)
    past = slice(max(x.shape[1] - 4 - module.memory, 0), x.shape[1] - 4)
    scores = q[:, :, -4:] @ k[:, :, past].mT
    least = scores.sort(-1, descending=True).values[..., :top][..., -1:]
    scores = (scores * module.scale.abs()[:, None, None]).masked_fill(scores < least, -torch.inf)
    return v[:, :, -4:], scores.softmax(-1) @ v[:, :, past]


@pytest.mark.parametrize("top", [1, 3, 7, 12, 50])
@pytest.mark.parametrize("memory", [8, 100])
def test_the_nearest_are_those_of_a_full_sort(top: int, memory: int) -> None:
    """From top = 12 on all are retrieved: dense attention over the store."""
    module, x = layer(top=top, window=1, cache=0, memory=memory), normal(2, 16, WIDTH)
    local, found = looked_up(module, x, top)
    g = module.gate.sigmoid()[:, None, None]
    assert_close(module(x)[0][:, -4:], outputs(module, g * found + (1 - g) * local))


@pytest.mark.parametrize("combine", ["gate", "sum", "joint"])
def test_ways_to_combine(combine: str) -> None:
    module, x = layer(combine=combine, window=1, cache=0, top=100), normal(2, 16, WIDTH)
    local, found = looked_up(module, x, 100)
    if combine == "gate":
        g = module.gate.sigmoid()[:, None, None]
        want = g * found + (1 - g) * local
    elif combine == "sum":
        want = local + found
    else:
        q, k, v = parts(module, x)
        a = module.scale.abs()[:, None, None]
        own = (q[:, :, -4:] * k[:, :, -4:]).sum(-1, keepdim=True) * a
        own = own + module.mixer.position.table.table.weight[0][:, None, None]
        scores = torch.cat([q[:, :, -4:] @ k[:, :, :12].mT * a, own], -1).softmax(-1)
        want = scores[..., :-1] @ v[:, :, :12] + scores[..., -1:] * local
    assert_close(module(x)[0][:, -4:], outputs(module, want))


def test_a_closed_gate_leaves_local_attention() -> None:
    """Which is attention to the last `window` keys: Transformer-XL's, all sees alike."""
    module, plain, x = layer(), layer(memory=0), normal(2, 22, WIDTH)
    plain.load_state_dict({n: t for n, t in module.state_dict().items() if n != "gate"})
    with torch.no_grad():
        module.gate.fill_(-torch.inf)
    assert_close(module(x)[0], plain(x)[0])
    q, k, v = parts(plain, x)
    far = torch.arange(22)[:, None] - torch.arange(22)
    scores = q @ k.mT * plain.scale.abs()[:, None, None]
    scores = scores + plain.mixer.position.table.table.weight[far.clamp(0, 15)].movedim(-1, 0)
    weights = scores.masked_fill((far < 0) | (far >= 5), -torch.inf).softmax(-1)
    assert_close(plain(x)[0], outputs(plain, weights @ v))


def test_an_open_gate_leaves_pure_memory_attention() -> None:
    module, x = layer(top=100, memory=100), normal(2, 16, WIDTH)
    with torch.no_grad():
        module.gate.fill_(torch.inf)
    want = looked_up(module, x, 100)[1]
    assert_close(module(x)[0][:, -4:], outputs(module, want))


def test_a_row_without_a_store_has_its_gate_closed() -> None:
    """Beside a row that has one."""
    module, x = layer(), normal(2, 8, WIDTH)
    state = reset(module(x)[1], torch.tensor([True, False]))
    more = normal(2, 4, WIDTH, seed=1)
    assert_close(module(more, state)[0][0], module(more)[0][0])


def test_the_bias_by_distance_is_the_local_parts_alone() -> None:
    module, x = layer(), normal(2, 16, WIDTH)
    with torch.no_grad():
        module.gate.fill_(torch.inf)
    before = module(x)[0][:, 4:]
    with torch.no_grad():
        module.mixer.position.table.table.weight.mul_(-3)
    assert_close(module(x)[0][:, 4:], before)


# -- indices ----------------------------------------------------------------------------------


def test_an_index_finds_what_the_search_finds() -> None:
    """Rows are filled to different degrees, and the index is made once a segment."""
    made = []

    def make(width: int) -> nearest.Index:
        made.append(width)
        return nearest.Exact(width, dtype=torch.float64)

    exact, indexed = layer(), layer(search=Indexed(make))
    x, keep = normal(2, 30, WIDTH), torch.ones(2, 30, dtype=torch.bool)
    keep[0, :7] = False
    assert_close(indexed(x, keep=keep)[0], exact(x, keep=keep)[0])
    _, state = indexed(x[:, :8])
    made.clear()
    for t in range(8, 12):
        _, state = indexed(x[:, t : t + 1], state)
    assert made == [D] * 2 * HEADS


def test_an_index_by_faiss() -> None:
    pytest.importorskip("faiss")
    exact = layer().float()
    indexed = layer(search=Indexed(lambda width: nearest.Faiss(width))).float()
    x = normal(2, 30, WIDTH).float()
    assert_close(indexed(x)[0], exact(x)[0])


def test_an_index_by_faiss_needs_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    module = layer(search=Indexed(lambda width: nearest.Faiss(width)))
    with pytest.raises(LongspanError, match="faiss is not installed"):
        module(normal(1, 8, WIDTH))


# -- models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [1, 4, [3, 1, 9, 14, 3]], ids=str)
@pytest.mark.parametrize("combine", ["gate", "sum", "joint"])
def test_token_by_token_is_segment_by_segment(combine: str, sizes: Any) -> None:
    module, x = layer(combine=combine), normal(2, 30, WIDTH)
    assert_close(in_pieces(module, x, sizes)[0], module(x)[0])


@pytest.mark.parametrize("position", [None, "rope", "alibi"])
def test_a_memory_is_added_to_an_existing_layer(position: str | None) -> None:
    """With the gate closed it is the same function; opened, what was far away is found."""
    place = None
    if position is not None:
        place = build(position, **({"heads": HEADS} if position == "alibi" else {}))
    attention = build("multi-head-attention", causal=True)
    old = MultiHead(attention, width=WIDTH, heads=HEADS, position=place).double().eval()
    module = layer(normalise=False, window=40, memory=100, top=100).adopt(old)
    x = normal(2, 22, WIDTH)
    with torch.no_grad():
        module.gate.fill_(-torch.inf)
    assert_close(module(x)[0], old(x)[0])
    with torch.no_grad():
        module.gate.fill_(torch.inf)
    q, k, v = (old.project[n](x).unflatten(-1, (HEADS, D)).transpose(1, 2) for n in "qkv")
    want = (q[:, :, 20:] @ k[:, :, :20].mT / D**0.5).softmax(-1) @ v[:, :, :20]
    assert_close(module(x)[0][:, 20:], outputs(module, want))


def test_a_layer_of_other_heads_is_not_adopted() -> None:
    attention = build("multi-head-attention", causal=True)
    for heads, kv_heads in ((2, 2), (3, 1)):
        other = MultiHead(attention, width=WIDTH, heads=heads, kv_heads=kv_heads)
        with pytest.raises(LongspanError, match="must be equal"):
            layer().adopt(other)


def test_the_memory_grows_after_training() -> None:
    module, x = layer(memory=4, memory_eval=20), normal(2, 40, WIDTH)
    _, state = module.train()(x)
    assert state.memory.store.keep.shape[1] == 4
    y, _ = module.eval()(x)
    assert_close(y, layer(memory=20)(x)[0])
    assert module(x, state)[1].memory.store.keep.shape[1] == 20


def test_a_language_model_chooses_its_memory_layers() -> None:
    small = {"id": "memorizing-transformer", "window": 4, "memory": 0}
    config = LongspanConfig(
        vocab_size=11,
        width=WIDTH,
        layers=3,
        heads=HEADS,
        mixers=[small, {**small, "memory": 16, "top": 4}, small],
        position=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LongspanForCausalLM(config)
    tokens = torch.randint(11, (2, 18), generator=torch.Generator().manual_seed(0))
    model.train()(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert [n for n, _ in model.named_parameters() if "gate" in n] == ["model.layers.1.mixer.gate"]
    model.eval()
    whole, cache, outs = model(tokens).logits, None, []
    for token in tokens.split(1, 1):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        outs.append(output.logits)
    assert_close(torch.cat(outs, 1), whole, atol=1e-5, rtol=1e-4)
    assert cache is not None
    assert [s.memory.store.keep.shape[1] for s in cache.states] == [0, 16, 0]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"top": 0}, "top=0"),
        ({"memory": -1}, "memory=-1"),
        ({"window": 0}, "window=0"),
        ({"combine": "product"}, "combine"),
    ],
)
def test_what_cannot_work_is_refused(wrong: dict, match: str) -> None:
    with pytest.raises((LongspanError, TypeCheckError), match=match):
        layer(**wrong)
