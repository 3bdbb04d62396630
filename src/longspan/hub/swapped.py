"""StateLayer: a carried state among the layers of keys and values of transformers' own caches."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from longspan.errors import LongspanError
from longspan.hub.attention import attention
from longspan.hub.rewinding import Rewinding, replaying
from longspan.nn import fork, select, state_bytes, tensors
from longspan.nn.state import State

# Hands attentions the padding itself, B S, and not B 1 L S; the layers left alone attend by it.
IMPLEMENTATION = attention("multi-head-attention")


class StateLayer(CacheLayerMixin):
    """What one attention carries between calls, under the interface of a cache's layers.

    Attributes:
        state: the attention's own; never changed in place, so a copy.copy is a snapshot.
        length: columns it has seen, padding included.
    """

    supports_early_init = False  # a state is as its attention makes it

    def __init__(self) -> None:
        super().__init__()
        self.state: State = None
        self.length = 0

    def take(self, state: State, columns: int) -> None:
        """Hold the state after so many more columns."""
        self.state, self.is_initialized = state, True
        self.length += columns

    def __repr__(self) -> str:
        return f"StateLayer(length={self.length}, bytes={state_bytes(self.state)})"

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # its name up to transformers 5.6
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self) -> None:
        self.state, self.length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = select(self.state, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = fork(self.state, repeats)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise LongspanError(
                "a carried state cannot forget its last tokens: give past_key_values="
                "longspan.convert.SwappedCache(), which can be rolled back."
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise self._holds_no_keys()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        raise self._holds_no_keys()

    @staticmethod
    def _holds_no_keys() -> LongspanError:
        return LongspanError(
            "this cache was filled by a swapped model and holds states, not keys and values: give "
            "a model that is not swapped a cache of its own."
        )


def state_layer(cache: Cache, index: int, *, rows: int) -> StateLayer:
    """The layer of `cache` for an attention's state, which takes an empty dynamic layer's place.

    So `generate` and a model's forward may make the cache, as for any model.

    Raises:
        LongspanError: a layer that is full of keys or has no place for a state; other rows.
    """
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index] if index < len(cache.layers) else None
    if isinstance(layer, DynamicLayer) and not layer.get_seq_length():
        cache.layers[index] = layer = StateLayer()
    if not isinstance(layer, StateLayer):
        held = "nothing" if layer is None else f"a {type(layer).__name__}"
        full = (
            " with keys of a model that was not swapped" if isinstance(layer, DynamicLayer) else ""
        )
        raise LongspanError(
            f"layer {index} was swapped and its cache holds {held}{full}: leave past_key_values "
            "and cache_implementation out, or give an empty DynamicCache."
        )
    held_rows = {t.shape[0] for t in tensors(layer.state)}
    if held_rows - {rows}:
        raise LongspanError(
            f"the carried state holds {held_rows.pop()} rows and the input has {rows}: keep the "
            "batch as it was, or start from a fresh cache."
        )
    return layer


def cache_bytes(cache: Cache) -> int:
    """Bytes of the states, keys and values that a cache holds."""
    return sum(state_bytes(_contents(layer)) for layer in cache.layers)


def _contents(layer: Any) -> State:
    if isinstance(layer, StateLayer):
        return layer.state
    return (layer.keys, layer.values) if layer.is_initialized else None


class SwappedCache(Rewinding):
    """A cache for a swapped model that can be snapshot, forked and rolled back.

    `generate` makes a plain DynamicCache by itself; give it this one where more is to be done.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)

    def contents(self) -> State:
        return tuple(_contents(layer) for layer in self.layers)

    def refill(self, contents: State, columns: int) -> None:
        # Layers are made anew: up to transformers 5.6, resetting one writes zeros into its keys.
        self.layers = [type(layer)() for layer in self.layers]
        for i, layer in enumerate(self.layers):
            if i >= len(contents) or not columns:
                continue
            if isinstance(layer, StateLayer):
                layer.take(contents[i], columns)
            elif isinstance(layer, DynamicLayer):
                layer.keys, layer.values = contents[i]
                layer.is_initialized = True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) + self.waiting


def prepare(model: PreTrainedModel, *, before: str | None = None) -> None:
    """Hand the model's attentions its padding, B L, and let a `SwappedCache` be rolled back.

    Args:
        before: the implementation of attention that `release` restores, by default the present.
    """
    if hasattr(model, "_longspan_before"):
        return
    model._longspan_before = before or model.config._attn_implementation  # pyright: ignore
    model._longspan_hooks = replaying(model.base_model)  # pyright: ignore
    model.set_attn_implementation(IMPLEMENTATION)


def release(model: PreTrainedModel) -> str:
    """Undo `prepare`; returns the implementation of attention that is restored."""
    before: Any = model._longspan_before
    for hook in model._longspan_hooks:  # pyright: ignore
        hook.remove()
    del model._longspan_before, model._longspan_hooks
    model.set_attn_implementation(before)
    return before
