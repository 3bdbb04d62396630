"""Training a row: transformers' Trainer under a budget of time or tokens, the same for all rows."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from longspan.bench.settings import Budget
from longspan.training import parameter_groups

WARM_UP, FLOOR = 0.05, 0.1
Batch = dict[str, Tensor]


@dataclass
class Progress(TrainerCallback):
    """The budget's clock: seconds and tokens of training alone, and what was measured on the way.

    Args:
        evaluate: bits per byte now; called at each fraction of `marks`, its time not counted.
    """

    budget: Budget
    tokens_per_step: int
    evaluate: Callable[[nn.Module], float] | None = None
    marks: list[float] = field(default_factory=lambda: [2.0**-k for k in range(6, -1, -1)])
    tell: Callable[[float], None] = lambda _: None
    seconds: list[float] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    spent: float = 0.0
    _since: float = 0.0

    @property
    def fraction(self) -> float:
        """How much of the budget is spent, 0 to 1."""
        if self.budget.seconds is not None:
            return min(1.0, self.spent / self.budget.seconds)
        assert self.budget.tokens is not None
        return min(1.0, self.tokens / self.budget.tokens)

    def rate(self, _: int) -> float:
        """Factor on the peak learning rate: linear warm-up, then a cosine down to a tenth."""
        if self.fraction < WARM_UP:
            return FLOOR + (1 - FLOOR) * self.fraction / WARM_UP
        after = (self.fraction - WARM_UP) / (1 - WARM_UP)
        return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * after))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any
    ) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self.spent += now - self._since
        self.tokens += self.tokens_per_step
        if self.evaluate is not None and self.marks and self.fraction >= self.marks[0]:
            self.marks = [mark for mark in self.marks if mark > self.fraction]
            self.curve.append({"tokens": self.tokens, "bits_per_byte": self.evaluate(model)})
            model.train()
        self.tell(self.fraction)
        control.should_training_stop = self.fraction >= 1
        self._since = time.perf_counter()


class _Stream(IterableDataset[Batch]):
    def __init__(self, draw: Callable[[], Batch]) -> None:
        self.draw = draw

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.draw()


def train(
    model: nn.Module,
    draw: Callable[[], Batch],
    progress: Progress,
    *,
    rate: float,
    seed: int,
    device: str,
) -> None:
    """AdamW (β 0.9, 0.95; decay 0.1), gradients clipped to norm 1, float32.

    Parameters that ask for a lower rate or another decay get it (`parameter_groups`).

    Args:
        draw: the next batch, as the model's keyword arguments.
    """
    groups = parameter_groups(model, lr=rate, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=10**9,
            per_device_train_batch_size=1,
            max_grad_norm=1.0,
            seed=seed,
            use_cpu=device == "cpu",
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=_Stream(draw),
            data_collator=lambda batches: batches[0],
            optimizers=(optimizer, LambdaLR(optimizer, progress.rate)),
            callbacks=[progress],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
