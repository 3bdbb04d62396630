"""RWKV-4 against transformers, its wkv in every form, and the model of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from longspan import build
from longspan.engines import average
from longspan.engines.average import chunks
from longspan.errors import LongspanError
from longspan.models.rwkv import RwkvConfig, RwkvForCausalLM, from_published
from longspan.nn import reset, tensors


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def recurrence(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """wkv one token after another, without a running maximum."""
    a = b = torch.zeros_like(k[:, :, 0])
    outs = []
    for t in range(k.shape[2]):
        new = (u + k[:, :, t]).exp()
        outs.append((a + new * v[:, :, t]) / (b + new))
        a = (-w).exp() * a + k[:, :, t].exp() * v[:, :, t]
        b = (-w).exp() * b + k[:, :, t].exp()
    return torch.stack(outs, 2)


@pytest.mark.parametrize("length", [1, 2, 33, 1025])
def test_wkv_is_the_recurrence(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SEGMENT", 400)
    k, v = normal(2, 1, length, 3), normal(2, 1, length, 3, seed=1)
    w, u = normal(1, 3, seed=2).exp(), normal(1, 3, seed=3)
    given = [t.requires_grad_() for t in (k, v, w, u)]
    got, _ = average.running(k, v, decay=w, bonus=u)
    want = recurrence(*given)
    assert_close(got, want)
    toward = normal(*got.shape, seed=4)
    found = torch.autograd.grad(got, given, toward, materialize_grads=True)
    assert_close(found, torch.autograd.grad(want, given, toward, materialize_grads=True))


def test_wkv_is_that_of_transformers_with_keys_of_any_size() -> None:
    for scale in (1.0, 100.0):
        k, v = normal(2, 50, 6, dtype=torch.float32) * scale, normal(2, 50, 6, dtype=torch.float32)
        log_decay, u = (normal(6, seed=s, dtype=torch.float32) for s in (2, 3))
        want, state = rwkv_linear_attention_cpu(log_decay, u, k, v, return_state=True)
        got, sums = average.running(
            k[:, None], v[:, None], decay=log_decay.exp()[None], bonus=u[None]
        )
        assert_close(got[:, 0], want)
        assert_close([t[:, 0] for t in sums], state, atol=1e-4, rtol=1e-4)


def test_cut_anywhere_the_state_carries_on() -> None:
    k, v, w, u = normal(1, 1, 70, 4), normal(1, 1, 70, 4, seed=1), normal(1, 4).exp(), normal(1, 4)
    whole, last = average.running(k, v, decay=w, bonus=u)
    for cut in range(1, 70):
        early, state = average.running(k[:, :, :cut], v[:, :, :cut], decay=w, bonus=u)
        late, end = average.running(k[:, :, cut:], v[:, :, cut:], state, decay=w, bonus=u)
        assert_close(torch.cat([early, late], 2), whole)
        assert_close(end.total / end.weight, last.total / last.weight)


def test_without_decay_and_bonus_it_is_aft_simple() -> None:
    k, v, none = normal(1, 1, 40, 4), normal(1, 1, 40, 4, seed=1), torch.zeros(1, 4)
    wkv, _ = average.running(k, v, decay=none.double(), bonus=none.double())
    simple, _ = build("aft", form="simple", causal=True)(torch.zeros_like(k), k, v)
    assert_close(wkv / 2, simple)  # σ(0) = 1/2


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    config = transformers.RwkvConfig(
        vocab_size=11,
        hidden_size=12,
        num_hidden_layers=3,
        context_length=64,
        rescale_every=0,
        intermediate_size=20,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs: Any = transformers.RwkvForCausalLM(config).eval()
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                if "time_mix" in name:
                    p.uniform_()
                else:
                    p.add_(torch.randn_like(p) * 0.3)
    return theirs, from_published(theirs.state_dict())


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


def test_the_model_is_that_of_transformers(pair: Any) -> None:
    theirs, ours = pair
    ids = tokens(2, 21)
    want, got = theirs(ids).logits, ours(ids).logits
    assert_close(got, want, atol=1e-5, rtol=1e-5)
    theirs.zero_grad(), ours.zero_grad()
    want.square().sum().backward()
    got.square().sum().backward()
    assert_close(
        ours.model.layers[2].mixer.log_decay.grad,
        theirs.rwkv.blocks[1].attention.time_decay.grad,
        atol=1e-4,
        rtol=1e-4,
    )
    assert_close(
        ours.model.embed_tokens.weight.grad,
        theirs.rwkv.embeddings.weight.grad,
        atol=1e-4,
        rtol=1e-4,
    )


def test_steps_are_those_of_transformers(pair: Any) -> None:
    theirs, ours = pair
    ids, state, cache = tokens(1, 9), None, None
    whole = ours(ids).logits
    for t in range(9):
        step = theirs(ids[:, t : t + 1], state=state, use_cache=True)
        own = ours(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        state, cache = step.state, own.past_key_values
        assert_close(own.logits, step.logits, atol=1e-5, rtol=1e-5)
        assert_close(own.logits[:, 0], whole[:, t], atol=1e-5, rtol=1e-5)


def test_published_names(pair: Any) -> None:
    theirs, ours = pair
    spellings = {
        "rwkv.": "",
        "embeddings": "emb",
        "pre_ln": "ln0",
        "attention": "att",
        "feed_forward": "ffn",
        "mix_key": "mix_k",
        "mix_value": "mix_v",
        "mix_receptance": "mix_r",
    }
    published = {}
    for name, weight in theirs.state_dict().items():
        for have, want in spellings.items():
            name = name.replace(have, want)
        published[name] = weight
    assert {"emb.weight", "blocks.0.ln0.weight", "blocks.1.att.time_mix_k"} <= set(published)
    loaded = from_published(published).state_dict()
    assert_close(loaded, ours.state_dict(), atol=0, rtol=0)
    with pytest.raises(LongspanError, match=r"no weight 'blocks\.0\.att\.w1'"):
        from_published({"blocks.0.att.w1": torch.zeros(1)})
    del published["ln_out.weight"]
    with pytest.raises(LongspanError, match="missing"):
        from_published(published)


def test_five_vectors_a_layer_and_rows_reset_alone(pair: Any) -> None:
    _, ours = pair
    ids = tokens(2, 14)
    cache = ours(ids[:, :7], use_cache=True).past_key_values
    held = [t for t in tensors(cache.states) if t.is_floating_point()]
    assert sum(t.numel() for t in held) == 3 * 5 * 2 * 12
    after = ours(ids[:, 7:], past_key_values=cache, use_cache=True).logits
    cache = ours(ids[:, :7], use_cache=True).past_key_values
    cache.states = reset(cache.states, torch.tensor([True, False]))
    cleared = ours(ids[:, 7:], past_key_values=cache, use_cache=True).logits
    assert_close(cleared[:1], ours(ids[:1, 7:]).logits, atol=1e-5, rtol=1e-5)
    assert_close(cleared[1:], after[1:], atol=1e-5, rtol=1e-5)


def test_initialisation_of_the_paper() -> None:
    width, layers = 8, 3
    model: Any = RwkvForCausalLM(RwkvConfig(vocab_size=16, width=width, layers=layers))
    for layer in range(layers):
        time, channel = (model.model.layers[2 * layer + i].mixer for i in (0, 1))
        depth, rest = layer / (layers - 1), 1 - layer / layers
        for i in range(width):
            decay = -5 + 8 * (i / (width - 1)) ** (0.7 + 1.3 * depth)
            assert time.log_decay[i].item() == pytest.approx(decay, abs=1e-5)
            bonus = torch.tensor(0.3).log().item() + 0.5 * ((i + 1) % 3 - 1)
            assert time.bonus[i].item() == pytest.approx(bonus, abs=1e-5)
            assert time.mix["k"][i].item() == pytest.approx((i / width) ** rest)
            assert channel.mix["k"][i].item() == pytest.approx((i / width) ** rest)
            shifted = (i / width) ** rest + 0.3 * depth
            assert time.mix["v"][i].item() == pytest.approx(shifted)
            assert time.mix["r"][i].item() == pytest.approx((i / width) ** (0.5 * rest))
        assert not time.output.weight.any()
        assert not channel.project["v"].weight.any()
    assert model.model.embed_tokens.weight.abs().max() <= 1e-4
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_trains_generates_and_reloads(tmp_path: Path, pair: Any) -> None:
    _, ours = pair
    ids = tokens(2, 12)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = RwkvForCausalLM(RwkvConfig(vocab_size=11, width=12, layers=2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    ours.save_pretrained(tmp_path)
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again).__name__ == "RwkvForCausalLM"
    assert torch.equal(again(ids).logits, ours(ids).logits)
    made = again.generate(ids[:, :3], max_new_tokens=4, do_sample=False)
    greedy = ids[:, :3]
    for _ in range(4):
        greedy = torch.cat([greedy, ours(greedy).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, greedy)


def test_under_autocast_wkv_and_state_stay_float32() -> None:
    mixer = build("rwkv", width=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = mixer(normal(1, 300, 8, dtype=torch.float32))
    assert y.dtype == torch.bfloat16
    assert {t.dtype for t in state.sums} == {torch.float32}
    k = torch.zeros(1, 1, 600, 1, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # bfloat16 stops counting ones at 256
        _, sums = average.running(k, k)
    assert sums.weight.item() == 600
