"""Training by stages of growing length at a constant number of tokens a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from longspan.data.streams import Segments, Stream
from longspan.errors import LongspanError
from longspan.hub import StateCache
from longspan.nn.blockwise import BlockAttention
from longspan.training.segments import SegmentTrainer


@dataclass(frozen=True)
class Stage:
    """So many steps, or else epochs, at one length of segments."""

    length: int
    steps: int | None = None
    epochs: int | None = None


class Stages(Dataset[dict[str, Tensor]]):
    """Example n is the batch of step n: tokens / length rows of the stage's length (Press et al.,
    2020, Sec. 3).

    Within a stage rows are streams, as in `Segments`, which start over after the last segment. For
    a `SegmentTrainer` with `data_collator=only`, one example a batch, and `Staging` among its
    callbacks; optimiser and schedule go on from stage to stage.

    Args:
        tokens: in every batch, a multiple of each length.

    Raises:
        LongspanError: no stage, one without exactly one of steps and epochs, or tokens that its
            length does not divide.

    >>> Stages(data, tokens=4096, stages=[Stage(128, epochs=2), Stage(512, steps=10_000)])
    """

    def __init__(self, data: Stream, *, tokens: int, stages: Sequence[Stage]) -> None:
        self.parts: list[tuple[int, Segments]] = []
        self.size = 0
        for stage in stages:
            if (stage.steps is None) == (stage.epochs is None) or tokens % stage.length:
                raise LongspanError(
                    f"{stage} with {tokens} tokens a batch: expected either steps or epochs, and "
                    "a length that divides the tokens."
                )
            segments = Segments(data, batch=tokens // stage.length, length=stage.length)
            self.parts.append((self.size, segments))
            self.size += stage.steps or (stage.epochs or 0) * len(segments)
        if not self.size:
            raise LongspanError("the stages have no steps: give at least one stage of one step.")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first, segments = self.at(index)
        return segments[(index - first) % len(segments)]

    def at(self, step: int) -> tuple[int, Segments]:
        """The first step of a step's stage, and the stage's segments."""
        return [part for part in self.parts if part[0] <= step][-1]

    def starts(self, step: int) -> bool:
        """Whether the rows start over at this step."""
        first, segments = self.at(step)
        return (step - first) % len(segments) == 0


def only(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The batch that a list of one batch is."""
    (batch,) = examples
    return batch


class Staging(TrainerCallback):
    """Sets the length of segments and memories as stages begin, and starts states anew.

    Raises:
        LongspanError: a trainer that accumulates batches, or makes them of several examples.
    """

    def __init__(self, trainer: SegmentTrainer, stages: Stages) -> None:
        args = trainer.args
        if args.gradient_accumulation_steps != 1 or args.per_device_train_batch_size != 1:
            raise LongspanError(
                "an example of Stages is a batch: give per_device_train_batch_size=1 and "
                "gradient_accumulation_steps=1."
            )
        self.trainer, self.stages = trainer, stages

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step % len(self.stages)
        assert isinstance(self.trainer.model, nn.Module)
        resize(self.trainer.model, self.stages.at(step)[1].length)
        if self.stages.starts(step):
            self.trainer.cache = StateCache()


def resize(model: nn.Module, length: int) -> None:
    """Cut a model's segments at `length`, and give its memories the same share of it as before.

    States carried over do not fit another length: start anew.
    """
    for module in model.modules():
        if isinstance(module, BlockAttention) and module.block != length:
            module.memory = module.memory * length // module.block
            module.block = length
