"""SLiM's gradients are those of full backpropagation, in memory that falls with the chunk."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from longspan import build
from longspan.errors import LongspanError
from longspan.models import LongspanConfig, LongspanForCausalLM


def model(mixer: Any = "linear-transformer", **options: Any) -> Any:
    arguments: dict[str, Any] = {"width": 8, "heads": 2, "layers": 2, "vocab_size": 7} | options
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = LongspanForCausalLM(LongspanConfig(mixers=[mixer], **arguments))
        for p in built.parameters():
            p.data.add_(torch.randn_like(p) * 0.1)
    return built.double().eval()


def tokens(length: int = 13) -> Tensor:
    return torch.randint(7, (2, length), generator=torch.Generator().manual_seed(0))


def gradients(of: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in of.named_parameters()}
    of.zero_grad()
    return found


def check(of: Any, chunk: int, keep: Tensor | None = None) -> None:
    ids = tokens()
    labels = ids if keep is None else ids.masked_fill(~keep, -100)
    if keep is not None:  # what follows padding is not predicted from it
        labels[:, 1:].masked_fill_(~keep[:, :-1], -100)
    mask = None if keep is None else keep.long()
    logits = of(ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())  # in float64
    loss.backward()
    want = gradients(of)
    got = build("slim-performer", chunk=chunk)(of, ids, keep=keep)
    assert_close(got, loss.detach())
    assert_close(gradients(of), want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 50])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_gradients_are_exact(order: str, chunk: int) -> None:
    check(model(norm_order=order), chunk)


def favor(x: Tensor) -> Tensor:
    """exp(w·x − |x|²/2) along orthogonal directions, without a maximum (FAVOR+)."""
    x = x * x.shape[-1] ** -0.25
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    rows = torch.linalg.qr(square).Q * 2
    return (x @ rows - x.square().sum(-1, keepdim=True) / 2).exp()


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "square": torch.square,
    "abs": torch.abs,
    "favor": favor,
    "square of a multiple of e features": lambda x: torch.cat([x, x + 1], -1).square(),
}


@pytest.mark.parametrize("features", FEATURES)
def test_every_feature_map(features: str) -> None:
    of = model()
    for layer in of.model.layers:
        layer.mixer.attention.features = FEATURES[features]
    check(of, 4)


def test_a_performer_of_relu_features() -> None:
    check(model({"id": "performer", "kernel": "relu", "features": 8}), 4)


def test_learned_positions_start_at_the_chunks_offset() -> None:
    check(model(position="learned-position", length=20), 4)


@pytest.mark.parametrize("left", [False, True])
def test_padding_and_one_normalisation_for_all(left: bool) -> None:
    keep = torch.ones(2, 13, dtype=torch.bool)
    keep[1, :6] = not left
    keep[1, 7:] = left
    check(model(), 4, keep)


def test_dropout_is_replayed() -> None:
    """Two runs draw the same masks, and the gradient is that of the loss they give."""
    of = model(dropout=0.3).train()
    slim = build("slim-performer", chunk=4, seed=3)
    state = torch.get_rng_state()
    loss = slim(of, tokens())
    found = gradients(of)["model.layers.0.mixer.output.weight"]
    assert torch.equal(slim(of, tokens()), loss)
    assert torch.equal(torch.get_rng_state(), state)
    weight, step = of.model.layers[0].mixer.output.weight, 1e-6
    for i, j in ((0, 0), (3, 5)):
        sides = []
        for sign in (1, -1):
            weight.data[i, j] += sign * step
            sides.append(slim(of, tokens()))
            weight.data[i, j] -= sign * step
        assert_close(found[i, j], (sides[0] - sides[1]) / (2 * step), atol=1e-6, rtol=1e-4)


def test_refuses_what_it_cannot_undo() -> None:
    with pytest.raises(LongspanError, match="running sums"):
        build("slim-performer", chunk=4)(model("rwkv", position=None), tokens())
    with pytest.raises(LongspanError, match="no token to predict"):
        build("slim-performer")(model(), tokens(1))
    with pytest.raises(LongspanError, match="at least 1"):
        build("slim-performer", chunk=0)


MEASURE = """
import resource, sys, torch
from longspan import build
from longspan.models import LongspanConfig, LongspanForCausalLM
model = LongspanForCausalLM(LongspanConfig(mixers=["linear-transformer"], width=64, layers=2))
ids = torch.randint(256, (1, 8192))
build("slim-performer", chunk=64)(model, ids[:, :128])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
build("slim-performer", chunk=int(sys.argv[1]))(model, ids)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_falls_with_the_chunk() -> None:
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", MEASURE, str(chunk)]))
        for chunk in (8192, 1024, 128)
    ]
    assert peaks[0] > 4 * peaks[1] > 4 * peaks[2]
