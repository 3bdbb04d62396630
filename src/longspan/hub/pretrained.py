"""What every longspan model needs of PreTrainedModel: loading, recomputation, its own cache."""

from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer

from longspan.hub.cache import StateCache
from longspan.nn import Block

Built = TypeVar("Built", bound=nn.Module)


class Layer(GradientCheckpointingLayer, Block):
    """A block that transformers may recompute in the backward pass."""


class Pretrained(PreTrainedModel):
    """What all longspan models need of PreTrainedModel.

    Mechanisms initialise themselves in their constructors, so loading builds the model on the
    device at hand instead of on "meta", and what the checkpoint does not hold (non-persistent
    buffers, new heads) keeps what the constructor gave it.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _is_stateful = True
    _no_split_modules = ["Layer"]  # noqa: RUF012 - transformers reads and replaces it
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def post_init(self) -> None:
        super().post_init()
        self._declared = {
            name: (p.requires_grad, getattr(p, "_optim", None))
            for name, p in self.named_parameters()
        }

    @classmethod
    def get_init_context(cls, *arguments: Any, **named: Any) -> list[AbstractContextManager[Any]]:
        contexts = super().get_init_context(*arguments, **named)
        return [c for c in contexts if not (isinstance(c, torch.device) and c.type == "meta")]

    def _move_missing_keys_from_meta_to_device(
        self, missing_keys: Any, *arguments: Any, **named: Any
    ) -> None:
        lost = set(missing_keys) | set(self._non_persistent())
        built = {
            name: tensor
            for name, tensor in (*self.named_parameters(), *self.named_buffers())
            if name in lost and tensor.device.type != "meta"
        }
        super()._move_missing_keys_from_meta_to_device(missing_keys, *arguments, **named)
        now = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        with torch.no_grad():
            for name, tensor in built.items():
                now[name].copy_(tensor)
        # Loading replaces parameters by new ones, which lose these marks.
        for name, parameter in self.named_parameters():
            trains, optim = self._declared[name]
            parameter.requires_grad_(trains)
            if optim is not None:
                parameter._optim = optim  # pyright: ignore[reportAttributeAccessIssue]

    def _initialize_missing_keys(self, *arguments: Any, **named: Any) -> None:
        """Nothing: the constructor has initialised everything."""

    def _non_persistent(self) -> list[str]:
        return [
            f"{path}.{name}" if path else name
            for path, module in self.named_modules()
            for name in module._non_persistent_buffers_set
        ]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        *arguments: Any,
    ) -> None:
        super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            generation_config, model_kwargs, generation_mode, *arguments
        )
        if not self.steps:
            generation_config.use_cache = model_kwargs["use_cache"] = False
        elif generation_config.use_cache is not False:
            cache = model_kwargs.setdefault("past_key_values", StateCache())
            drafts = generation_mode == GenerationMode.ASSISTED_GENERATION
            if isinstance(cache, StateCache) and (drafts or generation_config.is_assistant):
                cache.activate_past_recording()

    @property
    def steps(self) -> bool:
        """Whether every mechanism carries a state from which to continue."""
        return True


def settled(module: Built) -> Built:
    """Mark a module as initialised, so that transformers leaves its parameters as they are."""
    for part in module.modules():
        part._is_hf_initialized = True  # pyright: ignore[reportArgumentType]
    return module


def recompute(model: PreTrainedModel) -> None:
    """Turn on gradient checkpointing, under either of transformers' names for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()
