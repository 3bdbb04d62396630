"""Another mechanism in the attentions of a pretrained model, and back."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from longspan import hub, registry
from longspan.convert.bert import Bert
from longspan.convert.gpt2 import GPT2
from longspan.convert.llama import Llama
from longspan.convert.swapped import Swapped
from longspan.errors import LongspanError, nearest
from longspan.hub import swapped
from longspan.models.building import build_among, refuse_leak, require_form

Model = TypeVar("Model", bound=PreTrainedModel)
Spec = str | tuple[str, Mapping[str, Any]] | Mapping[str, Any]
Layers = Literal["all"] | Sequence[int] | slice

MAPS: tuple[type[Swapped], ...] = (Llama, GPT2, Bert)
# Fields that concern no attention, in any architecture.
ELSEWHERE = {
    *PreTrainedConfig().to_dict(),
    *("_attn_implementation", "bos_token_id", "eos_token_id", "longspan", "pad_token_id"),
    *("tie_word_embeddings", "torch_dtype", "use_cache", "vocab_size"),
}
# What a checkpoint decides itself.
SIZES = ("width", "heads", "head_width", "kv_heads", "causal")


def swap(
    model: Model,
    mechanism: Spec | Mapping[int, Spec],
    *,
    layers: Layers = "all",
    allow_leaks: bool = False,
    **options: Any,
) -> Model:
    """Replace attentions of a Llama, Mistral, Qwen2, Qwen3, GPT-2, BERT or RoBERTa, in place.

    W_q, W_k, W_v and W_o stay (W_k idle where a mechanism takes its queries for keys). The state is
    carried in the cache that `generate` or the model's forward makes; a `SwappedCache` can also be
    rolled back. `model.config.longspan` tells what was swapped: `save_pretrained` stores it, and
    `load` rebuilds by it.

    Args:
        mechanism: an id with `options`; or a mechanism for each layer, as an id, a pair of an id
            and its options, or a dict as in a LongspanConfig.
        layers: `all`, numbers (negative ones from the end) or a slice.
        allow_leaks: let a causal model use a mechanism whose causal form can see the future.
        options: arguments the mechanism is built with, representable as JSON.

    Raises:
        LongspanError: an architecture, configuration field, mechanism, option or layer that is not
            known; a form that the mechanism lacks; a layer that was swapped before.

    >>> swap(model, "performer", layers=slice(0, 6), features=128)
    >>> swap(model, {0: "linear-transformer", 3: ("longformer", {"window": 64})})
    """
    kind = _map(model.config)
    specs = _specs(model.config.num_hidden_layers, mechanism, layers, options)
    built = {i: _swapped(kind, model, i, *specs[i], allow_leaks) for i in specs}
    for i, part in built.items():
        _put(model, kind.place.format(i), part)
    record: dict[str, Any] = getattr(model.config, "longspan", None) or {}
    record |= {str(i): {"id": id_, **own} for i, (id_, own) in specs.items()}
    # What transformers loaded without the swap still has the record of it.
    now = sorted(part.layer for part in _found(model).values())
    model.config.longspan = {str(i): record[str(i)] for i in now}
    swapped.prepare(model)
    return model


def undo(model: Model) -> Model:
    """Put every original attention back, in place; what was trained in its projections stays.

    Raises:
        LongspanError: nothing was swapped.
    """
    for path, part in _found(model).items():
        _put(model, path, _restored(part))
    delattr(model.config, "longspan")
    swapped.release(model)
    return model


@contextmanager
def original(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model attends as it did before any swap.

    Raises:
        LongspanError: nothing was swapped.
    """
    found = _found(model)
    for path, part in found.items():
        _put(model, path, _restored(part))
    implementation = swapped.release(model)
    try:
        yield
    finally:
        for path, part in found.items():
            _put(model, path, part.train(model.training))
        swapped.prepare(model, before=implementation)


