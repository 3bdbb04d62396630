"""Training: Trainer learns, segments carry, resuming changes nothing, groups and stages."""

from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from longspan import LongspanError
from longspan.hub import StateCache
from longspan.models import LongspanConfig, LongspanForCausalLM, LongspanForMaskedLM
from longspan.nn import auxiliary, detach, tensors
from longspan.training import SegmentTrainer, language_model, parameter_groups, staged

SIZES = {"vocab_size": 32, "width": 24, "layers": 2, "heads": 2, "length": 64}


class Streams(Dataset):
    """Example t · batch + b is segment t of row b, as `longspan.data.Segments(...).rows()`."""

    def __init__(self, batch: int, segments: int, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(0, 32, (batch, segments, length), generator=generator)

    def __len__(self) -> int:
        return self.rows.shape[0] * self.rows.shape[1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.rows[index % len(self.rows), index // len(self.rows)]
        return {"input_ids": ids, "labels": ids.clone()}


def text(size: int) -> np.ndarray:
    return (np.arange(size) * 7 % 11).astype(np.uint8)


def arguments(out: Path, **changes) -> TrainingArguments:
    said = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        "save_strategy": "no",
    }
    return TrainingArguments(output_dir=str(out), **(said | changes))


def model(kind=LongspanForCausalLM, **changes):
    set_seed(0)
    return kind(LongspanConfig(**(SIZES | changes)))


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def equal(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("segments", [False, True])
def test_the_recipe_learns(segments, tmp_path):
    trainer = language_model(
        text(2000),
        config=LongspanConfig(**SIZES, mixers=["multi-head-attention", "linear-transformer"]),
        out=tmp_path,
        valid=text(200),
        length=16,
        batch=4,
        steps=25,
        lr=1e-2,
        warmup=5,
        log_every=5,
        segments=segments,
        checkpointing=segments,
        cpu=True,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    assert trainer.evaluate()["eval_loss"] < losses[0] * 0.7
    assert (tmp_path / "checkpoint-25" / "model.safetensors").is_file()


def test_the_recipe_follows_its_seed_alone(tmp_path):
    def first(seed: int) -> list[torch.Tensor]:
        torch.rand(3)
        trainer = language_model(
            text(200), config=LongspanConfig(**SIZES), out=tmp_path, length=16, seed=seed, cpu=True
        )
        return weights(trainer)

    assert equal(first(1), first(1))
    assert not equal(first(1), first(2))


@pytest.mark.parametrize("kind", [LongspanForCausalLM, LongspanForMaskedLM])
def test_accumulated_batches_equal_one_large_one(kind, tmp_path):
    results = []
    for batch, accumulate in ((4, 1), (1, 4)):
        trainer = Trainer(
            model=model(kind),
            args=arguments(
                tmp_path,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulate,
                max_steps=3,
                learning_rate=1e-3,
                optim="sgd",
            ),
            train_dataset=Streams(4, 3, 8),
        )
        trainer.train()
        results.append(weights(trainer))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


MIXERS = ("multi-head-attention", "linear-transformer")


def carrying(out: Path, mixers=MIXERS, **changes) -> SegmentTrainer:
    said = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, "seed": 3} | changes
    return SegmentTrainer(
        model=model(mixers=mixers, dropout=0.1),
        args=arguments(out, **said),
        train_dataset=Streams(2, 4, 8),
    )


def test_segments_start_from_the_states_of_the_last(tmp_path):
    trainer = carrying(tmp_path, max_steps=3, learning_rate=0.0, save_strategy="no")
    seen, forward = [], trainer.model.forward

    @wraps(forward)
    def watched(*given, **named):
        cache = named["past_key_values"]
        seen.append((named["input_ids"], cache.get_seq_length(), cache.carried()))
        return forward(*given, **named)

    trainer.model.forward = watched
    trainer.train()
    assert [length for _, length, _ in seen] == [0, 8, 16]
    assert all(not t.requires_grad for t in tensors(seen[2][2]))
    assert equal([x for x, _, _ in seen], trainer.train_dataset.rows.unbind(1)[:3])
    assert trainer.cache.get_seq_length() == 24


def test_the_carried_state_is_that_of_the_whole_stream(tmp_path):
    trainer = carrying(tmp_path, max_steps=3, learning_rate=0.0, save_strategy="no")
    for part in trainer.model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    trainer.train()
    cache = StateCache()
    rows = trainer.train_dataset.rows[:, :3].flatten(1)
    trainer.model.eval()(rows, past_key_values=cache)
    given, expected = tensors(trainer.cache.carried()), tensors(detach(cache.carried()))
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("mixers", "at"),
    [(MIXERS, 3), (MIXERS, 4), (MIXERS, 6), ([{"id": "transformer-xl", "memory": 12}], 3)],
)
def test_resuming_is_bitwise_equal(mixers, at, tmp_path):
    """An epoch has 4 steps: resumed within the first, at its end, and within the second."""
    whole = carrying(tmp_path, mixers)
    whole.train()
    resumed = carrying(tmp_path, mixers)
    torch.manual_seed(77)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert equal(weights(whole), weights(resumed))
    assert equal(tensors(whole.cache.carried()), tensors(resumed.cache.carried()))
    assert whole.cache.get_seq_length() == resumed.cache.get_seq_length() == 24


def test_resuming_needs_the_saved_states(tmp_path):
    carrying(tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / "segment_states_0.safetensors").unlink()
    with pytest.raises(LongspanError, match="holds no segment_states_0"):
        carrying(tmp_path).train(resume_from_checkpoint=True)


def test_every_epoch_starts_anew(tmp_path):
    trainer = carrying(tmp_path, max_steps=5, save_strategy="no")
    trainer.train()
    assert trainer.cache.get_seq_length() == 8


class Slow(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.ones(3, 3))
        self.a._optim = {"lr": 1e-3, "weight_decay": 0.0}


def test_parameter_groups():
    built = model(position="learned-position")
    built.slow = Slow()
    built.model.layers[0].mixer.output.weight.requires_grad_(False)
    groups = parameter_groups(built, lr=1e-2, weight_decay=0.1)
    placed = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    trained = [p for p in built.parameters() if p.requires_grad]
    assert sorted(placed) == sorted(map(id, trained))
    assert sum(len(g["params"]) for g in groups) == len(trained)
    assert placed[id(built.slow.a)] == (1e-3, 0.0)
    assert placed[id(built.model.position.table)] == (1e-2, 0.0)
    assert placed[id(built.model.norm.weight)] == (1e-2, 0.0)
    assert placed[id(built.model.layers[1].mixer.output.weight)] == (1e-2, 0.1)
    assert placed[id(built.model.embed_tokens.weight)] == (1e-2, 0.1)
    slower = parameter_groups(built, lr=1e-4, weight_decay=0.1)
    assert {g["lr"] for g in slower} == {1e-4}


def test_stages_double_windows_and_halve_the_rate():
    phases = staged(windows=[32, 512])
    assert [p.length for p in phases] == [2048, 4096, 8192, 16384, 23040]
    assert [p.windows for p in phases][-1] == (512, 8192)
    assert [p.lr for p in phases] == [2.5e-4 / 2**i for i in range(5)]
    with pytest.raises(LongspanError, match="at least one phase"):
        staged(windows=[])


class _Adding(torch.nn.Module):
    """A part that asks for a loss of 0.5 in training."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        if self.training:
            auxiliary.report(self, "extra", torch.tensor(0.5))
        return self.inner(*args, **kwargs)


def test_losses_of_parts_are_added_and_logged_by_name(tmp_path):
    trainer = language_model(
        text(2000), config=LongspanConfig(**SIZES),
        out=tmp_path, length=32, batch=2, steps=2, log_every=1, cpu=True,
    )  # fmt: skip
    model = trainer.model
    batch = torch.arange(32)[None] % 32
    alone = model.eval()(batch, labels=batch)
    for layer in model.model.layers:
        layer.feed_forward = _Adding(layer.feed_forward)
    assert model.eval()(batch, labels=batch).auxiliary is None
    output = model.train()(batch, labels=batch)
    assert output.auxiliary == {"extra": torch.tensor(1.0)}
    torch.testing.assert_close(output.loss, alone.loss + 1)
    half = model(
        batch, labels=torch.cat([batch[:, :1] * 0 - 100, batch[:, 1:]], 1), num_items_in_batch=62
    )
    torch.testing.assert_close(half.loss, (alone.loss + 1) / 2)
    trainer.train()
    assert [entry["extra"] for entry in trainer.state.log_history if "loss" in entry] == [1.0, 1.0]
