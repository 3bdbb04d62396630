"""Recurrence between windows: against GPT-2 by hand, in pieces, by gradient; what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from longspan import LongspanError, convert
from longspan.mechanisms.conversion import pretrained_recurrence as module
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.nn import detach, load_state, reset, save_state
from longspan.registry import build

WINDOW = 6
# Rotations and eager's softmax are transformers' own, in float32.
NEAR: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


def gpt2(layers: int = 2, **changes: Any) -> Any:
    sizes: dict[str, Any] = {
        **{"vocab_size": 30, "n_embd": 24, "n_layer": layers, "n_head": 3, "n_positions": WINDOW},
        **{"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, **changes},
    }
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))


def llama() -> Any:
    sizes: dict[str, Any] = {
        **{"vocab_size": 30, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2},
        **{"num_attention_heads": 3, "num_key_value_heads": 1},
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None))


def ours(**changes: Any) -> Any:
    return LongspanForCausalLM(
        LongspanConfig(vocab_size=30, width=24, layers=2, heads=3, length=64, **changes)
    )


MODELS: dict[str, Any] = {
    "gpt2": gpt2,
    "gpt2-eager": lambda: gpt2(attn_implementation="eager"),
    "llama": llama,
    "longspan": ours,
    "longspan-rope": lambda: ours(position="rope", mixers=["linear-transformer"]),
    "longspan-post": lambda: ours(norm_order="post"),
}


def model(name: str = "gpt2", **changes: Any) -> Any:
    """Random weights large enough that attention matters."""
    torch.manual_seed(0)
    made = MODELS[name](**changes).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return made


def recurrence(**options: Any) -> Any:
    torch.manual_seed(1)
    made = build("pretrained-recurrence", width=24, window=WINDOW, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    return made


def tokens(length: int = 2 * WINDOW, *, rows: int = 2) -> Tensor:
    return torch.randint(1, 30, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", MODELS)
def test_without_the_extra_position_windows_stand_alone(name: str) -> None:
    made, ids = model(name), tokens(15)
    want = torch.cat([made(part, use_cache=False).logits for part in ids.split(WINDOW, 1)], 1)
    assert_close(recurrence(insert=None)(made, ids)[0], want)
    got, state = recurrence(insert=1)(made, ids)
    assert_close(got[:, :WINDOW], want[:, :WINDOW], msg="the first window has no r")
    assert not torch.allclose(got[:, WINDOW:], want[:, WINDOW:]), "r is seen"
    assert state.tokens.shape[1] == 3


def by_hand(made: Any, ids: Tensor, r: Tensor, insert: int, normed: bool) -> Tensor:
    """A GPT-2 whose layer `insert` has r among its keys, with the weights written out."""
    base = made.transformer
    x = base.wte(ids) + base.wpe.weight[: ids.shape[1]]
    for i, block in enumerate(base.h):
        before = block.ln_1(x)
        keys = before
        if i == insert:
            keys = torch.cat([(block.ln_1(r) if normed else r)[:, None], before], 1)
        q = block.attn.c_attn(before)[..., :24]
        k, v = block.attn.c_attn(keys)[..., 24:].chunk(2, -1)
        q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in (q, k, v))
        seen = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]).bool()
        weights = (q @ k.mT / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        x = x + block.attn.c_proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return made.lm_head(base.ln_f(x))


@pytest.mark.parametrize("name", ["gpt2", "gpt2-eager"])
@pytest.mark.parametrize(("insert", "normed", "read"), [(0, True, -1), (1, False, 1)])
def test_all_tokens_see_what_was_made_of_the_window_before(
    name: str, insert: int, normed: bool, read: int
) -> None:
    """Values and gradients."""
    made, ids = model(name), tokens()
    op = recurrence(insert=insert, normed=normed, read=read)
    got = op(made, ids)[0][:, WINDOW:]
    hidden = made(ids[:, :WINDOW], output_hidden_states=True).hidden_states[read]
    want = by_hand(made, ids[:, WINDOW:], op.f(hidden.mean(1)), insert, normed)
    assert_close(got, want, **NEAR)
    wrt = [*op.parameters(), *made.transformer.parameters()]
    toward = torch.randn(want.shape, generator=torch.Generator().manual_seed(3)).double()
    found, wanted = (
        torch.autograd.grad(t, wrt, toward, allow_unused=True, materialize_grads=True)
        for t in (got, want)
    )
    assert_close(found, wanted, **NEAR)
    assert all(g.any() for g in found[: len(list(op.parameters()))])


def test_a_held_vector_is_a_prefix_of_one_token() -> None:
    """In a GPT-2 of one layer, transformers' own cache of one key says the same."""
    made, ids, op = model(layers=1), tokens(), recurrence(insert=0)
    (_, state), at = op(made, ids[:, :WINDOW]), torch.arange(WINDOW)[None]
    block = made.transformer.h[0]
    k, v = block.attn.c_attn(block.ln_1(state.r))[:, 24:].chunk(2, -1)
    cache = DynamicCache(config=made.config)
    cache.update(*(t.view(2, 1, 3, 8).transpose(1, 2) for t in (k, v)), 0)
    want = made(ids[:, WINDOW:], past_key_values=cache, position_ids=at).logits
    assert_close(op(made, ids[:, WINDOW:], state)[0], want)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("overlap", [0, 2])
