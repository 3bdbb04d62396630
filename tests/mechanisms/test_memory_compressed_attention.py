"""Memory-compressed attention: its identities, no slot too early, and the T-DMCA model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import longspan
from longspan import LongspanError
from longspan.hub import StateCache
from longspan.models.dmca import DmcaConfig, DmcaForCausalLM, joined
from longspan.nn.experts import Experts


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def qkv(length: int, keys: int | None = None) -> list[Tensor]:
    return [
        random(2, 3, n, 4, seed=s) for s, n in enumerate((length, keys or length, keys or length))
    ]


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    built = longspan.build("memory-compressed-attention", heads=3, head_width=4, **options).double()
    if built.null is not None:
        torch.nn.init.normal_(built.null)
    return built


def taps(built: Any, weights: list[float]) -> Any:
    """Each tap a multiple of the identity over channels."""
    for linear in built.compress.values():
        eye = torch.eye(12, dtype=torch.float64)
        linear.weight.data = torch.cat([w * eye for w in weights], 1)
    return built


def test_one_tap_and_factor_one_are_dense_attention() -> None:
    q, k, v = qkv(9)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_close(taps(build(factor=1), [1.0])(q, k, v)[0], want)
    assert_close(taps(build(factor=1, kernel=3), [1.0, 0, 0])(q, k, v)[0], want)


def test_averaging_taps_are_mean_pooled_keys_and_values() -> None:
    q, k, v = qkv(5, 12)
    k_c, v_c = (t.unflatten(2, (4, 3)).mean(3) for t in (k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k_c, v_c)
    assert_close(taps(build(), [1 / 3] * 3)(q, k, v)[0], want)


@pytest.mark.parametrize(("factor", "kernel"), [(3, 3), (4, 2), (2, 5), (1, 3)])
def test_no_query_sees_a_slot_with_a_later_token(factor: int, kernel: int) -> None:
    """Perturbation at every position and every length, bit for bit; and none is lost."""
    built = build(causal=True, factor=factor, kernel=kernel)
    for length in range(1, 3 * factor + 2):
        q, k, v = (t[:1].expand(length, -1, -1, -1) for t in qkv(length))
        at = torch.eye(length)[:, None, :, None]
        moved = (built(q, k + at, v - at)[0] != built(q, k, v)[0]).any(-1).any(1)
        assert not moved.tril(-1).any()
        ends = torch.arange(length) // factor * factor + factor - 1
        covered = ends - torch.arange(length) < kernel
        seen = (torch.arange(length) >= ends[:, None]) & covered[:, None]
        assert (moved | ~seen).all()


def test_early_queries_see_the_null_slot_alone() -> None:
    built = build(causal=True)
    q, k, v = qkv(4)
    o, _ = built(q, k, v)
    want = built.null[1].expand(2, 3, 2, 4)
    assert_close(o[:, :, :2], want)
    assert not torch.allclose(o[:, :, 2], want[:, :, 0])


def test_slots_of_padding_are_masked() -> None:
    for causal in (False, True):
        built = build(causal=causal)
        q, k, v = qkv(7)
        keep = torch.ones(2, 7, dtype=torch.bool)
        keep[0, [0, 1, 4]] = False
        got, _ = built(q, k.masked_fill(~keep[:, None, :, None], torch.nan), v, keep=keep)
        alone, _ = built(*(t[:1, :, keep[0]] for t in (q, k, v)))
        assert_close(got[:1, :, keep[0]], alone)


def test_the_cache_holds_slots_and_pending_tokens() -> None:
    built = build(causal=True, factor=3)
    _, state = built(*qkv(20))
    assert state.k.shape[1] == 6
    assert state.k_before.shape[1] == 2


def test_queries_may_come_from_another_sequence() -> None:
    built = build()
    q, k, v = qkv(4, 8)
    slots: Any = [
        torch.nn.functional.conv1d(
            torch.nn.functional.pad(t.transpose(1, 2).flatten(2).mT, (0, 1)),
            built.compress[n].weight.view(12, 3, 12).transpose(1, 2),
            stride=3,
        ).unflatten(1, (3, 4)).transpose(2, 3)
        for n, t in (("k", k), ("v", v))
    ]  # fmt: skip
    assert_close(built(q, k, v)[0], torch.nn.functional.scaled_dot_product_attention(q, *slots))


@pytest.mark.parametrize("causal", [False, True])
def test_local_blocks_are_dense_attention_under_a_block_diagonal(causal: bool) -> None:
    q, k, v = qkv(11)
    block = torch.arange(11) // 4  # the last block has 3
    mask = block[:, None] == block
    mask = mask.tril() if causal else mask
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    local = longspan.build("local-block-attention", block=4, causal=causal)
    assert_close(local(q, k, v)[0], want)
    whole = longspan.build("local-block-attention", block=11, causal=causal)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert_close(whole(q, k, v)[0], want)


def config(**fields: Any) -> DmcaConfig:
    chosen: dict[str, Any] = {"vocab_size": 11, "width": 12, "heads": 2, "inner": 16, "block": 4}
    return DmcaConfig(**(chosen | fields))


def test_a_pattern_names_the_layers() -> None:
    model: Any = DmcaForCausalLM(config(pattern="LMLML", experts=4))
    kinds = [type(layer.mixer.attention).__name__ for layer in model.model.layers]
    assert kinds == ["PatternAttention", "MemoryCompressedAttention"] * 2 + ["PatternAttention"]
    feeds = [isinstance(layer.feed_forward, Experts) for layer in model.model.layers]
    assert feeds == [False, False, True, False, False]


def test_the_model_decodes_in_steps_and_sees_no_later_token() -> None:
    torch.manual_seed(0)
    model = DmcaForCausalLM(config(experts=3)).double().eval()
    tokens = torch.randint(1, 11, (2, 14), generator=torch.Generator().manual_seed(0))
    whole, cache = model(tokens).logits, StateCache()
    steps = [model(t, past_key_values=cache).logits for t in tokens.split(1, 1)]
    assert_close(torch.cat(steps, 1), whole)
    for at in range(14):
        changed = tokens.clone()
        changed[:, at] = changed[:, at] % 10 + 1
        assert torch.equal(model(changed).logits[:, :at], whole[:, :at])


def test_learns_to_copy_on_joined_sequences_with_the_source_unscored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DmcaForCausalLM(config(experts=3))
    source = torch.randint(1, 9, (4, 7), generator=torch.Generator().manual_seed(0))
    ids, labels = joined(source, source[:, :3], separator=10)
    assert ids.shape == (4, 11)
    assert (labels[:, :8] == -100).all()
    assert torch.equal(labels[:, 8:], source[:, :3])
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(25):
        out = model(ids, labels=labels)
        losses.append(out.loss.item())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert set(out.auxiliary) == {"experts"}
    model.eval().save_pretrained(tmp_path)
    again = DmcaForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(again(ids).logits, model(ids).logits)


def test_experts_by_the_written_out_sum() -> None:
    torch.manual_seed(0)
    layer, x = Experts(6, experts=4, active=2).double(), random(2, 5, 6)
    logits = layer.gate(x)
    top = logits.topk(2, -1).values[..., -1:]
    gates = logits.masked_fill(logits < top, -torch.inf).softmax(-1)
    want: Any = sum(gates[..., e, None] * expert(x) for e, expert in enumerate(layer.experts))
    assert_close(layer(x), want)
    with pytest.raises(LongspanError, match="experts were asked"):
        Experts(6, experts=1, active=2)


def test_refuses() -> None:
    with pytest.raises(LongspanError, match="at least 1"):
        build(factor=0)
    with pytest.raises(LongspanError, match="built for 3 heads"):
        build()(*(t[:, :2] for t in qkv(4)))
    with pytest.raises(LongspanError, match="at least 1 token"):
        longspan.build("local-block-attention", block=0)
    with pytest.raises(LongspanError, match="pattern is"):
        config(pattern="LX")
