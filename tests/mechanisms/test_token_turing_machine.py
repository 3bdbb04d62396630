"""Token Turing Machines: summarisers, processors, writes, streaming, the video model."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from longspan import LongspanError
from longspan.mechanisms.recurrent_memory.token_turing_machine import AddErase, Learner
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.models.token_turing import TokenTuringConfig, TokenTuringModel
from longspan.registry import build

E, T, N = 12, 5, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def machine(**arguments: Any) -> Any:
    given = {"width": E, "heads": 3, "memory": 6, "reads": 3, "inputs": N, "layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build("token-turing-machine", **given | arguments).double().eval()


PARTS = [
    {"summariser": s, "write": w, "processor": p, "positions": where}
    for s, w, p, where in product(
        ("learner", "attention"),
        ("summary", "erase"),
        ("transformer", "mixer", "mlp"),
        (True, False),
    )
]
SIMPLIFIED = [{"simplified": True, "processor": p} for p in ("transformer", "mixer", "mlp")]


@pytest.mark.parametrize(
    "parts", [*PARTS, *SIMPLIFIED, {"write": "erase", "released": True}], ids=str
)
def test_every_part_steps_as_the_sequence_learns_and_never_peeks(parts: dict) -> None:
    module, x = machine(**parts), normal(2, T, N, E).requires_grad_()
    whole, last = module.sequence(x)
    assert whole.shape == (2, T, 3, E)
    outs, m = [], torch.zeros(2, 6, E, dtype=torch.float64)
    for t in range(T):
        o, m = module.step(x[:, t], m)
        outs.append(o)
    assert_close(torch.stack(outs, 1), whole)
    assert_close(m, last)
    (g,) = torch.autograd.grad(whole[:, 2].sum(), x, retain_graph=True)
    assert not g[:, 3:].any()
    whole.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_learned_weights_sum_to_one_over_tokens() -> None:
    with torch.random.fork_rng():
        learner = Learner(E, 3).double()
    v = normal(2, 7, E)
    one = torch.cat([v, torch.ones(2, 7, 1).double()], -1)
    weights = learner.scores(learner.norm(v)).softmax(1)
    assert_close((weights.mT @ one)[..., -1], torch.ones(2, 3).double())
    assert_close(learner(v), weights.mT @ v)  # of LN(V), applied to V
    for p in learner.scores.parameters():
        nn.init.zeros_(p)
    assert_close(learner(v), v.mean(1, keepdim=True).expand(-1, 3, -1))


@pytest.mark.parametrize("parts", PARTS[1::2], ids=str)
def test_the_order_of_input_tokens_does_not_matter_without_positions(parts: dict) -> None:
    x = normal(2, T, N, E)
    module, turned = machine(**parts), x[:, :, [2, 0, 3, 1]]
    assert_close(module.sequence(turned)[0], module.sequence(x)[0])
    placed = machine(**parts | {"positions": True})
    assert not torch.allclose(placed.sequence(turned)[0], placed.sequence(x)[0])


@pytest.mark.parametrize("released", [True, False])
def test_adding_and_erasing_are_their_formulas(released: bool) -> None:
    with torch.random.fork_rng():
        write = AddErase(E, 3, released=released).double()
    m, o = normal(1, 6, E), normal(1, 3, E, seed=1)
    s = write.scores(write.norm(m)).softmax(1)[0]  # M k
    e, a = (write.channels[n](write.tokens[n](o.mT).mT)[0] for n in ("erase", "add"))
    want = m[0].clone()
    for i in range(3):
        want = want * (1 - s[:, i, None] * torch.sigmoid(e[i]))
    parts = torch.stack([s[:, i, None] * a[i] for i in range(3)])
    want = want + ((1 - parts).mean(0) if released else parts.sum(0))
    assert_close(write(m, o)[0], want)


def test_the_write_reads_the_old_memory_and_the_new_outputs() -> None:
    module, x, m = machine(), normal(2, N, E), normal(2, 6, E, seed=3)
    o, later = module.step(x, m)
    assert_close(later, module.writes(torch.cat([m, x, o], 1)))
    assert_close(o, module.process(module.read(torch.cat([m, x], 1))))


def test_the_simplified_unit_splits_memory_first() -> None:
    module, x, m = machine(simplified=True), normal(2, N, E), normal(2, 6, E, seed=3)
    o, later = module.step(x, m)
    whole = module.process(torch.cat([m, module.read(x)], 1))
    assert_close(later, whole[:, :6])
    assert_close(o, whole[:, 6:])


@pytest.mark.parametrize("truncate", [None, 1, 2])
def test_gradients_go_back_so_many_steps(truncate: int | None) -> None:
    module, x = machine(truncate=truncate), normal(1, T, N, E).requires_grad_()
    (g,) = torch.autograd.grad(module.sequence(x)[0][:, -1].sum(), x)
    reached = g[0].flatten(1).any(-1).nonzero()[:, 0].tolist()
    assert reached == {None: [0, 1, 2, 3, 4], 1: [4], 2: [4]}[truncate]


def test_masked_frames_change_nothing() -> None:
    module, x = machine(), normal(1, T, N, E)
    keep = torch.tensor([[True, False, True, True, False]])
    o, m = module.sequence(x, keep=keep)
    want, last = module.sequence(x[:, [0, 2, 3]])
    assert_close(o[:, [0, 2, 3]], want)
    assert_close(m, last)
    assert not o[:, [1, 4]].any()


def test_bad_arguments_are_refused() -> None:
    for wrong in ({"reads": 0}, {"memory": -1}, {"truncate": 0}):
        with pytest.raises(LongspanError, match="1 or more"):
            machine(**wrong)
    with pytest.raises(LongspanError, match="positions are of 4"):
        machine(positions=True).sequence(normal(1, 2, N + 1, E))


def test_it_mixes_a_language_model() -> None:
    spec = {"id": "token-turing-machine", "memory": 6, "reads": 3, "layers": 1}
    config = LongspanConfig(vocab_size=11, width=E, layers=2, heads=3, mixers=[spec], position=None)
    with torch.random.fork_rng():
        model = LongspanForCausalLM(config).double().eval()
    tokens = torch.arange(9)[None] % 11
    first = model(tokens[:, :5], use_cache=True)
    rest = model(tokens[:, 5:], past_key_values=first.past_key_values).logits
    assert_close(torch.cat([first.logits, rest], 1), model(tokens).logits)


def video(encoder: nn.Module | None = None, **arguments: Any) -> Any:
    sizes = {"width": E, "heads": 3, "channels": 2, "size": 8, "patch": 4, "classes": 3}
    options = {"memory": 6, "reads": 3, "layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TokenTuringModel(TokenTuringConfig(**sizes, machine=options, **arguments), encoder)


def test_the_video_model_trains_streams_and_reloads(tmp_path: Any) -> None:
    model = video()
    frames = normal(2, T, 2, 8, 8).float()
    labels = (frames.mean((2, 3, 4)) > 0).long()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(frames, labels=labels).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.3 * losses[0]
    whole = model.eval()(frames)
    first = model(frames[:, :2])
    assert_close(model(frames[:, 2:], first.state).logits, whole.logits[:, 2:])
    model.save_pretrained(tmp_path)
    assert_close(TokenTuringModel.from_pretrained(tmp_path)(frames).logits, whole.logits)


def test_frames_may_be_encoded_by_anything_and_have_several_labels() -> None:
    class Split(nn.Module):
        def forward(self, frames: Tensor) -> Tensor:
            return frames.unflatten(1, (-1, E))

    model = video(Split(), loss="many")
    x = normal(2, T, 3 * E).float()
    keep = torch.ones(2, T, dtype=torch.bool)
    keep[:, 3:] = False
    labels = (normal(2, T, 3) > 0).float()
    got, want = model(x, keep=keep, labels=labels), model(x[:, :3], labels=labels[:, :3])
    assert_close(got.loss, want.loss)
