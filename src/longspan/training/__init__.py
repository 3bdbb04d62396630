"""Training through `transformers.Trainer`: segment recurrence, parameter groups, schedules."""

from longspan.training.groups import parameter_groups
from longspan.training.recipes import language_model
from longspan.training.schedules import Phase, staged
from longspan.training.segments import SegmentTrainer

__all__ = ["Phase", "SegmentTrainer", "language_model", "parameter_groups", "staged"]
