"""Packed documents: each on a row of its own while the layers run."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from longspan.errors import LongspanError
from longspan.shapes import Keep, Tokens


@dataclass(frozen=True)
class Packing:
    """Where each token of a packed batch goes: document `row` (B L), place `at` (B L) in it.

    `keep` (N C) marks the places of the N documents that hold a token to be seen. Since padding
    changes nothing for any mechanism, running the documents as padded rows is exact for all.
    """

    row: Tensor
    at: Tensor
    keep: Bool[Tensor, "N C"]

    def unpack(self, x: Tensor) -> Tensor:
        """B L … → N C …, zeros (False) where there is no token."""
        out = x.new_zeros(*self.keep.shape, *x.shape[2:])
        out[self.row, self.at] = x
        return out

    def repack(self, x: Tensor) -> Tensor:
        """N C … → B L …"""
        return x[self.row, self.at]


def packing(documents: Tokens, keep: Bool[Tensor, "B L"] | None) -> Packing:
    """The packing in which a document is a run of equal numbers within a row."""
    starts = document_starts(documents)
    row = starts.flatten().cumsum(0).view_as(documents) - 1
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    at = place - place.masked_fill(~starts, 0).cummax(1).values
    shape = (int(row[-1, -1]) + 1, int(at.max()) + 1) if documents.numel() else (0, 0)
    seen = torch.zeros(shape, dtype=torch.bool, device=documents.device)
    seen[row, at] = True if keep is None else keep
    return Packing(row, at, seen)


def document_starts(documents: Tokens) -> Bool[Tensor, "B L"]:
    """True at the first token of each document."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return starts


def places(seen: Tensor, keep: Keep | None, length: int) -> Tensor:
    """Positions that count kept tokens only, from what each row has seen on."""
    if keep is None:
        return seen[:, None] + torch.arange(length, device=seen.device)
    return (seen[:, None] + keep.long().cumsum(1) - 1).clamp(min=0)


def refuse_restarts(position_ids: Tensor, keep: Keep | None) -> None:
    """Positions that start again within a row are packing, which needs `documents`."""
    back = position_ids[:, 1:] < position_ids[:, :-1]
    if keep is not None:
        back = back & keep[:, 1:] & keep[:, :-1]
    if bool(back.any()):
        raise LongspanError(
            "position_ids start again within a row, as with packed documents, which would see "
            "each other: give documents (a number per token) instead."
        )
