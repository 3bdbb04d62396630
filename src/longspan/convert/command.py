"""What `longspan convert` does: swap in a stored model, store it, and measure what that did."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longspan import registry
from longspan.convert.health import Health, health
from longspan.convert.swap import Layers, swap
from longspan.data import corpus
from longspan.errors import LongspanError


def convert(
    folder: Path,
    mechanism: str,
    out: Path,
    *,
    layers: Layers = "all",
    data: str = "stdlib",
    lengths: Sequence[int] = (128, 512),
    windows: int = 2,
) -> Health | None:
    """Swap `id` or `id(name=literal, …)` into a language model of transformers, to `out`.

    Args:
        data: the corpus whose held-out text its health is measured on.
        lengths: of the health; the longest is that of the windows. None: no health.

    Raises:
        LongspanError: no model, an `out` that is not empty, whatever `swap` or `health` refuses.
    """
    if not (folder / "config.json").is_file():
        raise LongspanError(f"{folder} holds no model (no config.json).")
    if out.is_dir() and any(out.iterdir()):
        raise LongspanError(f"{out} is not empty: choose another --out.")
    id_, options = registry.parse(mechanism)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    swap(model, (id_, options), layers=layers)
    found = None
    if lengths:
        need, text = windows * max(lengths), bytes(corpus(data).valid)
        # A token is seldom more than 16 bytes.
        ids = tokenizer(text[: 16 * need].decode(errors="replace")).input_ids
        if len(ids) < need:
            raise LongspanError(
                f"'{data}' holds {len(ids)} held-out tokens and {windows} windows of "
                f"{max(lengths)} are to be read: give shorter --lengths, or more text by --data."
            )
        found = health(model, torch.tensor(ids[:need]).view(windows, -1), lengths=lengths)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return found
