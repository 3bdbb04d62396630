"""Perceiver: positions, sharing, modalities, the classifier, transformers' weights."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError
from longspan.models.perceiver import PerceiverConfig, PerceiverForClassification
from longspan.nn.reading import Modalities, Places, Reading, fourier_features, grid_positions
from longspan.registry import build

SIZES: dict[str, Any] = {
    "width": 12,
    "latents": 5,
    "layers": 2,
    "heads": 3,
    "channels": 3,
    "bands": 4,
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classifier(**arguments: Any) -> PerceiverForClassification:
    given: dict[str, Any] = {
        "crosses": [0, 1, 1],
        "blocks": [0, 0, 0],
        "num_labels": 4,
        "shape": [4, 5],
        **SIZES,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PerceiverForClassification(PerceiverConfig(**given | arguments)).eval()


@pytest.mark.parametrize("raw", [True, False])
def test_fourier_features_are_transformers(raw: bool) -> None:
    theirs = pytest.importorskip("transformers.models.perceiver.modeling_perceiver")
    pos = grid_positions([3, 4, 2])
    got = fourier_features(pos, bands=5, resolution=[3, 9, 20], raw=raw)
    want = theirs.generate_fourier_features(pos[None], 5, (3, 9, 20), concat_pos=raw)
    assert_close(got, want.view(got.shape))
    assert got.shape[1] == 3 * (2 * 5 + raw)
    assert_close(pos, theirs.build_linear_positions([3, 4, 2]).flatten(0, -2))


def test_frequencies_are_evenly_spaced_and_times_pi() -> None:
    got = fourier_features(torch.tensor([[0.3]]), bands=3, resolution=[8], raw=False)
    angles = torch.pi * 0.3 * torch.tensor([1.0, 2.5, 4.0])
    assert_close(got[0], torch.cat([angles.sin(), angles.cos()]))


def test_learned_positions_belong_to_places() -> None:
    places = Places([2, 3], channels=4)
    assert places(normal(2, 6, 1)).shape == (2, 6, 4)
    with pytest.raises(LongspanError, match="build it with the array's shape"):
        places(normal(2, 7, 1))
    with pytest.raises(LongspanError, match="leave pos out"):
        places(normal(2, 6, 1), normal(2, 6, 2))
    with pytest.raises(LongspanError, match="one an axis"):
        fourier_features(normal(2, 6, 2), bands=3, resolution=[4])


def test_one_reading_is_its_formula() -> None:
    reading, x, source = Reading(width=6, heads=2, source_width=4), normal(1, 3, 6), normal(1, 7, 4)
    a = reading.attention
    q, s = a.q(reading.norm(x))[0], reading.source_norm(source)  # pyright: ignore
    k, v = a.k(s)[0], a.v(s)[0]
    heads = [
        (q[:, h] @ k[:, h].T / 3**0.5).softmax(-1) @ v[:, h] for h in (slice(0, 3), slice(3, 6))
    ]
    z = x[0] + a.output(torch.cat(heads, -1))
    want = z + reading.feed.down(torch.nn.functional.gelu(reading.feed.up(reading.feed_norm(z))))
    assert_close(reading(x, source)[0], want)


def test_reading_oneself_is_self_attention() -> None:
    cross, self_ = Reading(width=6, heads=2, source_width=6), Reading(width=6, heads=2)
    self_.load_state_dict({n: t for n, t in cross.state_dict().items() if "source" not in n})
    x = normal(2, 5, 6)
    assert_close(cross(x, x), self_(x))


def test_sharing_is_a_pattern_and_the_first_reading_keeps_its_own() -> None:
    sizes = {"width": 12, "source_width": 7, "latents": 5, "layers": 2, "heads": 3}
    shared = build("perceiver", crosses=[0, 1, 1], blocks=[0, 0, 0], **sizes)
    assert (len(shared.read), len(shared.think)) == (2, 1)
    apart = build("perceiver", crosses=range(3), blocks=range(3), **sizes)
    for i, j in enumerate(shared.crosses):
        apart.read[i].load_state_dict(shared.read[j].state_dict())
        apart.think[i].load_state_dict(shared.think[0].state_dict())
    apart.start.load_state_dict(shared.start.state_dict())
    x = normal(2, 9, 7)
    z = shared.start(2)
    for i in (0, 1, 1):
        z = shared.think[0](shared.read[i](z, x))
    assert_close(shared(x), z)
    assert_close(apart(x), z)
    for wrong in ({"crosses": [0, 2, 2]}, {"crosses": [0, 1]}, {"crosses": [], "blocks": []}):
        with pytest.raises(LongspanError, match="same length"):
            build("perceiver", **sizes | {"blocks": [0, 0, 0]} | wrong)


def test_the_order_of_inputs_with_their_positions_does_not_matter() -> None:
    model, x, pos = classifier(), normal(2, 20, 3), grid_positions([4, 5]).expand(2, -1, -1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    whole = model(x).logits
    assert_close(model(x[:, order], pos=pos[:, order]).logits, whole)
    assert not torch.allclose(model(x[:, order]).logits, whole)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_masked_inputs_change_nothing(side: str) -> None:
    model, x = classifier(positions="none"), normal(2, 9, 3)
    hole = x.new_full((2, 4, 3), torch.nan)
    parts = {"left": [hole, x], "right": [x, hole], "middle": [x[:, :3], hole, x[:, 3:]]}[side]
    padded = torch.cat(parts, 1)
    keep = ~padded[..., 0].isnan()
    assert_close(model(padded, keep.long()).logits, model(x).logits)


def test_modalities_are_padded_with_learned_codes() -> None:
    both = Modalities({"sound": 2, "sight": 5}, padding=2)
    sound, sight = normal(2, 3, 2), normal(2, 4, 5)
    keeps = {"sound": torch.tensor([[True, True, False]]).expand(2, -1)}
    x, keep = both({"sight": sight, "sound": sound}, keeps=keeps)
    assert x.shape == (2, 7, 7)
    assert_close(x[:, :3, :2], sound)
    assert_close(x[0, 5, 5:], both.codes["sight"].data)
    assert keep is not None
    assert keep[0].tolist() == [True, True, False, True, True, True, True]
    reading = build("perceiver", width=6, source_width=7, latents=3, layers=1, heads=2)
    reading(x, keep=keep).sum().backward()
    assert all(p.grad is not None for p in both.parameters())
    with pytest.raises(LongspanError, match="'sight' has 4 channels"):
        both({"sight": normal(2, 4, 4)})


@pytest.mark.parametrize("positions", ["fourier", "learned"])
def test_the_classifier_learns_where_and_reloads(positions: str, tmp_path: Any) -> None:
    model = classifier(positions=positions, place_channels=8)
    labels = torch.arange(16) % 4
    x = 0.1 * normal(16, 20, 3)
    x[torch.arange(16), labels * 6] += 3
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = model(x, labels=labels).loss.item()
    for _ in range(60):
        loss = model(x, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert loss.item() < 0.3 * first
    model.save_pretrained(tmp_path)
    again = PerceiverForClassification.from_pretrained(tmp_path)
    assert_close(again(x).logits, model(x).logits)
    with pytest.raises(LongspanError, match="channels=2"):
        model(x[..., :2])
