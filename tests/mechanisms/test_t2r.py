"""T2R: its map, its forms, folding, and conversion of models with their weights kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from longspan import LongspanError, convert
from longspan.mechanisms.conversion.t2r import fold
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.nn import MultiHead, state_bytes
from longspan.registry import build
from longspan.testing.oracles import oracle_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(queries: int = 70, keys: int = 70) -> list[Tensor]:
    return [
        normal(2, 3, n, 8, seed=i).requires_grad_() for i, n in enumerate((queries, keys, keys))
    ]


def t2r(**arguments: Any) -> Any:
    torch.manual_seed(0)
    return build("t2r", **{"heads": 3, "head_width": 8, "features": 5, **arguments}).double()


@pytest.mark.parametrize("causal", [False, True])
def test_keys_may_have_a_map_of_their_own(causal: bool) -> None:
    """Values and gradients of both maps, masked; shared, there is one map."""
    op, (q, k, v) = t2r(separate=True, causal=causal), qkv()
    formula: Any = oracle_of("t2r")
    keep = torch.rand(2, 70, generator=torch.Generator().manual_seed(3)) > 0.3
    got, want = (f(q, k, v, keep=keep) for f in (op, lambda *a, keep: formula(op, *a, keep=keep)))
    assert_close(got[0], want)
    wrt = (q, k, v, *op.parameters())
    found = torch.autograd.grad((got[0] ** 2).sum(), wrt)
    assert_close(found, torch.autograd.grad((want**2).sum(), wrt))
    assert len(list(op.parameters())) == 4
    assert len(list(t2r().parameters())) == 2


def test_a_constant_map_gives_the_running_mean_of_values() -> None:
    op, (q, k, v) = t2r(causal=True, eps=0.0), qkv()
    with torch.no_grad():
        op.map.weight.zero_()
        op.map.bias.fill_(1)
    assert_close(op(q, k, v)[0], v.cumsum(2) / torch.arange(1, 71)[:, None])


def test_where_relu_leaves_nothing_the_output_is_zero() -> None:
    op, (q, k, v) = t2r(causal=True), qkv()
    with torch.no_grad():
        op.map.bias.fill_(-1e3)
    o, _ = op(q, k, v)
    assert not o.any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), (q, k, v)))


def test_cross_attention_reads_a_constant_state_at_every_step() -> None:
    op, (q, k, v) = t2r(), qkv(9, 40)
    memory = op.remember(k, v)
    assert memory.shape == (2, 3, 5, 9)
    steps = [op.recall(one, memory) for one in q.split(1, dim=2)]
    assert_close(torch.cat(steps, 2), op(q, k, v)[0])


def test_sums_in_half_precision_are_kept_in_single() -> None:
    op = t2r(causal=True).half()
    q, k, v = (t.detach().half() * 100 for t in qkv())
    o, state = op(q, k, v)
    assert o.dtype == torch.float16
    assert state.dtype == torch.float32
    assert o.isfinite().all()
    assert state.abs().max() > torch.finfo(torch.float16).max


def heads(attention: Any, **changes: Any) -> MultiHead:
    torch.manual_seed(1)
    mixer = MultiHead(attention, **{"width": 24, "heads": 3, **changes}).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.3)
    return mixer


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_folded_is_unfolded(separate: bool, biases: bool) -> None:
    """Whole, masked, and step by step, with the same state."""
    mixer = heads(t2r(causal=True, separate=separate), biases=biases)
    folded, x = fold(mixer), normal(2, 9, 24)
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[1, :3] = False
    assert folded.project["q"].weight.shape == (15, 24)
    for mask in (None, keep):
        (want, end), (got, state) = mixer(x, keep=mask), folded(x, keep=mask)
        assert_close(got, want, atol=1e-12, rtol=1e-6)
        assert_close(state.attention, end.attention)
    state, outs = None, []
    for token in x.split(1, 1):
        o, state = folded(token, state)
        outs.append(o)
    assert_close(torch.cat(outs, 1), mixer(x)[0])
    context = normal(2, 7, 24, seed=4)
    cross = heads(t2r(separate=separate), biases=biases)
    assert_close(fold(cross)(x, context=context)[0], cross(x, context=context)[0])


def test_what_cannot_be_folded_is_refused() -> None:
    with pytest.raises(LongspanError, match="got a LinearTransformer: leave that mixer"):
        fold(heads(build("linear-transformer")))
    rope = build("rope")
    with pytest.raises(LongspanError, match="turns queries and keys between their projections"):
        fold(heads(t2r(causal=True), position=rope))
    with pytest.raises(LongspanError, match="3 heads share 1 of keys"):
        fold(heads(t2r(causal=True), kv_heads=1))
    with pytest.raises(LongspanError, match="features=0: expected 1 or more"):
        t2r(features=0)


def ids(length: int = 12) -> Tensor:
    return torch.randint(2, 30, (2, length), generator=torch.Generator().manual_seed(1))


def test_our_models_keep_their_weights_and_train_on(tmp_path: Path) -> None:
    """From a saved model, in the layers that are named; both the map and old weights learn."""
    config = LongspanConfig(vocab_size=30, width=24, layers=2, heads=3, length=64)
    made = LongspanForCausalLM(config)
    made.save_pretrained(tmp_path)
    mixers = ["multi-head-attention", {"id": "t2r", "features": 5}]
    swapped: Any = LongspanForCausalLM.from_pretrained(tmp_path, mixers=mixers)
    old, new = made.state_dict(), swapped.state_dict()
    maps = {name for name in new if name not in old}
    assert maps == {f"model.layers.1.mixer.attention.map.{name}" for name in ("weight", "bias")}
    assert all(torch.equal(new[name], old[name]) for name in old)
    swapped.train()(ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in swapped.parameters())


def test_a_gpt2_keeps_its_weights_and_becomes_an_rnn() -> None:
    sizes: dict[str, Any] = {"vocab_size": 30, "n_embd": 24, "n_layer": 2, "n_head": 3}
    quiet: dict[str, Any] = {"attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    made = GPT2LMHeadModel(GPT2Config(**sizes, **quiet, n_positions=64)).eval()
    old = {name: t.clone() for name, t in made.state_dict().items()}
    convert.swap(made, "t2r", features=5)
    new = made.state_dict()
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert {name.split("mechanism.")[1] for name in new.keys() - old.keys()} == {
        "map.weight",
        "map.bias",
    }
    caches = [made(ids(n), use_cache=True).past_key_values for n in (5, 50)]
    sizes_of = [[state_bytes(layer.state) for layer in cache.layers] for cache in caches]
    assert sizes_of[0] == sizes_of[1] == [2 * 3 * 5 * 9 * 4] * 2
    made.train()(ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in made.parameters())
