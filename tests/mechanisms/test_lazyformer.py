"""LazyFormer: one attention matrix a block, as a config's `sharing`."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import longspan
from longspan.engines import dense
from longspan.engines.given import Lent
from longspan.errors import LongspanError
from longspan.hub import StateCache
from longspan.models import (
    LongspanConfig,
    LongspanForCausalLM,
    LongspanForMaskedLM,
    LongspanForSeq2SeqLM,
    LongspanModel,
)
from longspan.models.lazy import multiplications, widened

POSITIONS = ("rope", "alibi", "learned-position", None)


def config(sharing: Any = (3, 1, 2), **changes: Any) -> LongspanConfig:
    sizes = {"vocab_size": 32, "width": 24, "layers": 6, "heads": 3, "length": 40, "inner": 32}
    return LongspanConfig(**(sizes | {"sharing": sharing and list(sharing)} | changes))


def made(kind: Any, sharing: Any = (3, 1, 2), **changes: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config(sharing, **changes)).double().eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 32, shape, generator=torch.Generator().manual_seed(seed))


class Replayed(nn.Module):
    """Stands for softmax attention: computes the weights, or takes those of the block's first."""

    def __init__(self, causal: bool, store: dict[str, Tensor], first: bool) -> None:
        super().__init__()
        self.causal, self.store, self.first = causal, store, first
        self.shared, self.extra, self.grouped, self.takes_bias = False, {}, False, True
        self.takes_turns = False

    def forward(self, q, k, v, state=None, *, keep=None, bias=None):
        if self.first:
            at = torch.arange(k.shape[2])
            scores = q @ k.mT / q.shape[-1] ** 0.5
            scores = scores if bias is None else scores + bias(q, k, at, at)
            seen = torch.ones(len(at), len(at), dtype=torch.bool)
            seen = (seen.tril() if self.causal else seen)[None, None]
            seen = seen if keep is None else seen & keep[:, None, None]
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
            self.store["weights"] = weights
        return self.store["weights"] @ v, None


def patched(lazy: LongspanModel, **changes: Any) -> LongspanModel:
    """A standard stack with the lazy one's weights, whose later layers return the stored A."""
    standard: Any = made(LongspanModel, None, **changes)
    missing, unknown = standard.load_state_dict(lazy.state_dict(), strict=False)
    assert not unknown
    assert all(".project.q." in name or ".project.k." in name for name in missing)
    store: dict[str, Tensor] = {}
    firsts = {0, 3, 4}
    for n, layer in enumerate(standard.layers):
        layer.mixer.attention = Replayed(lazy.causal, store, n in firsts)
    return standard


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
def test_it_is_the_standard_stack_with_stored_weights(
    position: str | None, causal: bool, padded: bool
) -> None:
    """Values and gradients, with padding, causal masks and relative biases inside A."""
    lazy = made(LongspanModel, position=position, causal=causal)
    standard = patched(lazy, position=position, causal=causal)
    x, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[0, :3] = mask[1, 7:] = 0
    outs = [m(x, attention_mask=mask, use_cache=False)[0][mask.bool()] for m in (lazy, standard)]
    assert_close(*outs, atol=1e-10, rtol=1e-10)
    toward = torch.randn(outs[0].shape, dtype=torch.float64)
    for out in outs:
        out.backward(toward)
    theirs = dict(standard.named_parameters())
    for name, parameter in lazy.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert_close(parameter.grad, theirs[name].grad, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("kind", [LongspanForMaskedLM, LongspanForCausalLM])
def test_runs_of_one_are_the_standard_model(kind: Any) -> None:
    lazy, standard = made(kind, [1] * 6), made(kind, None)
    standard.load_state_dict(lazy.state_dict(), strict=True)
    x = tokens(2, 9)
    assert_close(lazy(x).logits, standard(x).logits)


def test_parameters_drop_by_the_queries_and_keys_of_lazy_layers() -> None:
    """(N − N/m) · 2 (d² + d), for any list of block lengths."""

    def count(sharing: Any) -> int:
        return sum(p.numel() for p in made(LongspanModel, sharing).parameters())

    for runs in ([6], [3, 3], [2, 2, 2], [3, 1, 2], [1] * 6):
        assert count(None) - count(runs) == (6 - len(runs)) * 2 * (24**2 + 24)


def test_weights_are_computed_once_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, explicit = [], dense.explicit
    monkeypatch.setattr(dense, "explicit", lambda *a, **s: calls.append(1) or explicit(*a, **s))
    made(LongspanModel)(tokens(2, 9))
    assert len(calls) == 3


def test_gradients_reach_the_first_layer_through_later_ones_alone() -> None:
    model = made(LongspanModel, [6])
    nn.init.zeros_(model.layers[0].mixer.project["v"].weight)
    nn.init.zeros_(model.layers[0].mixer.project["v"].bias)
    model(tokens(2, 9))[0].square().sum().backward()
    for name in "qk":
        assert model.layers[0].mixer.project[name].weight.grad.abs().max() > 0
        assert all(name not in layer.mixer.project for layer in model.layers[1:])


def test_no_token_sees_a_later_one() -> None:
    model, x = made(LongspanForCausalLM), tokens(1, 8)
    embeds = model.model.embed_tokens(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs_embeds=embeds).logits[0, 4].sum(), embeds)
    assert gradient[0, 5:].abs().max() == 0
    assert gradient[0, :5].abs().amax(-1).min() > 0