def load(folder: str | Path) -> Any:
    """A swapped model as `model.save_pretrained(folder)` stored it, in evaluation mode.

    (transformers' own `from_pretrained` gives the model without the swap.)

    Raises:
        LongspanError: no swapped model, or weights that are not exactly the model's.

    >>> model = load("runs/swapped")
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise LongspanError(f"{folder} holds no model (no config.json).")
    config: Any = AutoConfig.from_pretrained(folder)
    record = getattr(config, "longspan", None)
    if not record:
        raise LongspanError(
            f"the model in {folder} was not swapped (its config.json has no 'longspan'): load it "
            "by transformers' from_pretrained."
        )
    model = getattr(transformers, config.architectures[0])(config).to(config.dtype)
    swap(model, {int(i): spec for i, spec in record.items()}, allow_leaks=True)
    _load_weights(model, folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _load_weights(model: PreTrainedModel, folder: Path) -> None:
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    missing, unexpected = model.load_state_dict(weights, strict=False)
    state = model.state_dict(keep_vars=True)
    loaded = {id(state[name]) for name in weights if name in state}
    # Tied weights are stored once.
    missing = [name for name in missing if id(state[name]) not in loaded]
    if missing or unexpected:
        raise LongspanError(
            f"the weights in {folder} are not this model's: missing {missing or 'none'}, "
            f"unexpected {unexpected or 'none'}."
        )


def _map(config: Any) -> type[Swapped]:
    """The name map for a configuration, every field of which it knows."""
    for kind in MAPS:
        if config.model_type in kind.types:
            break
    else:
        known = sorted(chain.from_iterable(kind.types for kind in MAPS))
        raise LongspanError(
            f"swap knows {', '.join(known)} and got a {config.model_type}"
            f"{nearest(config.model_type, known)}"
        )
    rope = config.to_dict().get("rope_parameters") or {}
    partial = {n: v for n, v in rope.items() if n == "partial_rotary_factor"}
    for name, value in {**config.to_dict(), **partial}.items():
        values = value if isinstance(value, list) else [value]
        unset = (value is None or value is False) and name != "is_causal"
        neutral = name in kind.neutral and all(v == kind.neutral[name] for v in values)
        if not (unset or neutral or name in ELSEWHERE | kind.known):
            raise LongspanError(
                f"this checkpoint sets '{name}', which "
                f"{kind.__module__.removeprefix('longspan.')} does not know: if it changes no "
                f"attention, set model.config.{name} = None."
            )
    return kind


def _specs(
    count: int, mechanism: Any, layers: Any, options: Mapping[str, Any]
) -> dict[int, tuple[str, dict[str, Any]]]:
    """(id, options) of each layer to swap, checked."""
    if isinstance(mechanism, Mapping) and "id" not in mechanism:
        if options or layers != "all":
            raise LongspanError(
                "a mechanism for each layer was given and layers or options besides: put the "
                "options to the mechanisms, as in {0: ('longformer', {'window': 64})}."
            )
        given = dict(mechanism)
    else:
        numbers = range(count)
        if isinstance(layers, slice):
            chosen: Sequence[int] = numbers[layers]
        else:
            chosen = numbers if layers == "all" else layers
        given = dict.fromkeys(chosen, mechanism)
    if not given:
        raise LongspanError(f"no layer is to be swapped: choose among 0 … {count - 1}.")
    for i in given:
        if not isinstance(i, int) or not -count <= i < count:
            raise LongspanError(f"there is no layer {i!r}: the model has layers 0 … {count - 1}.")
    return {i % count: _spec(spec, options) for i, spec in given.items()}


def _spec(spec: Any, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        id_, own = spec, {}
    elif isinstance(spec, Mapping) and isinstance(spec.get("id"), str):
        own = dict(spec)
        id_ = own.pop("id")
    elif isinstance(spec, Sequence) and len(spec) == 2 and isinstance(spec[0], str):
        id_, own = spec[0], dict(spec[1])
    else:
        raise LongspanError(
            f"{spec!r} names no mechanism: give an id, a pair of an id and its options, or a dict "
            'as in {"id": "longformer", "window": 64}.'
        )
    own |= options
    card, known = registry.show(id_), registry.options(id_)
    if card.kind != "attention":
        raise LongspanError(
            f"'{id_}' is of kind {card.kind} and would have no use for a checkpoint's queries, "
            'keys and values: longspan.find(kind="attention") lists what can be swapped in.'
        )
    for name, value in own.items():
        if name in SIZES:
            raise LongspanError(f"'{name}' is the checkpoint's to decide: leave it out.")
        if name not in known:
            fitting = [n for n in known if n not in SIZES]
            raise LongspanError(
                f"'{id_}' has no argument '{name}'{nearest(name, fitting)} "
                f"It takes: {', '.join(fitting) or 'none'}."
            )
        try:
            own[name] = json.loads(json.dumps(value))
        except TypeError:
            raise LongspanError(
                f"'{name}' is a {type(value).__name__}, which config.json cannot hold, so that the "
                "model could not be saved: give numbers, strings, or lists and dicts of them."
            ) from None
    return id_, own


def _swapped(
    kind: type[Swapped],
    model: PreTrainedModel,
    layer: int,
    id_: str,
    options: dict[str, Any],
    allow_leaks: bool,
) -> Swapped:
    config: Any = model.config
    here: Any = model.base_model.get_submodule(kind.place.format(layer))
    if not type(here).__module__.startswith("transformers."):
        raise LongspanError(
            f"the attention of layer {layer} was converted before: convert.undo(model) first, or "
            "convert the original."
        )
    require_form(id_, causal=here.is_causal)
    if here.is_causal and not allow_leaks:
        refuse_leak(id_)
    sizes, rate = kind.measure(here), getattr(config, kind.drops)
    offered = {
        "width": sizes.width,
        "heads": sizes.heads,
        "head_width": sizes.head_width,
        "kv_heads": sizes.kv_heads,
        "length": config.max_position_embeddings,
        "causal": here.is_causal,
        "dropout": rate or None,
    }
    mechanism = build_among(id_, offered, options)
    if mechanism.shared and sizes.kv_heads != sizes.heads:
        raise LongspanError(
            f"'{id_}' takes its queries for keys, and this checkpoint has {sizes.kv_heads} "
            f"key-value heads for {sizes.heads}: swap in another."
        )
    undropped = 0.0 if "dropout" in registry.options(id_) else rate
    return hub.settled(kind(here, mechanism, id_=id_, undropped=undropped))


def _found(model: PreTrainedModel) -> dict[str, Swapped]:
    base = model.base_model
    found = {path: part for path, part in base.named_modules() if isinstance(part, Swapped)}
    if not found:
        raise LongspanError("nothing in this model was swapped.")
    return found


def _put(model: PreTrainedModel, path: str, part: torch.nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.base_model.get_submodule(parent), name, part)


def _restored(part: Swapped) -> torch.nn.Module:
    """The original, with what its projections have become since."""
    (back,) = part.original
    for name, _ in back.named_children():
        setattr(back, name, getattr(part, name))
    return back.train(part.training)
