"""SPALM: the gated output layer and the model around it (Yogatama et al., 2021)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from longspan.errors import LongspanError
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.models.spalm import SpalmConfig, SpalmForCausalLM
from longspan.nn.retrieval import Base, Found
from longspan.registry import build
from longspan.retrieval import Datastore, Stored, neighbours

VOCABULARY, WIDTH, LENGTH = 11, 16, 9


def base() -> Base:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    return Base(hidden @ weight.mT, hidden, weight)


def found(*values: int) -> Found:
    slots = torch.tensor(values).expand(2, LENGTH, len(values))
    return Found(torch.zeros(slots.shape, dtype=torch.float64), slots)


def reader(**options: float) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build("spalm", width=WIDTH, **options).double()


def test_equals_the_formula_in_numpy() -> None:
    told, layer = base(), reader()
    read = layer.read(told, found(3, 7, 7, -1))
    assert told.hidden is not None
    assert told.weight is not None
    w, wg = told.weight.numpy(), layer.score.weight.detach().numpy()[0]
    for h, z, g, weights in zip(
        told.hidden[0].numpy(), *(part[0].detach().numpy() for part in read), strict=True
    ):
        y = w[[3, 7, 7]]
        share = np.exp(y @ h) / np.exp(y @ h).sum()
        gate = 1 / (1 + np.exp(-wg @ h))
        np.testing.assert_allclose(weights, [*share, 0], rtol=1e-10)
        np.testing.assert_allclose(g, [gate], rtol=1e-10)
        np.testing.assert_allclose(z, (1 - gate) * share @ y + gate * h, rtol=1e-10)
    logits = read.z @ told.weight.mT
    torch.testing.assert_close(layer(told, found(3, 7, 7, -1)), logits.log_softmax(-1))


def test_gate_1_is_the_backbone_and_gate_0_the_neighbour() -> None:
    told = base()
    assert told.weight is not None
    alone = reader(gate=1.0)(told, found(4, 5))
    torch.testing.assert_close(alone, told.logits.log_softmax(-1))
    only = reader(gate=0.0)(told, found(4))
    want = (told.weight @ told.weight[4]).log_softmax(-1)
    torch.testing.assert_close(only, want.expand_as(only))


def test_duplicates_share_weight() -> None:
    told, layer = base(), reader()
    twice = layer.read(told, found(3, 7, 7)).weights
    scores = torch.stack([told.logits[..., 3], told.logits[..., 7] + np.log(2)], -1)
    merged = scores.softmax(-1)
    torch.testing.assert_close(twice[..., 1] + twice[..., 2], merged[..., 1])


def test_gradients_reach_the_embedding_through_both_and_no_key() -> None:
    told, layer = base(), reader(gate=0.0)
    weight = told.weight.clone().requires_grad_()  # pyright: ignore[reportOptionalMemberAccess]
    scores = torch.zeros(2, LENGTH, 1, dtype=torch.float64, requires_grad=True)
    only = Found(scores, found(4).values)
    z = layer.read(told._replace(weight=weight), only).z
    (through,) = torch.autograd.grad(z.sum(), weight)
    assert through[4].any()
    assert not through[:4].any()
    out = layer(told._replace(weight=weight), only)[..., 2].sum()
    whole, key = torch.autograd.grad(out, (weight, scores), allow_unused=True)
    assert whole.any(1).all(), "the output softmax too"
    assert key is None


def test_needs_states_and_embedding() -> None:
    with pytest.raises(LongspanError, match="Base"):
        reader()(Base(base().logits), found(1))
    with pytest.raises(LongspanError, match="gate"):
        build("spalm", width=4, gate=2.0)


def model(**options: object) -> SpalmForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        memory = {"id": "transformer-xl", "memory": 32}
        settings = {"vocab_size": VOCABULARY, "width": WIDTH, "layers": 2, "heads": 2}
        settings |= {"mixers": [memory], "position": None, "initializer_range": 0.3}
        return SpalmForCausalLM(SpalmConfig(**settings, **options)).eval()


def tokens(length: int = 24) -> Tensor:
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


def near(length: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(-1, VOCABULARY, (2, length, 4), generator=generator)


def test_default_backbone_is_transformer_xl() -> None:
    config = SpalmConfig(vocab_size=VOCABULARY, width=WIDTH, layers=1, heads=2)
    assert config.tiled() == ["transformer-xl"]
    assert config.position is None
    with pytest.raises(LongspanError, match="tie_word_embeddings"):
        SpalmConfig(tie_word_embeddings=False)


def test_without_neighbours_or_with_gate_1_it_is_its_backbone() -> None:
    lm = model()
    plain = LongspanForCausalLM(LongspanConfig(**_shared(lm.config)))
    plain.load_state_dict({n: t for n, t in lm.state_dict().items() if "reader" not in n})
    want = plain.eval()(tokens()).logits.log_softmax(-1)
    torch.testing.assert_close(lm(tokens()).logits, want)
    torch.testing.assert_close(model(gate=1.0)(tokens(), neighbours=near()).logits, want)
    assert not torch.allclose(lm(tokens(), neighbours=near()).logits, want)


def _shared(config: SpalmConfig) -> dict[str, object]:
    names = ("vocab_size", "width", "layers", "heads", "mixers", "position")
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize("sizes", [(1,) * 24, (7, 12, 5)])
def test_steps_and_segments_equal_the_whole(sizes: tuple[int, ...]) -> None:
    lm = model()
    whole = lm(tokens(), neighbours=near()).logits
    outs, cache = [], None
    for x, n in zip(tokens().split(sizes, 1), near().split(sizes, 1), strict=True):
        output = lm(x, neighbours=n, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        outs.append(output.logits)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-4, atol=1e-5)


def test_sees_no_future_and_no_other_positions_neighbours() -> None:
    lm, other, ids = model(), near(), tokens()
    whole = lm(ids, neighbours=other).logits
    changed, mixed = other.clone(), ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % VOCABULARY
    mixed[:, 10:] = (mixed[:, 10:] + 1) % VOCABULARY
    assert torch.equal(lm(mixed, neighbours=changed).logits[:, :10], whole[:, :10])


def test_padding_changes_nothing() -> None:
    lm, ids, other = model(), tokens(), near()
    whole = lm(ids, neighbours=other).logits
    left = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    far = torch.cat([torch.full((2, 3, 4), 5), other], 1)
    keep = (torch.arange(27) >= 3).long().expand(2, -1)
    got = lm(left, keep, neighbours=far).logits[:, 3:]
    torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-5)


def test_the_model_s_embedding_learns_as_input_as_output_and_as_neighbours() -> None:
    lm, x = model().double(), tokens()
    out = lm(x, neighbours=near(), labels=x).loss
    weight, score = lm.lm_head.weight, lm.reader.score.weight
    hidden, values = lm.model(x).last_hidden_state, near()
    y, none = weight[values.clamp(min=0)], (values < 0).all(-1, keepdim=True)
    attention = (y @ hidden[..., None])[..., 0].masked_fill((values < 0) & ~none, -torch.inf)
    m = (attention.softmax(-1)[..., None] * y).sum(2)
    gate = (hidden @ score.T).sigmoid().masked_fill(none, 1)
    logits = ((1 - gate) * m + gate * hidden) @ weight.T
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(out, want, check_dtype=False)
    for got, by_hand in zip(
        *(torch.autograd.grad(loss, [weight, score]) for loss in (out, want)), strict=True
    ):
        torch.testing.assert_close(got, by_hand, rtol=1e-5, atol=1e-7)


def test_learns_whom_to_trust_from_a_datastore_and_is_saved(tmp_path: Path) -> None:
    """Neighbours by a frozen encoder, own position excluded; keys stay, the gate and W learn."""
    stream = torch.randint(VOCABULARY, (12,), generator=torch.Generator().manual_seed(3)).repeat(6)
    encoder = LongspanForCausalLM(
        LongspanConfig(vocab_size=VOCABULARY, width=WIDTH, layers=1, heads=2)
    )
    store = Datastore.create(tmp_path / "store", width=WIDTH)
    ids = store.read(encoder, stream, window=24)
    seen = neighbours(encoder, stream, Stored(store, 4, own=ids.start), window=24).values
    before = store.keys(torch.arange(20)).clone()
    lm = model().train()
    x = stream[None, :-1]
    optimiser = torch.optim.Adam(lm.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = lm(x, neighbours=seen, labels=x).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for p in lm.parameters())
    assert torch.equal(store.keys(torch.arange(20)), before)
    lm.eval().save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(again(x, neighbours=seen).logits, lm(x, neighbours=seen).logits)
    with pytest.raises(LongspanError, match="positions"):
        lm(x, neighbours=seen[:, :5])
