"""Synthesizer's six forms and their mixtures: laws, identities, counts, and where it stands."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from longspan import build, show
from longspan.errors import LongspanError
from longspan.models import LongspanConfig, LongspanForCausalLM, LongspanForSeq2SeqLM, LongspanModel
from longspan.nn import MultiHead
from longspan.testing import check, laws_for
from longspan.testing.oracles import oracle_of

ALONE = (
    "dense",
    "random",
    "random-fixed",
    "factorized-dense",
    "factorized-random",
    "vanilla",
)
COSTLY = {"compiles", "costs_what_it_says", "carries_what_it_says"}
LAWS = [name for name in laws_for(show("synthesizer")) if name not in COSTLY]
OF_EACH = ("equals_its_oracle", "no_peeking", "large_scores_stay_finite", "every_parameter_learns")
CASES = [(ALONE, law) for law in LAWS] + [((form,), law) for form in ALONE for law in OF_EACH]
SIZES = {"heads": 3, "head_width": 8, "length": 130}


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def made(*forms: str, **changes: Any) -> Any:
    return build("synthesizer", **{**SIZES, "forms": list(forms), **changes}).double()


def qkv(length: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 3, length, 8, dtype=torch.float64)
    return q, k, v


@pytest.mark.parametrize(("forms", "law"), CASES, ids=str)
def test_every_form_and_mixture_keeps_the_laws(forms: tuple[str, ...], law: str) -> None:
    """Padding, causality and steps of all forms at once; each alone by its formula."""
    verdict = check(law, replace(show("synthesizer"), tiny={**SIZES, "forms": list(forms)}))
    assert verdict.result == "pass", verdict.reason


@pytest.mark.parametrize("left", [0, 20])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("forms", [("random",), ("random", "factorized-dense")], ids="+".join)
def test_over_several_tiles(forms: tuple[str, ...], causal: bool, left: int) -> None:
    """Longer than a tile of biases, padded on either side, and the last queries alone."""
    module, formula = made(*forms, causal=causal, length=300), oracle_of("synthesizer")
    assert formula is not None
    keep = torch.zeros(2, 300, dtype=torch.bool)
    keep[:, left : left + 270] = True
    inputs = qkv(300)
    for mask in (None, keep):
        got, want = module(*inputs, keep=mask)[0], formula(module, *inputs, keep=mask)
        rows = torch.ones_like(keep) if mask is None else mask
        assert_close(got * rows[:, None, :, None], want * rows[:, None, :, None])
        toward = torch.randn_like(want) * rows[:, None, :, None]
        learned = list(module.parameters())
        found, wanted = (torch.autograd.grad(t, learned, toward) for t in (got, want))
        assert_close(found, wanted)
    if causal:
        q, k, v = inputs
        assert_close(module(q[:, :, 290:], k, v)[0], module(q, k, v)[0][:, :, 290:])


def test_random_of_zeros_is_a_mean_and_causally_a_running_mean() -> None:
    q, k, v = qkv()
    count = torch.arange(1, 31, dtype=v.dtype)[:, None]
    for causal, want in (
        (False, v.mean(2, keepdim=True).expand_as(v)),
        (True, v.cumsum(2) / count),
    ):
        module = made("random", causal=causal)
        nn.init.zeros_(module.r)
        assert_close(module(q, k, v)[0], want)


@pytest.mark.parametrize("forms", [("dense", "random"), ("vanilla", "factorized-dense"), ALONE])
def test_a_mixture_with_all_its_weight_on_one_is_that_one(forms: tuple[str, ...]) -> None:
    inputs, mixed = qkv(), made(*forms)
    for n, form in enumerate(forms):
        nn.init.constant_(mixed.alpha, -1e4)
        mixed.alpha.data[n] = 0
        alone = made(form)
        alone.load_state_dict({name: mixed.state_dict()[name] for name in alone.state_dict()})
        assert_close(mixed(*inputs)[0], alone(*inputs)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_vanilla_is_attention(causal: bool) -> None:
    inputs = qkv()
    plain = build("multi-head-attention", causal=causal)
    assert_close(made("vanilla", causal=causal)(*inputs)[0], plain(*inputs)[0])


def test_random_factors_of_full_rank_are_random() -> None:
    inputs = qkv()
    factors, whole = made("factorized-random", rank=130), made("random")
    with torch.no_grad():
        factors.r1.copy_(whole.r)
        factors.r2.copy_(torch.eye(130))
    assert_close(factors(*inputs)[0], whole(*inputs)[0])


def test_dense_without_weights_is_a_fixed_pattern_random_with_equal_rows() -> None:
    q, k, v = qkv()
    dense, random = made("dense"), made("random")
    nn.init.zeros_(dense.w2)
    nn.init.normal_(dense.b2)
    with torch.no_grad():
        random.r.copy_(dense.b2.mT.expand(-1, 130, -1))
    assert_close(dense(q, k, v)[0], random(q, k, v)[0])
    assert_close(dense(q + 5, k, v)[0], random(q, k, v)[0])


@pytest.mark.parametrize(("length", "factors"), [(12, (3, 4)), (11, (3, 4)), (130, None)])
def test_dense_factors_are_the_flattened_outer_product(
    length: int, factors: tuple[int, int] | None
) -> None:
    """Also where N is no product: a · b ≥ N columns, cut."""
    n = min(length, 30)
    q, k, v = qkv(n)
    module = made("factorized-dense", length=length, factors=factors)
    a = q.relu() @ module.wa.mT + module.ba.mT
    c = q.relu() @ module.wc.mT + module.bc.mT
    outer = torch.einsum("bhlc,bhla->bhlca", c, a).flatten(3)
    assert outer.shape[3] >= length
    assert_close(module(q, k, v)[0], outer[..., :n].softmax(-1) @ v)


def test_tile_and_repeat_differ() -> None:
    """Were both tiled, column j and column j + a would always score alike."""
    module = made("factorized-dense", length=16, factors=(4, 4))
    q, k, _ = qkv(16)
    weights = module(q, k, torch.eye(16, dtype=q.dtype).expand(2, 3, -1, -1))[0]
    assert weights.log().sub(weights.log().mean(-1, keepdim=True)).unique().numel() > 16
    assert not torch.allclose(weights[..., :4], weights[..., 4:8])


def test_parameter_counts() -> None:
    """Per head: N (D + 1), N², none, (D + 1) (a + b), 2 N k, none, and a weight a component."""
    n, d, k, a, b = 130, 8, 5, 10, 13
    counts = {
        "dense": n * (d + 1),
        "random": n * n,
        "random-fixed": 0,
        "factorized-dense": (d + 1) * (a + b),
        "factorized-random": 2 * n * k,
        "vanilla": 0,
    }

    def count(*forms: str) -> int:
        return sum(p.numel() for p in made(*forms, rank=k, factors=(a, b)).parameters())

    for form, each in counts.items():
        assert count(form) == 3 * each
    assert count(*ALONE) == 3 * sum(counts.values()) + len(ALONE)


def test_fixed_random_is_a_saved_buffer_without_gradient() -> None:
    module = made("random-fixed")
    assert list(module.state_dict()) == ["fixed"]
    assert not list(module.parameters())
    q, k, v = qkv()
    assert module(q, k, v.requires_grad_())[0].requires_grad


@pytest.mark.parametrize("form", ["random", "random-fixed", "factorized-random"])
def test_fresh_random_rows_are_far_from_one_hot(form: str) -> None:
    module = made(form)
    q, k, _ = qkv(130)
    weights = module(q, k, torch.eye(130, dtype=q.dtype).expand(2, 3, -1, -1))[0]
    entropy = -(weights * weights.log()).sum(-1)
    assert entropy.mean() > 0.7 * torch.tensor(130.0).log()


@pytest.mark.parametrize("forms", [*((form,) for form in ALONE), ALONE], ids="+".join)
def test_autocast_casts_what_is_learned(forms: tuple[str, ...]) -> None:
    around = MultiHead(build("synthesizer", **SIZES, forms=list(forms)), width=24, heads=3)
    x = torch.randn(2, 20, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = around(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), around(x)[0], atol=0.05, rtol=0.05)


def test_only_vanilla_projects_keys() -> None:
    for forms, names in ((["dense"], {"q", "v"}), (["dense", "vanilla"], {"q", "k", "v"})):
        around = MultiHead(build("synthesizer", **SIZES, forms=forms), width=24, heads=3)
        assert set(around.project) == names


def test_the_state_holds_keys_for_vanilla_alone() -> None:
    for forms, width in ((("random", "dense"), 0), (("random", "vanilla"), 8)):
        state = made(*forms, causal=True)(*qkv(7))[1]
        assert state.k.shape == (2, 3, 7, width)
        assert state.v.shape == (2, 3, 7, 8)


CONFIG = {
    "vocab_size": 32,
    "width": 24,
    "layers": 2,
    "heads": 3,
    "length": 40,
    "position": None,
    "mixers": [
        {"id": "synthesizer", "forms": ["random", "vanilla"]},
        {"id": "synthesizer", "forms": ["factorized-dense"]},
    ],
}


def test_encoder_decoder_and_both_replace_self_attention_only() -> None:
    config = LongspanConfig(**CONFIG, decoder_start_token_id=0)
    for model in (LongspanModel(config), LongspanForCausalLM(config).model):
        kinds = {type(layer.mixer.attention).__name__ for layer in model.layers}
        assert kinds == {"Synthesizer"}
    both = LongspanForSeq2SeqLM(config)
    for layer in both.decoder.layers:
        assert type(layer.mixer.attention).__name__ == "Synthesizer"
        assert type(layer.cross.attention).__name__ == "SoftmaxAttention"
    x, y = torch.randint(1, 32, (2, 9)), torch.randint(1, 32, (2, 5))
    both(x, labels=y).loss.backward()
    said = {"max_new_tokens": 6, "do_sample": False}
    both.eval()
    assert torch.equal(both.generate(x, **said), both.generate(x, use_cache=False, **said))


def test_it_refuses_what_does_not_fit() -> None:
    for forms in ([], ["dense", "dense"], ["sparse"]):
        with pytest.raises(LongspanError, match="several different of dense, random"):
            made(*forms)
    with pytest.raises(LongspanError, match="make 12 columns for length=13"):
        made("factorized-dense", length=13, factors=(3, 4))
    with pytest.raises(LongspanError, match="3 heads of width 8 and got 2 of 8"):
        made("dense")(*(t[:, :2] for t in qkv()))
    q, k, v = qkv()
    with pytest.raises(LongspanError, match="no cross form"):
        made("vanilla")(q[:, :, :9], k, v)


@pytest.mark.parametrize("form", ALONE)
def test_longer_inputs_are_refused_with_and_without_a_state(form: str) -> None:
    module = made(form, length=20, causal=True)
    with pytest.raises(LongspanError, match="at most 20 tokens and got 30"):
        module(*qkv())
    _, state = module(*qkv(15))
    with pytest.raises(LongspanError, match="at most 20 tokens and got 21"):
        module(*qkv(6), state)
    padded = torch.arange(30) < 20
    assert module(*qkv(), keep=padded.expand(2, -1))[0].isfinite().all()
