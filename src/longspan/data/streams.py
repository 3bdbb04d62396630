"""Orders in which a model reads a stream: windows, random crops, segments."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from torch import Generator, Tensor
from torch.utils.data import Dataset

from longspan.errors import LongspanError
from longspan.shapes import Tokens

Stream = Integer[np.ndarray, "_"]


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of a stream as examples for `transformers.Trainer`; a last partial one is dropped.

    Args:
        data: bytes or token ids.
        stride: from the start of one window to that of the next; `length` by default.

    Raises:
        LongspanError: the data are shorter than one window.

    >>> Windows(np.arange(10), length=4, stride=3)[1]["input_ids"]
    tensor([3, 4, 5, 6])
    """

    def __init__(self, data: Stream, *, length: int, stride: int | None = None) -> None:
        stride = length if stride is None else stride
        _need(data, length=length, stride=stride)
        self.data, self.length, self.stride = data, length, stride

    def __len__(self) -> int:
        return (len(self.data) - self.length) // self.stride + 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first = _index(index, len(self)) * self.stride
        return _example(self.data[first : first + self.length])


def random_windows(data: Stream, *, batch: int, length: int, generator: Generator) -> Tokens:
    """`batch` windows from anywhere in the stream, each start equally likely.

    Raises:
        LongspanError: the data are shorter than one window.

    >>> random_windows(corpus().train, batch=2, length=64, generator=torch.Generator()).shape
    torch.Size([2, 64])
    """
    _need(data, length=length, batch=batch)
    starts = torch.randint(
        len(data) - length + 1, (batch,), generator=generator, device=generator.device
    )
    windows = np.lib.stride_tricks.sliding_window_view(data, length)[starts.cpu().numpy()]
    return torch.from_numpy(windows.astype(np.int64))


class Segments(Dataset[dict[str, Tensor]]):
    """A stream as `batch` parallel rows, read one segment at a time, for carried states.

    Row b is one contiguous stretch of the data, and segment t + 1 of it follows segment t:

        segments[t]["input_ids"][b] = data[(b·T + t)·length : (b·T + t + 1)·length]

    with T = len(segments). The states of all rows start anew at t = 0. Iterating goes on from
    `segments.segment` and starts over after the last; `state_dict` holds that place, so that a
    run resumes at the segment after the last one it was given.

    Use it as it is or as `DataLoader(segments, batch_size=None)`; where batches are made of
    single examples, as by `Trainer`, use `rows()`.

    Raises:
        LongspanError: the data are shorter than one segment of every row.
    """

    def __init__(self, data: Stream, *, batch: int, length: int) -> None:
        _need(data, length=length, batch=batch, total=batch * length)
        self.data, self.batch, self.length = data, batch, length
        self.segment = 0

    def __len__(self) -> int:
        return len(self.data) // (self.batch * self.length)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index, count = _index(index, len(self)), len(self)
        grid = self.data[: self.batch * count * self.length]
        return _example(grid.reshape(self.batch, count, self.length)[:, index])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while self.segment < len(self):
            self.segment += 1
            yield self[self.segment - 1]
        self.segment = 0

    def rows(self) -> "Rows":
        """The same order as single examples: number t·batch + b is row b of segment t."""
        return Rows(self)

    def state_dict(self) -> dict[str, int]:
        """The next segment, and what the place is only meaningful for."""
        return {"segment": self.segment, **self._layout()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was saved.

        Raises:
            LongspanError: it was saved with another batch, length or amount of data.
        """
        for name, value in self._layout().items():
            if state.get(name) != value:
                raise LongspanError(
                    f"this place was saved with {name}={state.get(name)} and the segments have "
                    f"{name}={value}, where it points elsewhere: use the same, or start anew."
                )
        self.segment = state["segment"]

    def _layout(self) -> dict[str, int]:
        return {"batch": self.batch, "length": self.length, "size": len(self.data)}


class Rows(Dataset[dict[str, Tensor]]):
    """The rows of `Segments` one by one, which in order make its batches.

    For `Trainer`: `per_device_train_batch_size` times the number of processes is the batch of
    the segments, and `train_sampling_strategy="sequential"`. Each process then reads its own
    rows, and a checkpoint resumes at its segment, as for any data in order.
    """

    def __init__(self, segments: Segments) -> None:
        self.segments = segments

    def __len__(self) -> int:
        return len(self.segments) * self.segments.batch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        s = self.segments
        t, b = divmod(_index(index, len(self)), s.batch)
        first = (b * len(s) + t) * s.length
        return _example(s.data[first : first + s.length])


def _example(ids: np.ndarray) -> dict[str, Tensor]:
    """Labels are the ids themselves: a causal LM of transformers shifts them."""
    input_ids = torch.from_numpy(ids.astype(np.int64))
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def _index(index: int, count: int) -> int:
    if not -count <= index < count:
        raise IndexError(f"index {index} is outside of {count}")
    return index % count


def _need(data: np.ndarray, *, length: int, total: int | None = None, **sizes: int) -> None:
    for name, value in {"length": length, **sizes}.items():
        if value < 1:
            raise LongspanError(f"{name} is {value}; expected at least 1.")
    if len(data) < (total or length):
        rows = f"{sizes['batch']} rows of " if total else "a window of "
        raise LongspanError(
            f"the data hold {len(data)} bytes, too few for {rows}{length}: "
            f"lower {'the batch or ' if total else ''}the length, or take a longer corpus."
        )
