"""Sparse Transformer's patterns, its three uses and its claims."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import longspan
from longspan.errors import LongspanError
from longspan.hub import StateCache
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.nn import FeedForward, MultiHead
from longspan.testing.oracles import oracle_of

FORMS: list[dict[str, Any]] = [
    {"form": "strided", "stride": 7},
    {"form": "strided", "stride": 7, "inclusive": True},
    {"form": "strided", "stride": 1},
    {"form": "fixed", "stride": 8, "summary": 2},
    {"form": "fixed", "stride": 9, "summary": 3, "stripes": 3},
]
USES = [
    {"use": "merged"},
    {"use": "heads"},
    {"use": "interleaved", "layer": 1},
    {"use": "interleaved"},
]


def inputs(length: int, heads: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, heads, length, 4)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("use", USES, ids=lambda u: f"{u['use']}{u.get('layer', '')}")
@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
@pytest.mark.parametrize("length", [1, 6, 40, 65])
def test_every_form_and_use_is_its_mask(
    length: int, form: dict[str, Any], use: dict[str, Any], causal: bool
) -> None:
    attend = longspan.build("sparse-transformer", causal=causal, **form, **use)
    oracle = oracle_of("sparse-transformer")
    assert oracle
    qkv = [t.requires_grad_() for t in inputs(length)]
    got, want = attend(*qkv)[0], oracle(attend, *qkv, keep=None)
    assert_close(got, want)
    weight = inputs(length)[0].flip(2)
    found, wanted = (
        torch.autograd.grad(t, qkv, weight, materialize_grads=True) for t in (got, want)
    )
    assert_close(found, wanted)


@pytest.mark.parametrize("use", USES, ids=lambda u: f"{u['use']}{u.get('layer', '')}")
@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
def test_steps_equal_the_whole(form: dict[str, Any], use: dict[str, Any]) -> None:
    attend = longspan.build("sparse-transformer", causal=True, **form, **use)
    q, k, v = inputs(30)
    whole, state, outs = attend(q, k, v)[0], None, []
    for sizes in (slice(0, 11), slice(11, 12), *(slice(t, t + 1) for t in range(12, 30))):
        o, state = attend(q[:, :, sizes], k[:, :, sizes], v[:, :, sizes], state)
        outs.append(o)
    assert_close(torch.cat(outs, 2), whole)


def masks(length: int, causal: bool = True, **form: Any) -> tuple[Tensor, Tensor]:
    built = [
        longspan.build("sparse-transformer", causal=causal, use="interleaved", layer=n, **form)
        for n in (0, 1)
    ]
    first, second = (b.sees.head(0).mask(length, length) for b in built)
    return first, second


@pytest.mark.parametrize("length", [1, 20, 37])
def test_two_steps_reach_every_earlier_token(length: int) -> None:
    """Strided in either order; fixed with A1 first and then A2 and itself (Sec. 4.2)."""
    whole = torch.ones(length, length, dtype=torch.bool).tril()
    for first, second in (
        masks(length, stride=6),
        masks(length, stride=6)[::-1],
        masks(length, form="fixed", stride=6, summary=1),
    ):
        later = second | torch.eye(length, dtype=torch.bool)
        assert torch.equal((later.int() @ first.int()) > 0, whole)


def test_limits_are_full_attention() -> None:
    whole = torch.ones(20, 20, dtype=torch.bool).tril()
    assert torch.equal(masks(20, stride=20)[0], whole)
    assert torch.equal(masks(20, form="fixed", stride=20)[0], whole)
    assert torch.equal(masks(20, stride=1)[1], whole)


def test_edges_grow_with_the_root() -> None:
    """O(L √L) with l = √L: each key of the union is counted once."""
    for root in (16, 32):
        for form in ({"form": "strided"}, {"form": "fixed", "summary": 4}):
            sees = longspan.build("sparse-transformer", causal=True, stride=root, **form).sees
            pattern = sees.head(0)
            length = root * root
            assert pattern.edges(length, length) == int(pattern.mask(length, length).sum())
            assert pattern.edges(length, length) <= 2.6 * length * root


def test_it_refuses() -> None:
    for arguments in ({"stride": 0}, {"form": "fixed", "stride": 8, "summary": 9}):
        with pytest.raises(LongspanError, match="must be positive and fit"):
            longspan.build("sparse-transformer", **arguments)


def config(**changes: Any) -> LongspanConfig:
    """The paper's model, small: interleaved layers over an 8 × 4 × 3 grid."""
    layers = [
        {"id": "sparse-transformer", "stride": 12, "use": "interleaved", "layer": n} for n in (0, 1)
    ]
    said: dict[str, Any] = {
        "vocab_size": 32,
        "width": 24,
        "layers": 4,
        "heads": 2,
        "mixers": layers,
        "position": None,
        "axes": [8, 4, 3],
        "initialisation": "scaled",
        "tie_word_embeddings": False,
    }
    return LongspanConfig(**(said | changes))


def made(**changes: Any) -> LongspanForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LongspanForCausalLM(config(**changes)).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 32, shape, generator=torch.Generator().manual_seed(1))


