"""Readers inside `generate`: a logits processor that hears the model's states."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from longspan.errors import LongspanError
from longspan.nn.retrieval import Base, Reader
from longspan.retrieval.evidence import Source
from longspan.retrieval.reading import Taps, key_layer, tapped


class Reading(LogitsProcessor):
    """Turns next-token scores into what the readers say, one after another; see `reading`."""

    def __init__(
        self,
        taps: Taps,
        head: Any,
        sources: Sequence[tuple[str, Source]],
        readers: Sequence[Reader],
    ) -> None:
        self.taps, self.head, self.sources, self.readers = taps, head, sources, readers
        self.before: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = self._rows(input_ids)
        logits = scores[:, None]
        for (layer, source), reader in zip(self.sources, self.readers, strict=True):
            hidden = self.taps[layer]
            if rows is not None:
                source.heard(input_ids[:, -1], rows)
                hidden = hidden[:, -1:]
            length = hidden.shape[1]
            told = input_ids[:, input_ids.shape[1] - length + 1 :]
            following = torch.cat([told, torch.full_like(input_ids[:, :1], -1)], 1)
            found = source.find(hidden, following, None)
            last = type(found)(*(part[:, -1:] for part in found))
            logits = reader(Base(logits, hidden[:, -1:], self.head), last)
        self.before = input_ids
        return logits[:, 0].to(scores.dtype)

    def _rows(self, input_ids: Tensor) -> Tensor | None:
        """Which row each one continues: beams change places. None in a first call."""
        if self.before is None or input_ids.shape[1] != self.before.shape[1] + 1:
            for _, source in self.sources:
                source.restart()
            return None
        same = (input_ids[:, None, :-1] == self.before[None]).all(-1)
        return same.to(torch.uint8).argmax(1)


@contextmanager
def reading(
    model: nn.Module, sources: Sequence[Source], readers: Sequence[Reader]
) -> Iterator[LogitsProcessorList]:
    """What `generate` needs as `logits_processor` to read from sources, the nth by the nth reader.

    Histories begin with the prompt. Prompts of several rows are taken as they are: padding is
    remembered too, so give rows of one length to a history.

    Raises:
        LongspanError: not one reader for each source.

    >>> with reading(model, [Stored(store)], [build("knn-lm")]) as processors:
    ...     model.generate(prompt, logits_processor=processors)
    """
    if len(readers) != len(sources):
        raise LongspanError(f"{len(readers)} readers for {len(sources)} sources: one for each.")
    layers = [key_layer(model, source.layer) for source in sources]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = None if head is None else head.weight
    with tapped(model, *layers) as taps, ExitStack() as stack:
        if any(source.in_order for source in sources):
            stack.callback(model.register_forward_pre_hook(_whole, with_kwargs=True).remove)
        pairs = list(zip(layers, sources, strict=True))
        yield LogitsProcessorList([Reading(taps, weight, pairs, readers)])


def _whole(model: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """A prompt's every state passes the head, so that a history hears more than the last."""
    return given, {**named, "logits_to_keep": 0} if "logits_to_keep" in named else named
