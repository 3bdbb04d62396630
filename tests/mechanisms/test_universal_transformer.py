"""Universal Transformers: the paper's formulas, and all that a model must do."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from longspan import LongspanError, build
from longspan.hub import StateCache, recompute
from longspan.mechanisms.adaptive_depth.universal_transformer import Recurrence
from longspan.models import LongspanConfig, LongspanModel
from longspan.models.universal import (
    UniversalConfig,
    UniversalForCausalLM,
    UniversalForMaskedLM,
    UniversalForSeq2SeqLM,
    UniversalForSequenceClassification,
    UniversalModel,
)
from longspan.nn.auxiliary import collect
from longspan.testing import counting

E, H, T = 24, 3, 4
HALTING = {"bias": -1.0}


def body(**arguments: Any) -> Any:
    torch.manual_seed(0)
    arguments = {"width": E, "heads": H, "steps": T} | arguments
    built = build("universal-transformer", **arguments).double().eval()
    if built.halting is not None:
        torch.nn.init.normal_(built.halting.halt.weight, std=0.5)
    return built


def example(*shape: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, E, generator=generator, dtype=torch.float64)


def waves(at: int) -> Tensor:
    c = torch.arange(E // 2, dtype=torch.float64)
    angle = at / 10000 ** (2 * c / E)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten()


def attention(heads: Any, x: Tensor, y: Tensor, causal: bool, keep: Tensor | None) -> Tensor:
    def cut(name: str, of: Tensor) -> Tensor:
        return heads.project[name](of).unflatten(-1, (H, -1)).transpose(1, 2)

    q, k, v = cut("q", x), cut("k", y), cut("v", y)
    scores = q @ k.mT / (E // H) ** 0.5
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None], -torch.inf)
    return heads.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def formula(
    ut: Any, x: Tensor, *, causal: bool, copies: bool = True, keep=None, encoded=None
) -> tuple[Tensor, Tensor]:
    """(y, N): every step of every position computed, halted ones then put back (App.)."""
    block, act = ut.blocks[0], ut.halting
    h, y = x, torch.zeros_like(x)
    total, taken = x.new_zeros(x.shape[:2]), torch.zeros(x.shape[:2], dtype=torch.long)
    running = torch.ones(x.shape[:2], dtype=torch.bool)
    place = torch.stack([waves(i) for i in range(x.shape[1])])
    for t in range(T):
        a = h + place + waves(t)
        a = block.mixer_norm(a + attention(block.mixer, a, a, causal, keep))
        if encoded is not None:
            a = block.cross_norm(a + attention(block.cross, a, encoded, False, None))
        new = block.feed_forward_norm(a + block.feed_forward.down(F.relu(block.feed_forward.up(a))))
        p = act.halt(h)[..., 0].sigmoid()
        last = running & (total + p >= 1 - act.eps) if t + 1 < T else running
        w = torch.where(last, 1 - total, p) * running
        h = torch.where(running[..., None], new, h) if copies else new
        y = w[..., None] * new + (1 - w[..., None]) * y
        taken += running
        total = total + w * ~last
        running = running & ~last
    return y, taken


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("form", ["encoder", "decoder", "crossed"])
def test_equals_the_papers_formula(form, copies):
    """Halted states copied, or transformed on; encoder, decoder and encoder–decoder."""
    causal, cross = form != "encoder", form == "crossed"
    ut = body(causal=causal, cross=cross, halting=HALTING | {"copies": copies})
    encoded = example(2, 9, seed=5) if cross else None
    x = example(2, 9).requires_grad_()
    want, taken = formula(ut, x, causal=causal, copies=copies, encoded=encoded)
    assert len(taken.unique()) > 1
    got, _ = ut(x, encoded=encoded)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert torch.equal(ut.taken, taken)
    wanted = [x, *ut.parameters()]
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), wanted, allow_unused=True),
        torch.autograd.grad(want.square().sum(), wanted, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_copying_changes_what_others_see():
    one, other = (body(halting=HALTING | {"copies": copies}) for copies in (True, False))
    assert not torch.allclose(one(example(2, 9))[0], other(example(2, 9))[0])


def test_constant_p_gives_its_closed_form():
    """Weights p, p, …, remainder: earlier states fade by 1 − w of each later step."""
    ut = body(halting={}, steps=6)
    torch.nn.init.zeros_(ut.halting.halt.weight)
    torch.nn.init.constant_(ut.halting.halt.bias, -0.8)
    p = ut.halting.halt.bias.detach().sigmoid()  # 0.31: three steps and a remainder of 0.07
    x, states = example(2, 7), []
    for n in range(1, 5):
        plain = body(halting=None, steps=n)
        plain.blocks.load_state_dict(ut.blocks.state_dict())
        states.append(plain(x)[0])
    want = torch.zeros_like(x)
    for w, s in zip((p, p, p, 1 - 3 * p), states, strict=True):
        want = w * s + (1 - w) * want
    torch.testing.assert_close(ut(x)[0], want)
    assert (ut.taken == 4).all()


def test_fixed_depth_is_a_tied_transformer():
    """P added once and no time: a stack of T layers whose weights are the same."""
    sizes: dict[str, Any] = {"width": E, "heads": H, "vocab_size": 32, "activation": "relu"}
    torch.manual_seed(0)
    ours: Any = UniversalModel(
        UniversalConfig(**sizes, steps=T, coordinates="first", time="none", causal=True)
    ).double()
    stack: Any = LongspanModel(
        LongspanConfig(
            **sizes, layers=T, position="sinusoidal-position", norm_order="post", causal=True
        )
    ).double()
    stack.embed_tokens.load_state_dict(ours.embed_tokens.state_dict())
    recurrence: Any = ours.layers[0]
    for layer in stack.layers:
        layer.load_state_dict(recurrence.blocks[0].state_dict())
    x = tokens(2, 9)
    torch.testing.assert_close(ours(x).last_hidden_state, stack(x).last_hidden_state)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 32, shape, generator=torch.Generator().manual_seed(seed))


def model(kind: Any = UniversalForCausalLM, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 32, "width": E, "heads": H, "steps": T, "length": 64}
    built = kind(UniversalConfig(**(sizes | {"halting": HALTING} | changes))).eval()
    with torch.no_grad():
        for part in built.modules():
            if isinstance(part, Recurrence) and part.halting is not None:
                part.halting.halt.weight.normal_(std=0.5)
        built.get_input_embeddings().weight.mul_(30)
    return built


FORMS = [
    {},
    {"halting": None},
    {"halting": HALTING | {"copies": False}},
    {"transition": "separable", "taps": [3, 4]},
    {"time": "learned", "layers": 2},
    {"position": "rope", "coordinates": "none", "norm_order": "pre"},
    {"mixers": ["linear-transformer"]},
]


def named(changes: dict[str, Any]) -> str:
    return "-".join(str(v) for v in changes.values()) or "act"


@pytest.mark.parametrize("changes", FORMS, ids=named)
def test_pieces_with_a_cache_give_the_whole(changes):
    one, x, cache = model(**changes), tokens(2, 11), StateCache()
    whole = one(x).logits
    pieces = [one(p, past_key_values=cache).logits for p in x.split([4, 1, 5, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=2e-5)


def test_a_cache_holds_a_state_for_each_step_and_layer():
    one, cache = model(layers=2, halting=None), StateCache()
    one(tokens(1, 5), past_key_values=cache)
    steps = cache.states[0].steps
    assert len(steps) == T
    keys = [own.attention.k for step in steps for own, _ in step]
    assert len(keys) == 2 * T
    assert not torch.allclose(keys[0], keys[2])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("changes", FORMS, ids=named)
def test_padding_changes_nothing(changes, side):
    one, x, pad = model(**changes), tokens(2, 7), tokens(2, 3, seed=5)
    mask = torch.ones(2, 7, dtype=torch.long)
    order = [pad, x] if side == "left" else [x, pad]
    masks = [mask[:, :3] * 0, mask] if side == "left" else [mask, mask[:, :3] * 0]
    got = one(torch.cat(order, 1), torch.cat(masks, 1)).logits
    got = got[:, 3:] if side == "left" else got[:, :7]
    torch.testing.assert_close(got, one(x).logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("changes", FORMS, ids=named)
def test_no_peeking(changes):
    one, x = model(**changes).double(), tokens(2, 11)
    early = one(x).logits[:, :6]
    depth = one.model.taken[:, :6]
    other = one(torch.cat([x[:, :6], tokens(2, 5, seed=9)], 1)).logits[:, :6]
    torch.testing.assert_close(other, early, rtol=0, atol=1e-12)
    assert torch.equal(one.model.taken[:, :6], depth)


@pytest.mark.parametrize("changes", FORMS, ids=named)
def test_trains_and_reports_its_ponder_cost(changes):
    one, x = model(**changes).train(), tokens(2, 9)
    out = one(x, labels=x)
    if one.config.halting is None:
        assert out.auxiliary is None
        assert (one.model.taken == T).all()
    else:
        plain = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        torch.testing.assert_close(out.loss, plain + out.auxiliary["ponder"])
        mean = 0.01 * one.model.taken.float().mean()
        assert mean < out.auxiliary["ponder"] < mean + 0.01
    out.loss.backward()
    for name, parameter in one.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_recomputed_gradients_are_the_same():
    one, x = model().train(), tokens(2, 9)
    again = copy.deepcopy(one)
    recompute(again)
    for each in (one, again):
        each(x, labels=x).loss.backward()
    for a, b in zip(one.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("changes", FORMS, ids=named)
def test_saves_and_loads(changes, tmp_path):
    one, x = model(**changes), tokens(2, 9)
    one.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is UniversalForCausalLM
    torch.testing.assert_close(loaded(x).logits, one(x).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_generates_as_it_scores():
    one, x = model(), tokens(2, 5)
    out = one.generate(x, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for n in range(5, 11):
        assert torch.equal(one(out[:, :n]).logits[:, -1].argmax(-1), out[:, n])


def test_other_steps_in_evaluation():
    one = model(halting=None, steps=2, steps_eval=5)
    one(tokens(1, 4))
    assert (one.model.taken == 5).all()
    one.train()(tokens(1, 4))
    assert (one.model.taken == 2).all()


def test_encoders_mask_and_classify():
    x = tokens(2, 9)
    masked = model(UniversalForMaskedLM)
    assert masked(x, labels=x).logits.shape == (2, 9, 32)
    classes = model(UniversalForSequenceClassification, num_labels=3)
    out = classes.train()(x, labels=torch.tensor([0, 2]))
    assert "ponder" in out.auxiliary
    assert out.logits.shape == (2, 3)


def test_encoder_and_decoder_count_their_own_steps():
    one = model(UniversalForSeq2SeqLM, encoder_steps=3, decoder_start_token_id=0, halting=None)
    source, target = tokens(2, 9), tokens(2, 9, seed=3)
    one(source, labels=target).loss.backward()
    assert (one.encoder.taken == 3).all()
    assert (one.decoder.taken == T).all()
    assert one.lm_head.weight is one.encoder.embed_tokens.weight
    halting = model(UniversalForSeq2SeqLM, decoder_start_token_id=0)
    whole = halting(source, decoder_input_ids=target).logits
    cache = StateCache()
    pieces = [
        halting(source, decoder_input_ids=p, past_key_values=cache).logits
        for p in target.split([4, 5], 1)
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=2e-5)


def test_convolutions_of_a_decoder_see_the_past_only():
    ut = body(transition="separable", causal=True, taps=[3, 5], halting=None)
    x = example(1, 12).requires_grad_()
    (gradient,) = torch.autograd.grad(ut(x)[0][:, 5, 0].sum(), x)
    assert not gradient[:, 6:].any()
    both = body(transition="separable", taps=[3, 5], halting=None)
    (gradient,) = torch.autograd.grad(both(x)[0][:, 5, 0].sum(), x)
    assert gradient[:, 6:].any()


def test_halting_early_saves_most_of_the_work():
    x = example(1, 64)
    slow, fast = body(halting={"bias": -9.0}, steps=8), body(halting={"bias": -0.5}, steps=8)
    for ut in (slow, fast):
        torch.nn.init.normal_(ut.halting.halt.weight, std=0.1)
    costs = [counting.flops(lambda ut=ut: ut(x)) for ut in (slow, fast)]
    depth = fast.taken.double().mean() / 8
    assert depth < 0.6
    assert costs[1] < (float(depth) + 0.15) * costs[0]


def test_refuses():
    with pytest.raises(LongspanError, match="at least 1"):
        body(steps=0)
    with pytest.raises(LongspanError, match="transition"):
        model(transition="dense conv")
    one, cache = model(steps=2, steps_eval=3), StateCache()
    one(tokens(1, 4), past_key_values=cache)
    with pytest.raises(LongspanError, match="3 steps"):
        one.train()(tokens(1, 4), past_key_values=cache)


def test_state_of_the_body_reaches_the_ponder_cost():
    ut = body(causal=True, halting={"bias": -1.0, "cost": 1.0}).train()
    ut(example(2, 5))
    (value,) = collect(ut).values()
    assert value >= ut.taken.double().mean()