def awake(**changes: Any) -> LongspanForCausalLM:
    """With weights as after training: at the start the logits say nothing."""
    model = made(**changes)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def test_blocks_are_the_papers() -> None:
    """H + a + b with a = attn(LN(H)), b = ff(LN(H + a)), and a final norm (Sec. 5.3)."""
    model = awake().double().model
    h = torch.randn(2, 20, 24, dtype=torch.float64)
    x = h + model.position.embed(torch.zeros_like(h), torch.arange(20)[None])
    for layer in model.layers:
        a = layer.mixer(layer.mixer_norm(x))[0]
        x = x + a + layer.feed_forward(layer.feed_forward_norm(x + a))
    assert_close(model(inputs_embeds=h)[0], model.norm(x))


def test_layers_interleave_both_patterns() -> None:
    layers = made().model.layers
    assert [layer.mixer.attention.layer for layer in layers] == [0, 1, 0, 1]
    near, far = (layer.mixer.attention.sees.head(0).mask(30, 30) for layer in layers[:2])
    assert near[29].nonzero()[:, 0].tolist() == list(range(18, 30))
    assert far[29].nonzero()[:, 0].tolist() == [5, 17, 29]


def test_scaled_initialisation() -> None:
    """0.125 / √(fan in), the last matrices by 1 / √(2N) more, biases and logits 0 (Sec. 6)."""
    model = made(width=256, layers=3, vocab_size=500, axes=[100, 100])

    def relative(weight: Tensor) -> float:
        return weight.std().item() / (0.125 / weight.shape[1] ** 0.5)

    for layer in model.model.layers:
        mixer, feed = layer.mixer, layer.feed_forward
        assert isinstance(mixer, MultiHead)
        assert isinstance(feed, FeedForward)
        for linear in (*mixer.project.values(), feed.up):
            assert relative(linear.weight) == pytest.approx(1, rel=0.05)
        for linear in (mixer.output, feed.down):
            assert relative(linear.weight) == pytest.approx(6**-0.5, rel=0.05)
        for linear in (*mixer.project.values(), feed.up, mixer.output, feed.down):
            assert not linear.bias.any()
        assert bool((layer.mixer_norm.weight == 1).all())
    assert relative(model.model.embed_tokens.weight) == pytest.approx(1, rel=0.05)
    for table in model.model.position.tables:
        assert relative(table) == pytest.approx(2**-0.5, rel=0.05)


def test_logits_start_at_zero(tmp_path: Any) -> None:
    model, x = made(), tokens(2, 30)
    assert not model.lm_head.weight.any()
    assert_close(model(x, labels=x).loss, torch.tensor(32.0).log())
    trained = awake()
    trained.save_pretrained(tmp_path)
    assert torch.equal(LongspanForCausalLM.from_pretrained(tmp_path)(x).logits, trained(x).logits)
    with pytest.raises(LongspanError, match="give tie_word_embeddings=False"):
        config(tie_word_embeddings=True)


def test_the_residual_stream_does_not_grow_with_depth() -> None:
    deviations = []
    for layers in (8, 128):
        model = made(layers=layers)
        grown = torch.cat(
            [layer.feed_forward.down.weight.flatten() for layer in model.model.layers]
        )
        assert grown.std().item() == pytest.approx(0.125 / (96 * 2 * layers) ** 0.5, rel=0.1)
        states = model(tokens(2, 60), output_hidden_states=True).hidden_states
        last = model.model.layers[-1](states[-2])[0]
        deviations.append((last - states[0]).std().item())
        assert model.model.norm(last).std().item() == pytest.approx(1, rel=0.05)
    assert 0.5 < deviations[1] / deviations[0] < 2
    assert max(deviations) < 1


def test_positions_are_a_table_for_each_axis() -> None:
    position = made().model.position
    x = torch.zeros(1, 96, 24)
    y = position.embed(x, torch.arange(96)[None])
    rows, columns, channels = position.tables
    for t in (0, 1, 3, 50, 95):
        want = rows[t // 12] + columns[t // 3 % 4] + channels[t % 3]
        assert_close(y[0, t], want)
    with pytest.raises(LongspanError, match="96 places and got position 96"):
        position.embed(x[:, :1], torch.tensor([[96]]))
    with pytest.raises(LongspanError, match="expected the sizes of a grid"):
        made(axes=[4, 0])
    with pytest.raises(LongspanError, match="both add to the embeddings"):
        made(position="learned-position")


@pytest.mark.parametrize("form", [{"form": "strided"}, {"form": "fixed", "summary": 2}])
def test_recomputed_gradients_are_equal_under_dropout(form: dict[str, Any]) -> None:
    mixers = [{"id": "sparse-transformer", "stride": 8, "use": "heads", **form}]
    gradients = []
    for again in (False, True):
        model = awake(dropout=0.3, mixers=mixers).train()
        if again:
            model.activation_checkpointing_enable()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            x = tokens(2, 40)
            model(x, labels=x).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(g is not None and g.any() for g in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_model_steps() -> None:
    model, x = awake(), tokens(2, 40)
    whole, cache = model(x).logits, StateCache()
    pieces = [model(p, past_key_values=cache).logits for p in x.split([17, 1, 21, 1], 1)]
    assert_close(torch.cat(pieces, 1), whole)
