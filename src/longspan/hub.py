"""The one place that touches transformers' moving parts: caches, loading, Auto registries.

Written against transformers 5.6 to 5.23; what is overridden here is named there with an underscore
or has changed between minor versions.
"""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import can_return_tuple

from longspan.errors import LongspanError
from longspan.nn import Block, detach, fork, select, state_bytes
from longspan.nn.state import State

Built = TypeVar("Built", bound=nn.Module)

__all__ = ["Carried", "Layer", "Pretrained", "StateCache", "can_return_tuple", "register"]


class Carried(NamedTuple):
    """What a model carries between calls: the layers' states and how many tokens each row saw.

    `seen` (B) counts kept tokens, `columns` (B) all of them, padding included.
    """

    layers: State
    seen: Tensor
    columns: Tensor


class StateCache(Cache):
    """The states of all layers, under the interface by which `generate` handles a cache.

    Filled by the model, in place; what each layer's state holds, and whether it grows, is the
    mechanism's own affair. A fresh one stands for nothing seen.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    @classmethod
    def of(cls, carried: Carried) -> "StateCache":
        """A cache holding what `carried` gave."""
        cache = cls()
        cache.update_states(carried.layers, carried.seen, int(carried.columns.max()))
        return cache

    def carried(self) -> Carried | None:
        """The contents as one state, for saving, forking or resetting; None while empty."""
        if self.seen is None:
            return None
        return Carried(self.states, self.seen, torch.full_like(self.seen, self.length))

    def update_states(self, states: State, seen: Tensor, columns: int) -> None:
        """Take the states after `columns` more positions; `seen` is the new count of each row."""
        self.states, self.seen = states, seen
        self.length += columns

    def detach(self) -> "StateCache":
        """A new cache of the same states without their history."""
        cache = StateCache()
        if self.seen is not None:
            cache.update_states(detach(self.states), self.seen, self.length)
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes the states hold."""
        return state_bytes(self.states)

    @property
    def batch_size(self) -> int:
        return -1 if self.seen is None else self.seen.shape[0]

    @property
    def is_croppable(self) -> bool:
        return False

    def __len__(self) -> int:
        return 0 if self.states is None else len(self.states)

    def __repr__(self) -> str:
        return f"StateCache(layers={len(self)}, length={self.length}, bytes={self.nbytes})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reset(self) -> None:
        self.states: State = None
        self.seen: Tensor | None = None
        self.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda state: select(state, indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda state: fork(state, repeats))

    def _change(self, change: Any) -> None:
        if self.seen is not None:
            self.states, self.seen = change((self.states, self.seen))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise LongspanError(
                "a carried state cannot forget its last tokens: copy.copy the cache before them "
                "(states are never changed in place) and go on from the copy."
            )

    def update(self, *_: Any, **__: Any) -> Any:
        raise LongspanError(
            "StateCache holds states, not keys and values: it serves longspan models only."
        )


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
        self, generation_config: Any, model_kwargs: dict[str, Any], *arguments: Any, **named: Any
    ) -> None:
        super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            generation_config, model_kwargs, *arguments, **named
        )
        if not self.steps:
            generation_config.use_cache = model_kwargs["use_cache"] = False
        elif generation_config.use_cache is not False:
            model_kwargs.setdefault("past_key_values", StateCache())

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


def register(config: type, models: dict[str, type]) -> None:
    """Make `Auto*` find the config and the models, given by their Auto class's name."""
    autos = {
        auto.__name__: auto
        for auto in (
            AutoModel,
            AutoModelForCausalLM,
            AutoModelForMaskedLM,
            AutoModelForSeq2SeqLM,
            AutoModelForSequenceClassification,
        )
    }
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for name, model in models.items():
        autos[name].register(config, model, exist_ok=True)


def cache_of(past: Any, batch: int) -> StateCache:
    """`past` itself, or a fresh cache.

    Raises:
        LongspanError: a cache of another kind, or of another number of rows.
    """
    if past is None:
        return StateCache()
    if not isinstance(past, StateCache):
        raise LongspanError(
            f"past_key_values is a {type(past).__name__}; expected a longspan.hub.StateCache, "
            "as a longspan model returns it."
        )
    if past.batch_size not in (-1, batch):
        raise LongspanError(
            f"the carried state holds {past.batch_size} rows and the input has {batch}: "
            "keep the batch as it was, or start from a fresh StateCache."
        )
    return past
