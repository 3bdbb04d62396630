"""A Trainer that also logs the losses that parts of a model add, by name."""

from typing import Any

from torch import nn
from transformers import Trainer


class NamedLosses(Trainer):
    """`Trainer`, whose log holds the mean of each auxiliary loss since the last log."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            for name, value in (getattr(outputs, "auxiliary", None) or {}).items():
                self.__dict__.setdefault("seen", {}).setdefault(name, []).append(value)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what was seen, and forget it."""
        seen = self.__dict__.pop("seen", {})
        means = {name: float(sum(found) / len(found)) for name, found in seen.items()}
        super().log({**logs, **means}, start_time)
