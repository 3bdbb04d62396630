"""Making transformers' Auto classes find longspan's models."""

from typing import Any

import transformers
from transformers import AutoConfig


def register(config: Any, models: dict[str, type]) -> None:
    """Make `Auto*` find the config and the models, given by their Auto class's name.

    >>> register(LongspanConfig, {"AutoModelForCausalLM": LongspanForCausalLM})
    """
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for name, model in models.items():
        getattr(transformers, name).register(config, model, exist_ok=True)
