"""Caches that can be held on to, multiplied and taken back by some tokens.

States are never changed in place, so a snapshot is a reference. Taking back tokens that one call
fed together with others needs a state from their midst, which nothing has kept: the cache goes back
to the newest mark before them, and the next call feeds what lies between mark and target once more.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import cache as remembered
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from longspan.errors import LongspanError
from longspan.nn import fork, select
from longspan.nn.state import State

Held = TypeVar("Held", bound="Rewinding")

# What a model is fed by column, beside attention_mask, which may cover earlier ones too.
BY_COLUMN = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids", "marks")
# Longer drafts than this no one makes, and marks are logarithmic in it.
DRAFTS = 1024
# So many columns go again with the next call; more get a call, and so a mark, of their own.
AGAIN = 32


class Mark(NamedTuple):
    """What a cache held after `at` columns."""

    at: int
    contents: State


class Fed(NamedTuple):
    """What one call fed, in columns `start` … `stop`, each tensor B (stop − start) …"""

    start: int
    stop: int
    inputs: dict[str, Tensor]

    def cut(self, start: int, stop: int) -> "Fed":
        """The part of it between two columns."""
        start, stop = max(start, self.start), min(stop, self.stop)
        span = slice(start - self.start, stop - self.start)
        return Fed(start, stop, {name: t[:, span] for name, t in self.inputs.items()})


def columns(pieces: Sequence[Fed]) -> int:
    """How many they are together."""
    return sum(piece.stop - piece.start for piece in pieces)


class Rewinding(Cache):
    """A cache with snapshots, forks and, once it records, rollback.

    A column is a position of the batch, padding included. A cache of this kind says what it holds
    by `contents` and takes it by `refill`; its `get_seq_length` counts `waiting`, the columns that
    it has gone back too far and that the next call feeds again. The model that fills it is one that
    `replaying` was called on.
    """

    depth: int | None = None
    waiting: int = 0
    _feeding: dict[str, Tensor] | None = None
    _again: Sequence[Fed] = ()

    def contents(self) -> State:
        """Everything held, but for its length, as one state."""
        raise NotImplementedError

    def refill(self, contents: State, columns: int) -> None:
        """Hold what `contents` gave after so many columns."""
        raise NotImplementedError

    def snapshot(self: Held) -> Held:
        """A cache to go on from later: it shares the tensors, which are never changed in place."""
        held = copy.copy(self)
        held.layers = [copy.copy(layer) for layer in self.layers]
        if self.depth is not None:
            held._marks, held._fed = list(self._marks), list(self._fed)
        return held

    def fork(self: Held, copies: int) -> Held:
        """A cache with each row `copies` times, the copies side by side."""
        if copies < 1:
            raise LongspanError(f"fork({copies}) of a cache: expected at least one copy.")
        forked = self.snapshot()
        forked.batch_repeat_interleave(copies)
        return forked

    def record(self, depth: int = DRAFTS) -> None:
        """From here on, keep what `rollback` of up to `depth` columns needs.

        That is at most 2 log₂ depth states and the ids that were fed: a mark is dropped where those
        beside it are less than a factor 2 apart, so n columns cost less than n others fed again.
        """
        if depth < 1:
            raise LongspanError(f"record(depth={depth}): expected at least one column.")
        self._refuse_waiting("record anew")
        self.depth = depth
        self._marks = [Mark(self.get_seq_length(), self.contents())]
        self._fed: list[Fed] = []

    def forget_record(self) -> None:
        """Record no longer."""
        self._refuse_waiting("stop recording")
        self.depth, self._marks, self._fed = None, [], []

    def rollback(self, columns: int) -> None:
        """Forget the last `columns`, as if they had never been fed.

        Raises:
            LongspanError: a number below 0, nothing recorded that far back, or a model that does
                not feed again.
        """
        if columns < 0:
            raise LongspanError(f"rollback({columns}): expected how many columns to forget.")
        if not columns:
            return
        if self.depth is None:
            raise LongspanError(
                "a carried state cannot forget its last tokens: call record() before feeding them, "
                "or keep a snapshot() of the cache before them and go on from it."
            )
        here = self.get_seq_length()
        if (self._fed[-1].stop if self._fed else self._marks[0].at) != here:
            raise LongspanError(
                "this cache was filled by a model that cannot feed tokens again: keep a snapshot() "
                "before what may be taken back, and go on from it."
            )
        target = here - columns
        if target < self._marks[0].at:
            raise LongspanError(
                f"rollback({columns}): the last {here - self._marks[0].at} columns are recorded. "
                "Call record() earlier or with a larger depth."
            )
        while self._marks[-1].at > target:
            self._marks.pop()
        self._fed = self._between(self._marks[0].at, target)
        self.refill(self._marks[-1].contents, self._marks[-1].at)
        self.waiting = target - self._marks[-1].at

    def crop(self, tokens_to_remove: int) -> None:
        """Rollback as transformers asks for it: −n forgets n columns; up to 5.6, a number above 0
        is the length to keep."""
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        self.rollback(-tokens_to_remove)

    def activate_past_recording(self) -> None:
        if self.depth is None:
            self.record()

    @property
    def is_croppable(self) -> bool:
        return self.depth is not None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda state: select(state, indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda state: fork(state, repeats))

    def _change(self, change: Callable[[State], State]) -> None:
        self.refill(change(self.contents()), self.get_seq_length() - self.waiting)
        if self.depth is not None:
            self._marks = [Mark(mark.at, change(mark.contents)) for mark in self._marks]
            self._fed = [
                fed._replace(inputs={name: change(t) for name, t in fed.inputs.items()})
                for fed in self._fed
            ]

    def _refuse_waiting(self, what: str) -> None:
        if self.waiting:
            raise LongspanError(
                f"cannot {what} between rollback and the next call, which feeds {self.waiting} "
                "columns again: call the model first."
            )

    def _between(self, start: int, stop: int) -> list[Fed]:
        return [fed.cut(start, stop) for fed in self._fed if fed.start < stop and fed.stop > start]

    def _take(self) -> list[Fed]:
        """What waits to be fed again; it waits no longer."""
        at = self._marks[-1].at
        pieces = self._between(at, at + self.waiting)
        self._fed, self.waiting = self._between(self._marks[0].at, at), 0
        return pieces

    def _put_back(self, pieces: Sequence[Fed]) -> None:
        """Let them wait again: a call that fed them failed."""
        self._fed += pieces
        self.waiting = columns(pieces)

    def _note(self, inputs: dict[str, Tensor]) -> None:
        """Mark the place after a call that fed `inputs`."""
        here = self.get_seq_length()
        self._fed.append(Fed(self._marks[-1].at, here, inputs))
        marks = self._marks
        marks.append(Mark(here, self.contents()))
        n = 1
        while n < len(marks) - 1:
            if here - marks[n - 1].at <= 2 * (here - marks[n + 1].at):
                del marks[n]
            else:
                n += 1
        assert self.depth is not None
        while here - marks[1].at >= self.depth:
            del marks[0]
        self._fed = self._between(marks[0].at, here)


def replaying(module: nn.Module) -> list[RemovableHandle]:
    """Let a model that fills a `Rewinding` cache feed again what a rollback left waiting.

    The module is the one that takes ids or embeddings and `past_key_values`, and whose output
    begins with the last hidden states, B L E: a model without its head.
    """
    return [
        module.register_forward_pre_hook(_before, with_kwargs=True),
        module.register_forward_hook(_after, with_kwargs=True, always_call=True),
    ]


@remembered
def _names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _given(module: nn.Module, positional: Any, named: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(_names(type(module)), positional, strict=False)) | named


def _recording(given: dict[str, Any]) -> Rewinding | None:
    past = given.get("past_key_values")
    return past if isinstance(past, Rewinding) and past.depth is not None else None


def _before(module: nn.Module, positional: Any, named: dict[str, Any]) -> Any:
    given = _given(module, positional, named)
    past = _recording(given)
    if past is None:
        return None
    inputs = {name: given[name] for name in BY_COLUMN if given.get(name) is not None}
    batch, length = next(iter(inputs.values())).shape[:2]
    inputs = {name: t.expand(batch, *t.shape[1:]) for name, t in inputs.items()}
    mask = given.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise LongspanError(
                "a recording cache takes an attention_mask of one number per row and token; got "
                f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}."
            )
        inputs["attention_mask"] = mask[:, -length:]
    pieces = past._take()
    if _joinable([*pieces, Fed(0, length, inputs)], given):
        parts = [*(piece.inputs for piece in pieces), inputs]
        inputs = {name: torch.cat([part[name] for part in parts], 1) for name in inputs}
    else:
        _feed_again(module, past, given, pieces)
        pieces = []
    past._feeding, past._again = inputs, pieces
    return (), _call(given, inputs, past.get_seq_length() + columns(pieces) + length)


def _feed_again(
    module: nn.Module, past: Rewinding, given: dict[str, Any], pieces: Sequence[Fed]
) -> None:
    for n, piece in enumerate(pieces):
        try:
            module(**_call(given, piece.inputs, piece.stop))
        except Exception:
            past._put_back(pieces[n:])
            raise


def _joinable(pieces: list[Fed], given: dict[str, Any]) -> bool:
    """Whether they may go in one call: few, of the same inputs, with nothing asked from inside."""
    few = columns(pieces[:-1]) <= AGAIN
    alike = all(a.inputs.keys() == b.inputs.keys() for a, b in pairwise(pieces))
    inside = given.get("output_hidden_states") or given.get("output_attentions")
    return few and alike and not inside


def _call(given: dict[str, Any], inputs: dict[str, Tensor], columns: int) -> dict[str, Any]:
    """The call that was asked for with other inputs, which end at so many columns."""
    others = {n: v for n, v in given.items() if n not in (*BY_COLUMN, "attention_mask")}
    mask = given.get("attention_mask")
    if mask is not None and mask.shape[1] >= columns:
        inputs = inputs | {"attention_mask": mask[:, :columns]}
    return others | inputs


def _after(module: nn.Module, positional: Any, named: dict[str, Any], output: Any) -> Any:
    past = _recording(_given(module, positional, named))
    if past is None or past._feeding is None:
        return None
    inputs, pieces = past._feeding, past._again
    past._feeding, past._again = None, ()
    if output is None:
        past._put_back(pieces)
        return None
    past._note(inputs)
    again = columns(pieces)
    if not again:
        return None
    if isinstance(output, tuple):
        return (output[0][:, again:], *output[1:])
    output["last_hidden_state"] = output["last_hidden_state"][:, again:]
    return output
