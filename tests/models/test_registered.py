"""Every model of longspan.models is exported, and a saved one is found by its Auto class."""

import pkgutil
from importlib import import_module
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoBackbone, AutoConfig, PreTrainedModel

from longspan import models

SMALL: dict[str, Any] = {"vocab_size": 11, "width": 8, "heads": 2, "layers": 2, "length": 16}
ARRAYS: dict[str, Any] = {
    "channels": 2, "shape": [3, 3], "bands": 2, "latents": 4, "width": 8, "heads": 2, "layers": 1,
}  # fmt: skip

# Small by config; any other is a LongspanConfig or like one.
SIZES: dict[str, dict[str, Any]] = {
    "longspan-axial": {
        "vocab_size": 11, "rows": 4, "columns": 4, "slices": 2, "width": 8, "heads": 2,
    },
    "longspan-block-recurrent": SMALL | {"window": 4, "states": 4},
    "longspan-equilibrium": SMALL | {"layers": 1, "memory": 4, "allow_leaks": True},
    "longspan-funnel": {"vocab_size": 11, "blocks": "1-1", "width": 8, "heads": 2, "inner": 8},
    "longspan-hourglass": SMALL | {"hierarchy": "1@1 1@2 1@1"},
    "longspan-image": SMALL
    | {"mixers": ["multi-head-attention"], "rows": 2, "columns": 2, "small": [1, 1], "classes": 2},
    "longspan-informer": SMALL | {"channels": 2},
    "longspan-longt5": SMALL | {"head_width": 4, "inner": 8},
    "longspan-luna": {"vocab_size": 11, "width": 8, "heads": 2, "layers": 2, "slots": 3},
    "longspan-neighborhood": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2],
        "kernel_size": 3, "dilations": [[1], [1]], "num_labels": 3},
    "longspan-perceiver": ARRAYS | {"crosses": [0], "blocks": [0], "num_labels": 3},
    "longspan-perceiver-ar": SMALL | {"latents": 4},
    "longspan-perceiver-bytes": {"embedding_width": 8, "latents": 4, "width": 8, "layers": 1,
        "heads": 2, "inner": 8, "length": 16},
    "longspan-perceiver-io": ARRAYS | {"query_width": 8, "blocks": 1, "output_width": 3},
    "longspan-set-transformer": {"width": 8, "heads": 2, "inducing": 3},
    "longspan-signals": SMALL | {"channels": 2},
    "longspan-token-turing": {"width": 8, "heads": 2, "size": 4, "patch": 2},
    "longspan-tree": {"vocab_size": 11, "width": 8, "heads": 2, "layers": 2, "inner": 8},
}  # fmt: skip


def found() -> list[type[PreTrainedModel]]:
    """The models with a config of their own; others are bases (`AloneModel`)."""
    kinds = set()
    for module in pkgutil.iter_modules(models.__path__, f"{models.__name__}."):
        for kind in vars(import_module(module.name)).values():
            ours = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
            if ours and kind.__module__ == module.name and not kind.__name__.startswith("_"):
                kinds.add(kind)
    return sorted(
        (k for k in kinds if "model_type" in vars(k.config_class)), key=lambda k: k.__name__
    )


MODELS = found()
AUTOS = [
    auto
    for name, auto in vars(import_module("transformers.models.auto.modeling_auto")).items()
    if name.startswith("Auto") and hasattr(auto, "_model_mapping")
]


def auto_of(kind: type[PreTrainedModel]) -> Any:
    """The Auto class that knows a model."""
    for auto in AUTOS:
        if auto._model_mapping.get(kind.config_class, None) is kind:
            return auto
    pytest.fail(f"{kind.__name__} is under no Auto class: hub.register it in its module.")


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_every_model_is_exported_and_registered(kind: Any) -> None:
    for one in (kind, kind.config_class):
        assert getattr(models, one.__name__, None) is one, f"{one.__name__} is not exported"
        assert one.__name__ in models.__all__
    assert isinstance(AutoConfig.for_model(kind.config_class.model_type), kind.config_class)
    assert getattr(transformers, auto_of(kind).__name__, None)


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_a_saved_model_is_loaded_by_its_auto_class(kind: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    sizes = SIZES.get(kind.config_class.model_type, SMALL)
    model = kind(kind.config_class(**sizes)).eval()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    auto = auto_of(kind)
    assert type(auto.from_config(model.config)) is kind
    # AutoBackbone asks the hub even of folders, and takes what it does not know for timm's.
    loaded = (kind if auto is AutoBackbone else auto).from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert not loaded.training
    kept = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    again = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    assert list(kept) == list(again)
    for name, tensor in kept.items():
        assert torch.equal(tensor, again[name]), name
    said, read = (m.config.to_dict() for m in (model, loaded))
    later = {"_name_or_path", "architectures", "dtype", "transformers_version"}
    assert {k: v for k, v in said.items() if k not in later} == {
        k: v for k, v in read.items() if k not in later
    }
