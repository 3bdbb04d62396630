"""Shortformer: positions without a trace, re-based caches, staged training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import TrainingArguments

from longspan import LongspanError
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.models.evaluation import carried, non_overlapping, token_by_token
from longspan.nn import MultiHead, detach
from longspan.nn.positions import sinusoid
from longspan.registry import build
from longspan.training import SegmentTrainer
from longspan.training.stages import Stage, Stages, Staging, only

E, C = 12, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(**arguments: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = build("shortformer", **{"width": E, "heads": 3, "segment": C} | arguments)
    return built.double().eval()


def one_pass(module: Any, x: Tensor) -> Tensor:
    """Causal attention over all of x at positions 0 … L − 1, its matrix written out."""
    p = sinusoid(torch.arange(x.shape[1]), E, dtype=torch.float64)
    q, k, v = (
        module.project[n](t).unflatten(-1, (3, -1)).transpose(1, 2)
        for n, t in (("q", x + p), ("k", x + p), ("v", x))
    )
    scores = q @ k.mT / 2
    scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=x.dtype).triu(1)
    return module.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_segment_and_cache_are_one_pass_over_both() -> None:
    module, x = layer(), normal(2, 2 * C, E)
    whole = one_pass(module, x)
    first, state = module(x[:, :C])
    second, _ = module(x[:, C:], state)
    assert_close(first, whole[:, :C])
    assert_close(second, whole[:, C:])


def test_values_carry_no_position() -> None:
    """With W_q = W_k = 0 outputs are the same whatever P is."""
    module, plain, x = layer(), layer(), normal(2, 9, E)
    plain.infused = False
    for each in (module, plain):
        for name in "qk":
            torch.nn.init.zeros_(each.project[name].weight)
            torch.nn.init.zeros_(each.project[name].bias)
    assert_close(module(x)[0], plain(x)[0])
    assert not torch.allclose(layer()(x)[0], plain(x)[0])


def test_positions_start_over_wherever_the_segment_stands_in_the_text() -> None:
    """Equal cache and equal segment: equal outputs, after one segment or after many."""
    module, x, before = layer(), normal(2, 2 * C, E), normal(2, 4 * C, E, seed=1)
    late, _ = module(torch.cat([before, x], 1))
    early, _ = module(torch.cat([before[:, :C], x], 1))
    assert_close(late[:, -C:], early[:, -C:])
    assert_close(late[:, -C:], one_pass(module, x)[:, C:])


def test_generation_sees_l_plus_one_to_two_l_positions_and_starts_over() -> None:
    module, x = layer(), normal(1, 4 * C, E).requires_grad_()
    whole = module(x)[0]
    outs, state = [], None
    for t in range(4 * C):
        y, state = module(x[:, t : t + 1], state)
        outs.append(y)
    assert_close(torch.cat(outs, 1), whole)
    dense = layer()
    dense.memory = C
    for t in range(4 * C):
        start = max(t // C - 1, 0) * C
        # Gradients stop at the cache, so what is seen is told by values.
        changed = x.detach().clone()
        changed[:, :start] += 1
        assert_close(module(changed)[0][:, t], whole[:, t])
        if start < t // C * C:
            changed[:, start] += 1
            assert not torch.allclose(module(changed)[0][:, t], whole[:, t])


def test_cached_inputs_take_no_gradient() -> None:
    module, x = layer(), normal(1, 2 * C, E).requires_grad_()
    (g,) = torch.autograd.grad(module(x)[0][:, C:].sum(), x)
    assert not g[:, :C].any()
    assert g[:, C:].any()


@pytest.mark.parametrize("memory", [0, 2, 5, 8, 11])
def test_caches_of_any_length_stream(memory: int) -> None:
    module, x = layer(memory=memory), normal(2, 23, E)
    whole = module(x)[0]
    for sizes in ([1] * 23, [5, 5, 5, 5, 3], [7, 16]):
        outs, state = [], None
        for piece in x.split(sizes, 1):
            y, state = module(piece, detach(state))
            outs.append(y)
        assert_close(torch.cat(outs, 1), whole)
    start = max(20 - memory, 0)
    assert_close(whole[:, 20:], one_pass(module, x[:, start:])[:, 20 - start :])


@pytest.mark.parametrize(
    ("id", "given"),
    [("multi-head-attention", {}), ("linear-transformer", {}), ("longformer", {"window": 6})],
)
def test_any_attention_takes_infused_positions(id: str, given: dict) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        position = build("sinusoidal-position", into="queries-and-keys")
        attention = build(id, causal=True, **given)
        module = MultiHead(attention, width=E, heads=3, position=position).double()
    x, mask = normal(2, 9, E), torch.ones(2, 12, dtype=torch.bool)
    whole, _ = module(x)
    first, state = module(x[:, :4])
    assert_close(torch.cat([first, module(x[:, 4:], state)[0]], 1), whole)
    mask[:, :3] = False
    padded = torch.cat([torch.full((2, 3, E), torch.nan).double(), x], 1)
    assert_close(module(padded, keep=mask)[0][:, 3:], whole)
    if id == "multi-head-attention":
        assert_close(whole, one_pass(module, x))


def language_model(segment: int = 4) -> Any:
    config = LongspanConfig(
        vocab_size=11,
        width=E,
        layers=2,
        heads=3,
        mixers=[{"id": "shortformer", "segment": segment}],
        position=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LongspanForCausalLM(config)


def test_evaluation_cached_token_by_token_and_non_overlapping() -> None:
    model = language_model().double().eval()
    tokens = torch.randint(11, (33,), generator=torch.Generator().manual_seed(0))
    cached, single = carried(model, tokens, segment=4), token_by_token(model, tokens)
    assert_close(cached.nats, single.nats)
    alone = non_overlapping(model, tokens, window=4)
    forgetful = language_model().double().eval()
    forgetful.load_state_dict(model.state_dict())
    for block in forgetful.model.layers:
        block.mixer.memory = 0
    assert_close(alone.nats, carried(forgetful, tokens, segment=4).nats)
    assert alone.nats != cached.nats


def test_generation_is_that_of_the_model_without_cache() -> None:
    model = language_model().eval()
    prompt = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
    given = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    got, want = (model.generate(prompt, use_cache=c, **given) for c in (True, False))
    assert torch.equal(got, want)


DATA = (np.arange(200) * 7 % 11).astype(np.uint8)


def test_stages_keep_the_tokens_of_a_batch() -> None:
    stages = Stages(DATA, tokens=16, stages=[Stage(4, epochs=1), Stage(8, steps=5)])
    assert len(stages) == 12 + 5
    shapes = [tuple(stages[n]["input_ids"].shape) for n in range(len(stages))]
    assert shapes == [(4, 4)] * 12 + [(2, 8)] * 5
    assert [n for n in range(len(stages)) if stages.starts(n)] == [0, 12]
    assert torch.equal(stages[13]["input_ids"][0], torch.from_numpy(DATA[8:16].astype(np.int64)))
    for wrong in ([Stage(4)], [Stage(5, steps=1)], [Stage(4, 1, 1)], []):
        with pytest.raises(LongspanError, match=r"expected|at least one"):
            Stages(DATA, tokens=16, stages=wrong)


def staged_trainer(out: Path, **changes: Any) -> SegmentTrainer:
    stages = Stages(DATA, tokens=16, stages=[Stage(4, steps=3), Stage(8, steps=3)])
    args = TrainingArguments(
        output_dir=str(out),
        **{
            "max_steps": 6,
            "per_device_train_batch_size": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "steps",
            "save_steps": 1,
            "seed": 3,
        }
        | changes,
    )
    trainer = SegmentTrainer(
        model=language_model(4), args=args, train_dataset=stages, data_collator=only
    )
    trainer.add_callback(Staging(trainer, stages))
    return trainer


def test_a_staged_run_changes_data_and_cache_alone_and_resumes(tmp_path: Path) -> None:
    trainer = staged_trainer(tmp_path)
    seen: list[Any] = []
    first: Any = trainer.model.model.layers[0].mixer  # pyright: ignore
    first.register_forward_hook(
        lambda m, args, out: seen.append((args[0].shape[:2], m.block, m.memory, args[1] is None))
    )
    trainer.train()
    assert seen == [
        ((4, 4), 4, 4, True), ((4, 4), 4, 4, False), ((4, 4), 4, 4, False),
        ((2, 8), 8, 8, True), ((2, 8), 8, 8, False), ((2, 8), 8, 8, False),
    ]  # fmt: skip
    assert trainer.optimizer.state  # one optimiser all along
    again = staged_trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for a, b in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_stage_is_a_batch() -> None:
    with pytest.raises(LongspanError, match="per_device_train_batch_size=1"):
        staged_trainer(Path("unused"), per_device_train_batch_size=2)