@pytest.mark.parametrize("changes", [{}, {"position": "alibi"}, {"kv_heads": 1}])
def test_steps_with_a_cache_equal_the_whole(changes: dict[str, Any]) -> None:
    model, x = made(LongspanForCausalLM, **changes), tokens(2, 11)
    mask = torch.ones_like(x)
    mask[0, :2] = 0
    whole, cache, outs = model(x, attention_mask=mask).logits, StateCache(), []
    for stop, piece in zip((4, 5, 10, 11), x.split([4, 1, 5, 1], 1), strict=True):
        outs.append(model(piece, attention_mask=mask[:, :stop], past_key_values=cache).logits)
    real = mask.bool()
    assert_close(torch.cat(outs, 1)[real], whole[real])
    said = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(x, **said), model.generate(x, use_cache=False, **said))


def test_the_cache_holds_keys_once_a_block_and_values_of_each_layer() -> None:
    states = made(LongspanForCausalLM)(tokens(2, 7)).past_key_values.states
    for n, state in enumerate(states):
        first = n in (0, 3, 4)
        past = state.attention if first else state
        assert past.v.shape == (2, 3, 7, 8)
        assert past.k.shape == (2, 3, 7, 8 if first else 0)


def test_dropout_of_weights_is_off_by_default_and_one_mask_serves_the_block() -> None:
    assert all(layer.mixer.attention.dropout == 0 for layer in made(LongspanModel).layers)
    x = torch.randn(1, 9, 24)
    first = longspan.build("lazyformer", width=24, heads=3, dropout=0.5).train()
    later = longspan.build("lazyformer", width=24, heads=3, dropout=0.5, lazy=True).train()
    with torch.random.fork_rng():
        _, lent = first(x)
        assert 0.2 < (lent.weights == 0).double().mean() < 0.8
        assert_close(later(x, Lent(lent.weights, None))[0], later(x, Lent(lent.weights, None))[0])
    assert made(LongspanModel, attention_dropout=0.1).layers[0].mixer.attention.dropout == 0.1


def test_recomputed_gradients_are_equal() -> None:
    x, gradients = tokens(2, 9), []
    for again in (False, True):
        model = made(LongspanForCausalLM, dropout=0.2, attention_dropout=0.1).train()
        if again:
            model.activation_checkpointing_enable()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model(x, labels=x).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_it_saves_and_loads_and_serves_an_encoder_decoder(tmp_path: Any) -> None:
    model = made(LongspanForMaskedLM).float()
    model.save_pretrained(tmp_path)
    loaded = LongspanForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    both = made(LongspanForSeq2SeqLM, decoder_start_token_id=0)
    said = {"max_new_tokens": 5, "do_sample": False}
    x = tokens(2, 7)
    assert torch.equal(both.generate(x, **said), both.generate(x, use_cache=False, **said))


@pytest.mark.parametrize("runs", [[6, 6], [2] * 6])
@pytest.mark.parametrize("changes", [{}, {"gated": True, "inner": 1000, "kv_heads": 4}])
def test_wider_layers_cost_what_the_standard_ones_did(runs: Any, changes: Any) -> None:
    base = LongspanConfig(width=768, layers=12, heads=12, **changes)
    wide = widened(base, runs, tokens=512)
    assert wide.width > base.width
    assert wide.sharing == runs
    ratio = multiplications(wide, 512) / multiplications(base, 512)
    assert 0.94 < ratio <= 1
    with pytest.raises(LongspanError, match="leave head_width out"):
        widened(LongspanConfig(head_width=8), [4], tokens=512)


def test_multiplications_are_those_counted() -> None:
    """Against torch's counter, for the layers of a stack (biases and norms aside)."""
    from torch.utils.flop_counter import FlopCounterMode

    for sharing in (None, (3, 1, 2)):
        backend = {"id": "multi-head-attention", "backend": "explicit"}
        made_of = {"mixers": ["multi-head-attention"] if sharing else [backend]}
        model = made(LongspanModel, sharing, position=None, **made_of)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens(1, 20))
        assert counter.get_total_flops() == 2 * 20 * multiplications(model.config, 20)


def test_an_encoder_of_its_own_shares_nothing() -> None:
    assert config().side("encoder").sharing == config().side("decoder").sharing == [3, 1, 2]
    assert config(encoder_layers=2).side("encoder").sharing is None
    assert config(encoder_mixers=["longformer"]).side("encoder").sharing is None


def test_it_refuses_what_cannot_share() -> None:
    for runs in ([3, 2], [7, -1], []):
        with pytest.raises(LongspanError, match="does not make 6 layers"):
            config(runs)
    with pytest.raises(LongspanError, match="longformer cannot share"):
        config(mixers=["longformer"])
    with pytest.raises(LongspanError, match="weights of another layer"):
        longspan.build("lazyformer", width=24, heads=3, lazy=True)(torch.randn(1, 4, 24))
    with pytest.raises(LongspanError, match="'linear-transformer' has no dropout"):
        LongspanModel(config(None, mixers=["linear-transformer"], attention_dropout=0.1))