def test_pieces_give_what_the_whole_gives(name: str, overlap: int, tmp_path: Path) -> None:
    """Padded on the left too, resumed from a file, and with rows that start anew."""
    made, ids, op = model(name), tokens(20), recurrence(overlap=overlap, start=True)
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[1, :8] = False
    for mask in (None, keep):
        whole, end = op(made, ids, keep=mask)
        state, outs, at = None, [], 0
        for size in (1, 7, 4, 8):
            piece = None if mask is None else mask[:, at : at + size]
            out, state = op(made, ids[:, at : at + size], state, keep=piece)
            save_state(detach(state), tmp_path / "state.safetensors")
            state = load_state(tmp_path / "state.safetensors")
            outs.append(out)
            at += size
        seen = keep if mask is not None else torch.ones_like(keep)
        assert_close(torch.cat(outs, 1)[seen], whole[seen])
        assert_close(state.r, end.r)
    step = WINDOW - overlap
    state = op(made, ids[:, : WINDOW + step])[1]  # the windows are full
    fresh = reset(state, torch.tensor([False, True]))
    after, more = op(made, ids[:, :4], fresh)[0], op(made, ids[:, :4], state)[0]
    assert_close(after[0], more[0])
    assert_close(after[1], op(made, ids[1:, :4])[0][0])


def test_rows_that_are_padded_are_as_if_alone() -> None:
    made, ids, op = model(), tokens(16), recurrence()
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[1, :WINDOW] = False
    got = op(made, ids, keep=keep)[0]
    assert_close(got[:1], op(made, ids[:1])[0])
    assert_close(got[1:, WINDOW:], op(made, ids[1:, WINDOW:])[0])


def test_an_overlap_is_read_again_and_not_scored() -> None:
    made, ids, op = model(), tokens(10), recurrence(overlap=2, insert=None)
    got = op(made, ids)[0]
    assert got.shape[1] == 10
    assert_close(got[:, WINDOW:], made(ids[:, WINDOW - 2 :]).logits[:, 2:])


@pytest.mark.parametrize("pooling", ["mean", "last", "attention"])
def test_pooling_is_its_formula(pooling: str) -> None:
    op = recurrence(pooling=pooling)
    hidden = torch.randn(2, 5, 24, dtype=torch.float64)
    keep = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    got, real = op.pool(hidden, keep), hidden[0, 1:4]
    want = {"mean": real.mean(0), "last": real[-1]}
    if pooling == "attention":
        want[pooling] = (real @ op.query).softmax(0) @ real
    assert_close(got, torch.stack([want[pooling], torch.zeros(24).double()]))
    made = model()
    op(made, tokens())[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in op.parameters())


