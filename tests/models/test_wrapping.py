"""Memories and drivers of depth in the standard models, named in the config."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from longspan import LongspanError
from longspan.hub import StateCache
from longspan.models import (
    HourglassConfig,
    LongspanConfig,
    LongspanForCausalLM,
    LongspanForMaskedLM,
    LongspanForSeq2SeqLM,
    UniversalConfig,
)

MEMORIES: dict[str, dict[str, Any]] = {
    "transformer-xl": {"memory": 5},
    "compressive-transformer": {"segment": 4, "memory": 4, "compressed": 2, "rate": 2},
    "memorizing-transformer": {"window": 4, "memory": 8, "top": 2},
    "expire-span": {"segment": 4, "span": 8, "ramp": 2},
    "infinite-former": {"segment": 4, "basis": 6, "samples": 8, "bins": 4},
    "shortformer": {"segment": 4},
}
LOSSES = {
    "compressive-transformer": {"attention_reconstruction"},
    "expire-span": {"span"},
}


def built(kind: Any = LongspanForCausalLM, **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 11, "width": 12, "heads": 2, "layers": 2, "inner": 16}
    return kind(LongspanConfig(**(sizes | fields))).double().eval()


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 11, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("id_", MEMORIES)
def test_a_memory_stands_in_place_of_plain_attention(id_: str, tmp_path: Any) -> None:
    spec = {"id": id_, **MEMORIES[id_]}
    model, named = built(memory=spec), built(mixers=[spec], position=None)
    named.load_state_dict(model.state_dict())
    tokens, segments = ids(2, 13), [4, 1, 8]
    caches = StateCache(), StateCache()
    for piece in tokens.split(segments, 1):
        got, want = (
            m(piece, past_key_values=c).logits for m, c in zip((model, named), caches, strict=True)
        )
        assert torch.equal(got, want)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.memory == spec
    assert_close(loaded(tokens).logits, model(tokens).logits, atol=1e-6, rtol=1e-5)
    options: Any = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    out = model.generate(tokens, attention_mask=mask, **options)
    alone = model.generate(tokens[:1, 3:], **options)
    assert torch.equal(out[:1, 3:], alone)
    out = model.train()(tokens, labels=tokens)
    assert set(out.auxiliary or {}) == LOSSES.get(id_, set())


def test_a_number_of_inputs_is_kept_before_any_mixer() -> None:
    """The second segment sees the last M inputs of the first, normed with its own."""
    for mixers in (["multi-head-attention"], ["linear-transformer"]):
        model = built(memory=3, mixers=mixers, layers=1)
        tokens, cache = ids(2, 9), StateCache()
        first = model(tokens[:, :5], past_key_values=cache).logits
        assert_close(first, built(mixers=mixers, layers=1)(tokens[:, :5]).logits)
        layer = model.model.layers[0]
        x = model.model.embed_tokens(tokens)
        whole = layer.mixer.norm(x[:, 2:])
        y, _ = layer.mixer.mixer(whole[:, 3:], context=whole)
        y = x[:, 5:] + y
        y = y + layer.feed_forward(layer.feed_forward_norm(y))
        got = model(tokens[:, 5:], past_key_values=cache).logits
        assert_close(got, model.lm_head(model.model.norm(y)))
        assert cache.carried().layers[0].items.shape == (2, 3, 12)  # pyright: ignore
        assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 12)


def test_infinite_former_stands_around_another_mixer() -> None:
    spec = {"id": "infinite-former", **MEMORIES["infinite-former"]}
    model = built(memory=spec, mixers=["linear-transformer"])
    local = model.model.layers[0].mixer.local
    assert type(local.attention).__name__ == "LinearTransformer"
    tokens, cache = ids(2, 9), StateCache()
    steps = [model(t, past_key_values=cache).logits for t in tokens.split(1, 1)]
    assert_close(torch.cat(steps, 1), model(tokens).logits)


def halting(bias: float = -0.3) -> dict[str, Any]:
    return {"id": "act", "bias": bias, "cost": 0.5}


def test_a_driver_that_never_halts_is_the_plain_stack() -> None:
    for kind in (LongspanForCausalLM, LongspanForMaskedLM):
        model, plain = built(kind, depth=halting(-1e6), layers=3), built(kind, layers=3)
        plain.load_state_dict(model.state_dict(), strict=False)
        tokens, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.long)
        mask[0, :2] = 0
        got, want = (m(tokens, mask).logits for m in (model, plain))
        assert_close(got * mask[..., None], want * mask[..., None])


@pytest.mark.parametrize("causal", [True, False])
def test_halting_over_the_layers_by_the_formula(causal: bool) -> None:
    """y = Σ w^n s^n, halted positions keep their state, and the loss grows by τ mean(N + R)."""
    kind = LongspanForCausalLM if causal else LongspanForMaskedLM
    model = built(kind, depth=halting(), layers=4, position="rope").train()
    act, tokens = model.model.depth, ids(2, 9)
    torch.nn.init.normal_(act.halt.weight, generator=torch.Generator().manual_seed(3))
    out = model(tokens, labels=tokens)
    assert set(out.auxiliary) == {"ponder"}

    x = model.model.embed_tokens(tokens)
    y, summed, ponder = torch.zeros_like(x), torch.zeros(2, 9).double(), torch.zeros(2, 9).double()
    active = torch.ones(2, 9, dtype=torch.bool)
    went = torch.zeros(2, 9)
    for n, layer in enumerate(model.model.layers):
        x = torch.where(active[..., None], layer(x)[0], x)
        p = act.halt(x)[..., 0].sigmoid()
        last = active & (summed + p >= 0.99) if n < 3 else active
        weight = torch.where(last, 1 - summed, p) * active
        y, summed = y + weight[..., None] * x, summed + weight
        ponder = ponder + active + weight * last
        active, went = active & ~last, went + active
    assert went.unique().numel() > 1
    state = model.model.norm(y)
    logits = model.lm_head(state if causal else model.transform(state))
    near: Any = {"atol": 1e-6, "rtol": 1e-5, "check_dtype": False}  # losses are of float32
    assert_close(out.logits, logits)
    shown, aims = (logits[:, :-1], tokens[:, 1:]) if causal else (logits, tokens)
    nats = torch.nn.functional.cross_entropy(shown.flatten(0, 1), aims.flatten())
    assert_close(out.auxiliary["ponder"], 0.5 * ponder.mean(), **near)
    want = nats + 0.5 * ponder.mean()
    assert_close(out.loss, want, **near)
    inputs = [p for p in model.parameters() if p.requires_grad]
    for got, by_hand in zip(
        *(torch.autograd.grad(loss, inputs, allow_unused=True) for loss in (out.loss, want)),
        strict=True,
    ):
        assert_close(got, by_hand, **near)


@pytest.mark.parametrize("mixers", [["multi-head-attention"], ["linear-transformer"]])
def test_halting_steps_generates_and_saves(mixers: list[str], tmp_path: Any) -> None:
    model = built(depth=halting(), layers=4, mixers=mixers, memory=None)
    torch.nn.init.normal_(model.model.depth.halt.weight)
    tokens, mask, cache = ids(2, 9), torch.ones(2, 9, dtype=torch.long), StateCache()
    mask[0, :4] = 0
    whole, pieces = model(tokens, mask).logits, (t.split([2, 1, 6], 1) for t in (tokens, mask))
    steps = [model(*piece, past_key_values=cache).logits for piece in zip(*pieces, strict=True)]
    assert_close(torch.cat(steps, 1) * mask[..., None], whole * mask[..., None])
    options: Any = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    got = model.generate(tokens, **options)
    assert torch.equal(got, model.generate(tokens, use_cache=False, **options))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.depth == halting()
    assert_close(loaded(tokens, mask).logits, whole, atol=1e-6, rtol=1e-5)


def test_a_memory_and_a_driver_of_depth_together() -> None:
    spec = {"id": "transformer-xl", "memory": 16}
    model = built(memory=spec, depth=halting(), layers=3)
    tokens, cache = ids(2, 8), StateCache()
    pieces = [model(t, past_key_values=cache).logits for t in tokens.split([3, 1, 4], 1)]
    assert_close(torch.cat(pieces, 1), model(tokens).logits)


def test_from_sequence_to_sequence_the_decoder_remembers() -> None:
    model = built(
        LongspanForSeq2SeqLM, memory=4, depth=halting(), decoder_start_token_id=0, pad_token_id=0
    )
    assert type(model.decoder.layers[0].mixer).__name__ == "Remember"
    assert type(model.encoder.layers[0].mixer).__name__ == "MultiHead"
    out = model.train()(ids(2, 7), labels=ids(2, 5))
    assert set(out.auxiliary) == {"ponder"}
    assert model.eval().generate(ids(2, 7), max_new_tokens=4, do_sample=False).shape == (2, 5)


REFUSED: list[tuple[str, Any]] = [
    ("use longspan.models.BlockRecurrentForCausalLM", {"memory": "block-recurrent-transformer"}),
    ("use longspan.models.UniversalForCausalLM", {"depth": "universal-transformer"}),
    ("use longspan.models.EarlyExitForCausalLM", {"depth": "depth-adaptive-transformer"}),
    (r'use mixers=\["hippo"\]', {"memory": "hippo"}),
    ("'act' is of kind depth and cannot stand in memory", {"memory": "act"}),
    ("has no argument 'bais'", {"depth": {"id": "act", "bais": 1}}),
    ("expected 0 or more inputs", {"memory": -1}),
    ("around 'performer'", {"memory": "transformer-xl", "mixers": ["performer"]}),
    ("give position=None or one that embeds", {"memory": "transformer-xl", "position": "alibi"}),
    ("kv_heads=None", {"memory": "transformer-xl", "kv_heads": 1}),
    ("no dropout of its weights", {"memory": "shortformer", "attention_dropout": 0.1}),
    ("residual=None", {"depth": "act", "residual": "gtrxl"}),
    ("sharing=None", {"depth": "act", "sharing": [2]}),
    ("adds nothing between layers", {"depth": "act", "position": "per-layer-position"}),
]


@pytest.mark.parametrize(("match", "fields"), REFUSED, ids=lambda v: v if type(v) is str else "")
def test_what_does_not_fit_is_refused(match: str, fields: dict[str, Any]) -> None:
    with pytest.raises(LongspanError, match=match):
        built(**fields)


def test_what_does_not_fit_a_model_is_refused() -> None:
    for memory in (4, "transformer-xl"):
        with pytest.raises(LongspanError, match="of causal layers"):
            built(LongspanForMaskedLM, memory=memory)
    with pytest.raises(LongspanError, match="HourglassConfig arranges its layers itself"):
        HourglassConfig(memory=4)
    with pytest.raises(LongspanError, match="leave depth out"):
        UniversalConfig(depth="act")
    with pytest.raises(LongspanError, match="leave output_hidden_states out"):
        built(depth="act")(ids(1, 3), output_hidden_states=True)
    with pytest.raises(LongspanError, match="each='position'"):
        built(depth={"id": "act", "each": "sequence"})(ids(1, 3))
