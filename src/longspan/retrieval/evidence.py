"""What a model said of a text and what was found beside it: kept once, read in many ways.

Readers are linear in what they mix, so that for one target all other tokens may count as one: a
position keeps two logits (its target's, and the log-sum of the rest) and its neighbours' scores
with whether they are right. Searching a grid then runs neither model nor search again.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.errors import LongspanError
from longspan.models.evaluation import Score
from longspan.nn.retrieval import Base, Found, Reader, Recent, recall
from longspan.nn.state import reset, select
from longspan.retrieval.datastore import Datastore
from longspan.retrieval.reading import Stream, evaluating, key_layer, tapped, windows
from longspan.shapes import Tokens


class Source(ABC):
    """Where neighbours come from.

    Attributes:
        layer: the module whose input is the query, as in `key_layer`.
        in_order: remembers what it was asked, so that windows must come one by one.
    """

    layer: str | None = None
    in_order: bool = False

    @abstractmethod
    def find(
        self, hidden: Float[Tensor, "B L D"], following: Tokens, places: Int[Tensor, "B L"] | None
    ) -> Found:
        """Neighbours of each position.

        Args:
            following: the token after each, −1 where it is not known yet.
            places: the position's number in its stream; None while generating.
        """

    def restart(self, rows: Tensor | None = None) -> None:  # noqa: B027
        """Forget what was read, in all rows or in those where `rows` (bool, B) is True."""

    def heard(self, tokens: Int[Tensor, "B"], rows: Int[Tensor, "B"]) -> None:  # noqa: B027
        """What followed the last position, and which row before each row now continues."""


class Stored(Source):
    """The nearest entries of a datastore.

    Args:
        count: k.
        own: the id of the stream's first entry where the stream itself is stored, as `read` gave
            it: no position then finds itself.
        exact: leave the datastore's index aside.
    """

    def __init__(
        self,
        store: Datastore,
        count: int = 1024,
        *,
        layer: str | None = None,
        own: int | None = None,
        exact: bool = False,
    ) -> None:
        self.store, self.count, self.layer = store, count, layer
        self.own, self.exact = own, exact

    def find(self, hidden: Tensor, following: Tensor, places: Tensor | None) -> Found:
        apart = None if places is None or self.own is None else places + self.own
        return self.store.find(hidden, self.count, apart=apart, exact=self.exact)


class History(Source):
    """The last `size` states of each stream themselves (the continuous cache).

    It goes on from call to call, over segments and documents, until `restart`.
    """

    in_order = True

    def __init__(self, size: int = 2000, *, layer: str | None = "output") -> None:
        if size < 0:
            raise LongspanError(f"a history of {size} states: give 0 or more.")
        self.size, self.layer = size, layer
        self.state: Recent | None = None

    def find(self, hidden: Tensor, following: Tensor, places: Tensor | None) -> Found:
        found, self.state = recall(hidden, following, self.state, size=self.size)
        return found

    def restart(self, rows: Tensor | None = None) -> None:
        self.state = None if rows is None else reset(self.state, rows)

    def heard(self, tokens: Tensor, rows: Tensor) -> None:
        if self.state is not None and self.state.keys.shape[1]:
            self.state = select(self.state, rows).heard(tokens)


class Evidence(NamedTuple):
    """Of N scored tokens: the target's logit beside that of all others, and what was found.

    Values are 0 where a neighbour's is the target, 1 where it is another, −1 where there is none;
    one `Found` for each source.
    """

    logits: Float[Tensor, "N 2"]
    found: tuple[Found, ...]


def gather(
    model: nn.Module,
    tokens: Stream,
    sources: Sequence[Source],
    *,
    window: int = 1024,
    stride: int | None = None,
    batch: int = 1,
) -> Evidence:
    """Read a text once, and keep what any reader of these sources needs to score it.

    Args:
        window, stride, batch: as in `windows`; keys were made with the same, or should have been.

    Raises:
        LongspanError: a batch of windows with a source that reads in order.
    """
    if batch > 1 and any(source.in_order for source in sources):
        raise LongspanError(
            f"{batch} windows at once, and a history reads them one by one: leave batch at 1."
        )
    kept: list[Tensor] = []
    found: list[list[Found]] = [[] for _ in sources]
    for logits, targets, rows in _positions(
        model, tokens, sources, window=window, stride=stride, batch=batch
    ):
        right = torch.nn.functional.one_hot(targets, logits.shape[-1]).bool()
        others = logits.masked_fill(right, -torch.inf).logsumexp(-1)
        kept.append(torch.stack([logits[right].view_as(others), others], -1).flatten(0, 1).cpu())
        for pile, (scores, values) in zip(found, rows, strict=True):
            wrong = torch.where(values < 0, -1, (values != targets[..., None]).long())
            one = Found(scores.cpu(), wrong.to("cpu", torch.int8))
            pile.append(Found(*(t.flatten(0, 1)[None] for t in one)))
    return Evidence(torch.cat(kept), tuple(_joined(pile) for pile in found))


def neighbours(
    model: nn.Module,
    tokens: Stream,
    source: Source,
    *,
    window: int = 1024,
    stride: int | None = None,
    batch: int = 1,
) -> Found:
    """What is found for each token of a stream but the last: 1 N−1 K, to train a model with."""
    rows = [
        Found(*(t.cpu().flatten(0, 1)[None] for t in found))
        for _, _, (found,) in _positions(
            model, tokens, [source], window=window, stride=stride, batch=batch, logits=False
        )
    ]
    return _joined(rows)


def _joined(pile: list[Found]) -> Found:
    """One after another; where fewer were found, empty slots behind them."""
    most = max(found.values.shape[-1] for found in pile)
    pad = torch.nn.functional.pad

    def one(found: Found) -> Found:
        more = (0, most - found.values.shape[-1])
        return Found(pad(found.scores, more, value=-torch.inf), pad(found.values, more, value=-1))

    return Found(*(torch.cat(parts, 1) for parts in zip(*map(one, pile), strict=True)))


def _positions(
    model: nn.Module,
    tokens: Stream,
    sources: Sequence[Source],
    *,
    window: int,
    stride: int | None,
    batch: int,
    logits: bool = True,
) -> Iterator[tuple[Tensor, Tensor, list[Found]]]:
    """Logits, targets and neighbours of new positions, batch by batch."""
    layers = [key_layer(model, source.layer) for source in sources]
    device = next(model.parameters()).device
    with evaluating(model), tapped(model, *layers) as taps:
        for row, new, first in windows(tokens, window=window, stride=stride, batch=batch):
            row = row.to(device)
            said = model(input_ids=row[:, :-1], use_cache=False).logits
            targets = row[:, -new:]
            places = torch.tensor(first, device=device)[:, None] + torch.arange(new, device=device)
            yield (
                said[:, -new:].float() if logits else said[:, :0],
                targets,
                [
                    source.find(taps[layer][:, -new:], targets, places)
                    for source, layer in zip(sources, layers, strict=True)
                ],
            )


def score(readers: Sequence[Reader], evidence: Evidence, *, chunk: int = 1 << 22) -> Score:
    """Nats of a text as told by readers one after another, the nth of the nth source.

    Raises:
        LongspanError: not one reader for each source.
    """
    if len(readers) != len(evidence.found):
        raise LongspanError(
            f"{len(readers)} readers for {len(evidence.found)} sources: give one for each."
        )
    most = max([2, *(found.values.shape[-1] for found in evidence.found)])
    nats, each = 0.0, max(1, chunk // most)
    with torch.no_grad():
        for start in range(0, len(evidence.logits), each):
            part = slice(start, start + each)
            logits = evidence.logits[None, part]
            for reader, (scores, values) in zip(readers, evidence.found, strict=True):
                logits = reader(Base(logits), Found(scores[:, part], values[:, part]))
            nats -= float(logits.double().log_softmax(-1)[..., 0].sum())
    return Score(nats, len(evidence.logits))


class Tuned(NamedTuple):
    """The candidate of fewest nats on held-out text, and every candidate's score in order."""

    readers: Sequence[Reader]
    scores: list[Score]


def tune(candidates: Iterable[Sequence[Reader]], evidence: Evidence) -> Tuned:
    """Choose readers, and with them k, λ, T, θ or α, on the evidence of a held-out text.

    >>> grid = [[build("knn-lm", share=x)] for x in (0.1, 0.25, 0.5)]
    >>> best = tune(grid, gather(model, valid, [Stored(store)])).readers
    """
    tried = list(candidates)
    if not tried:
        raise LongspanError("there is no candidate to choose from: give at least one.")
    scores = [score(readers, evidence) for readers in tried]
    best = min(range(len(tried)), key=lambda n: scores[n].nats)
    return Tuned(tried[best], scores)