def gradients(backprop: int, windows: int = 3) -> tuple[Tensor, ...]:
    made, ids = model(), torch.arange(1, 1 + windows * WINDOW)[None]
    op = recurrence(backprop=backprop)
    loss = op(made, ids)[0][:, -WINDOW:].square().mean()
    return torch.autograd.grad(loss, (made.transformer.wte.weight, *op.parameters()))


def test_recomputed_windows_have_the_gradients_of_kept_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recomputed, calls = gradients(3), []

    def kept(run: Any, *arguments: Any, use_reentrant: bool) -> Any:
        calls.append(use_reentrant)
        return run(*arguments)

    monkeypatch.setattr(module, "checkpoint", kept)
    assert_close(recomputed, gradients(3))
    assert calls == [False] * 3


def test_gradients_go_back_so_many_windows() -> None:
    """Each token stands in one window; the head is tied, so its rows differ by what they read."""

    def reached(backprop: int) -> list[bool]:
        made, ids = model(), torch.arange(1, 1 + 3 * WINDOW)[None]
        made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach().clone())
        op = recurrence(backprop=backprop)
        loss = op(made, ids)[0][:, -WINDOW:].square().mean()
        (g,) = torch.autograd.grad(loss, made.transformer.wte.weight)
        return [bool(part.any()) for part in g[1 : 1 + 3 * WINDOW].split(WINDOW)]

    assert reached(3) == [True, True, True]
    assert reached(2) == [False, False, True]
    assert reached(1) == [False, False, True]
    assert all(g.any() for g in gradients(1)), "f learns all the same"


def test_what_it_learns_from_the_window_before() -> None:
    """The second window holds the first one's token again, which nothing but r can tell."""
    torch.manual_seed(0)
    made, op = gpt2(n_embd=24).train(), build("pretrained-recurrence", width=24, window=2)
    optimizer = torch.optim.Adam([*made.parameters(), *op.parameters()], lr=3e-3)
    losses = []
    for _ in range(110):
        drawn = torch.randint(1, 9, (16, 1))
        ids = torch.cat([drawn.expand(-1, 2), torch.zeros(16, 2, dtype=torch.long)], 1)
        logits = op(made, ids)[0][:, 2]
        loss = torch.nn.functional.cross_entropy(logits, drawn[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 < 1.5 < losses[0], "ln 8 = 2.08 is chance"


WRONG: list[Any] = [
    ({"pooling": "max"}, "pooling"),
    ({"overlap": WINDOW}, "expected an overlap below the window"),
    ({"backprop": 0}, "backprop=0: expected an overlap below the window, and 1 window or more"),
]


@pytest.mark.parametrize(("options", "told"), WRONG)
def test_wrong_sizes_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises((LongspanError, TypeCheckError), match=told):
        build("pretrained-recurrence", width=24, **{"window": WINDOW, **options})


def test_what_it_cannot_reach_is_refused() -> None:
    ids, made = tokens(), model()
    with pytest.raises(LongspanError, match="layer 2: the model has 0 … 1"):
        recurrence(insert=2)(made, ids)
    with pytest.raises(LongspanError, match=r"keep \(2, 3\): expected one bool a token"):
        recurrence()(made, ids, keep=torch.ones(2, 3, dtype=torch.bool))
    bert = BertModel(BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3))
    with pytest.raises(LongspanError, match="and got a bert: give one of these"):
        module._place(bert, 0)
    convert.swap(made, "linear-transformer")
    with pytest.raises(LongspanError, match="layer 0 mixes by a GPT2, which takes no further key"):
        recurrence()(made, ids)
    made = model()
    made.set_attn_implementation("longspan:multi-head-attention")
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 7] = False
    with pytest.raises(LongspanError, match="set_attn_implementation"):
        recurrence()(made, ids, keep=mask)
    made = model()
    made.activation_checkpointing_enable()
    with pytest.raises(LongspanError, match="turn its gradient checkpointing off"):
        recurrence()(made, ids)
