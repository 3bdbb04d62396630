"""Segment recurrence through `Trainer`: each batch starts from the states the last one left."""

from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from longspan.errors import LongspanError
from longspan.hub import StateCache
from longspan.nn import load_state, save_state
from longspan.training.named import NamedLosses


class SegmentTrainer(NamedLosses):
    """A Trainer whose rows are streams: row b of a batch goes on where row b of the last ended.

    States pass from batch to batch without gradient, start anew with every epoch, and are saved
    in every checkpoint, so that a resumed run equals an uninterrupted one bit by bit. Data are
    read in order: give `longspan.data.Segments(...).rows()`. In evaluation batches stand alone;
    `longspan.models.evaluation.carried` evaluates with states.

    Raises:
        LongspanError: several GPUs in one process; a checkpoint without states.
    """

    cache: StateCache

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "past_key_values": self.cache, "use_cache": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.cache = self.cache.detach()
        return (loss, outputs) if return_outputs else loss

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        if self.args.n_gpu > 1:
            raise LongspanError(
                "segment recurrence needs one process per GPU: start it by torchrun or accelerate."
            )
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(str(self.args.output_dir))
        self.cache = self._restored(Path(str(checkpoint))) if checkpoint else StateCache()
        keeper = _Keeper(self)
        self.add_callback(keeper)
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.remove_callback(keeper)

    def save_states(self, folder: Path) -> None:
        """Write the carried states of this process into a checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        save_state(self.cache.carried(), self._file(folder))

    def _restored(self, folder: Path) -> StateCache:
        path = self._file(folder)
        if not path.is_file():
            raise LongspanError(
                f"{folder} holds no {path.name}: it was not saved by a SegmentTrainer with as many "
                "processes. Resume from another checkpoint, or start anew."
            )
        state = load_state(path, device=str(self.args.device))
        return StateCache() if state is None else StateCache.of(state)

    def _file(self, folder: Path) -> Path:
        return folder / f"segment_states_{self.args.process_index}.safetensors"

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """In order, whatever the arguments say: shuffled, the states would be nonsense."""
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(data)


class _Keeper(TrainerCallback):
    def __init__(self, trainer: SegmentTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A run resumed within an epoch begins it too, and goes on with the states it restored.
        if not state.epoch or float(state.epoch).is_integer():
            self.trainer.cache = StateCache()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.save_states(Path(args.output_dir) / f"checkpoint-{state.global_step}")
