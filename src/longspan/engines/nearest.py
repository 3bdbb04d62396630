"""The k nearest of stored keys: exact in blocks, or by faiss, and what is read from those found.

`search` chooses, without gradients; `score` and `mix` read what was chosen, with gradients for
queries, keys and values. Keys and values may have a batch or heads of 1: one store for all.
An `Index` holds keys under ids that outlive additions, removals and saving.
"""

import importlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.errors import LongspanError

Metric = Literal["inner", "l2"]
Stored = Float[Tensor, "#B #H S _"]
Chosen = Int[Tensor, "B H L K"]

# Bytes of the largest temporary; a block's scores take a quarter.
WORKSPACE = 16 * 2**20


@torch.no_grad()
def search(
    q: Float[Tensor, "B H L D"],
    k: Stored,
    count: int,
    *,
    metric: Metric = "inner",
    keep: Bool[Tensor, "#B S"] | None = None,
    places: Int[Tensor, "#B S"] | None = None,
    before: Int[Tensor, "#B L"] | None = None,
    apart: Int[Tensor, "#B L"] | None = None,
) -> Chosen:
    """Indices of each query's `count` keys of largest q·k or smallest ‖q − k‖², best first.

    −1 where a query has fewer. Keys may be of a smaller dtype than queries, or mapped from a file.

    Args:
        keep: keys that may be found: rows may be filled to different degrees.
        places: a number for each key, its index by default.
        before: only keys of a smaller number. apart: none of this number (a query's own entry).
    """
    _check(metric, count)
    (batch, heads, length, width), keys = q.shape, k.shape[2]
    found = torch.full((batch, heads, length, count), -1, device=q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    spots = torch.arange(keys, device=q.device)[None] if places is None else places
    for rows, columns in _blocks((batch, heads, length, keys), width, wide.itemsize, found):
        tokens = (rows[0], rows[2])
        best = q.new_full((*found[rows].shape[:3], 0), -math.inf, dtype=wide)
        at = found.new_empty(best.shape)
        for s in columns:
            part = k[_shared(rows[0], k), _shared(rows[1], k, 1), s].to(wide)
            with torch.autocast(q.device.type, enabled=False):
                scores = q[rows].to(wide) @ part.mT
            if metric == "l2":  # and − ‖q‖², which moves no rank
                scores = 2 * scores - part.square().sum(-1)[..., None, :]
            here = spots[_shared(rows[0], spots), s][:, None, None]
            hidden = torch.zeros_like(here, dtype=torch.bool)
            if keep is not None:
                hidden = ~keep[_shared(rows[0], keep), s][:, None, None]
            if before is not None:
                hidden = hidden | (here >= _row(before, tokens))
            if apart is not None:
                hidden = hidden | (here == _row(apart, tokens))
            best = torch.cat([best, scores.masked_fill(hidden, -math.inf)], -1)
            at = torch.cat(
                [at, torch.arange(s.start, s.stop, device=q.device).expand_as(scores)], -1
            )
            best, order = best.topk(min(count, best.shape[-1]), dim=-1)
            at = at.gather(-1, order)
        found[rows][..., : at.shape[-1]] = at.masked_fill(best == -math.inf, -1)
    return found


def _blocks(
    sizes: tuple[int, int, int, int], width: int, itemsize: int, found: Tensor
) -> Iterator[tuple[tuple[slice, slice, slice], list[slice]]]:
    """(batch, heads, queries), and pieces of the keys, whose scores fit a quarter workspace."""
    batch, heads, length, keys = sizes
    if not found.numel() or not keys:
        return
    most = WORKSPACE // (4 * itemsize)
    # What is merged into the best so far is at least as long as they are.
    columns = min(keys, max(found.shape[-1], min(8192, most // max(width, 1))))
    queries = min(length, max(1, most // columns))
    together = min(heads, max(1, most // (columns * max(queries, width))))
    rows = max(1, most // (columns * max(queries, width) * together))
    across = [slice(s, min(s + columns, keys)) for s in range(0, keys, columns)]
    for b in range(0, batch, rows):
        for h in range(0, heads, together):
            for start in range(0, length, queries):
                yield (
                    (slice(b, b + rows), slice(h, h + together), slice(start, start + queries)),
                    across,
                )


def _shared(rows: slice, t: Tensor, axis: int = 0) -> slice:
    """Those rows of t, all of which are the same where it has one."""
    return slice(None) if t.shape[axis] == 1 else rows


def _row(t: Tensor, tokens: tuple[slice, slice]) -> Tensor:
    return t[_shared(tokens[0], t), tokens[1]][:, None, :, None]


def score(
    q: Float[Tensor, "B H L D"], k: Stored, at: Chosen, *, metric: Metric = "inner"
) -> Float[Tensor, "B H L K"]:
    """q·k, or −‖q − k‖², of the keys at the indices; −∞ for −1. In at least float32.

    Differences are formed, not expanded, so that near neighbours keep their digits. The gathered
    keys are made some queries at a time, again in the backward pass.
    """
    _check(metric, at.shape[-1])
    with torch.autocast(q.device.type, enabled=False):
        return _score(q, k, at, metric)


def mix(weights: Float[Tensor, "B H L K"], v: Stored, at: Chosen) -> Float[Tensor, "B H L V"]:
    """Σ_j weights_j v_j over the values at the indices; −1 adds nothing. Memory as in `score`."""
    with torch.autocast(v.device.type, enabled=False):
        return _mix(weights, v, at)


def attend(
    q: Float[Tensor, "B H L D"], k: Stored, v: Stored, at: Chosen, *, scale: float | None = None
) -> tuple[Float[Tensor, "B H L V"], Float[Tensor, "B H L"]]:
    """Softmax attention to the keys at the indices, and the logsumexp of its scores.

    A query that found nothing gives 0 and −∞: `dense.merge` joins the pair with others under one
    softmax. The scale is D^(−1/2) unless given.
    """
    scores = score(q, k, at) * (q.shape[-1] ** -0.5 if scale is None else scale)
    empty = (at < 0).all(-1)
    total = scores.masked_fill(empty[..., None], 0).logsumexp(-1)
    weights = (scores - total[..., None]).exp()
    return mix(weights, v, at), total.masked_fill(empty, -math.inf)


class _Gather:
    """The stored rows that every query chose, some queries at a time."""

    def __init__(self, t: Tensor, at: Tensor, dtype: torch.dtype) -> None:
        batch, heads, keys, width = t.shape
        row = torch.arange(batch * heads, device=t.device).view(batch, heads, 1, 1) * keys
        self.index = (at.clamp(min=0) + row).flatten(0, 2)  # N K
        self.none = (at < 0).flatten(0, 2)
        self.flat, self.dtype = t.reshape(-1, width), dtype
        self.each = max(1, WORKSPACE // (4 * max(1, at.shape[-1] * width * dtype.itemsize)))

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(queries, rows: n K D), zeros where there is none."""
        if not len(self.flat) or not self.index.numel():
            return
        for start in range(0, len(self.index), self.each):
            part = slice(start, start + self.each)
            rows = self.flat.index_select(0, self.index[part].flatten()).to(self.dtype)
            rows = rows.view(*self.index[part].shape, -1)
            yield part, rows.masked_fill_(self.none[part][..., None], 0)

    def add(self, total: Tensor, part: slice, rows: Tensor) -> None:
        total.index_add_(0, self.index[part].flatten(), rows.flatten(0, 1))


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, at: Tensor, metric: str) -> Tensor:
        ctx.save_for_backward(q, k, at)
        ctx.metric = metric
        wide = torch.promote_types(q.dtype, torch.float32)
        gather, queries = _Gather(k, at, wide), q.reshape(-1, q.shape[-1])
        scores = q.new_zeros(len(gather.index), at.shape[-1], dtype=wide)
        for n, rows in gather:
            x = queries[n].to(wide)
            if metric == "inner":
                scores[n] = (rows @ x[..., None])[..., 0]
            else:
                scores[n] = -(rows - x[:, None]).square().sum(-1)
        return scores.masked_fill_(gather.none, -math.inf).view(at.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dscores: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        q, k, at = ctx.saved_tensors
        gather, queries = _Gather(k, at, dscores.dtype), q.reshape(-1, q.shape[-1])
        grads = dscores.reshape(gather.index.shape).masked_fill(gather.none, 0)
        dq = torch.zeros_like(queries)
        dk = None
        if ctx.needs_input_grad[1]:
            dk = torch.zeros_like(gather.flat, dtype=grads.dtype)
        for n, rows in gather:
            x, grad = queries[n].to(grads.dtype)[:, None], grads[n]
            if ctx.metric == "inner":
                slope = x
            else:
                slope = 2 * (x - rows)
                rows = -slope
            dq[n] = (grad[:, None] @ rows)[:, 0].to(dq.dtype)
            if dk is not None:
                gather.add(dk, n, grad[..., None] * slope)
        return dq.view(q.shape), None if dk is None else dk.view(k.shape).to(k.dtype), None, None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, v: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(weights, v, at)
        gather = _Gather(v, at, weights.dtype)
        shares = weights.reshape(gather.index.shape)
        o = weights.new_zeros(len(shares), v.shape[-1])
        for n, rows in gather:
            o[n] = (shares[n][:, None] @ rows)[:, 0]
        return (
            o.view(*at.shape[:3], -1).to(v.dtype)
            if o.numel()
            else v.new_zeros(*at.shape[:3], v.shape[-1])
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor | None, None]:
        weights, v, at = ctx.saved_tensors
        gather = _Gather(v, at, weights.dtype)
        shares = weights.reshape(gather.index.shape).masked_fill(gather.none, 0)
        grads = do.reshape(len(shares), -1).to(weights.dtype)
        dweights = torch.zeros_like(shares)
        dv = None
        if ctx.needs_input_grad[1]:
            dv = torch.zeros_like(gather.flat, dtype=weights.dtype)
        for n, rows in gather:
            dweights[n] = (rows @ grads[n][..., None])[..., 0]
            if dv is not None:
                gather.add(dv, n, shares[n][..., None] * grads[n][:, None])
        dv = None if dv is None else dv.view(v.shape).to(v.dtype)
        return dweights.view(weights.shape), dv, None


_score: Any = torch.compiler.disable(_Score.apply)
_mix: Any = torch.compiler.disable(_Mix.apply)


class Listing(NamedTuple):
    """What an index found, best first: −∞ and −1 where it has fewer. Queries get gradients."""

    scores: Float[Tensor, "N K"]
    ids: Int[Tensor, "N K"]


class Index(ABC):
    """Keys of one width, under ids 0, 1, 2 … in the order in which they were added.

    Args:
        metric: `inner`, larger is nearer; or `l2`, scores are −‖q − k‖².
    """

    def __init__(self, width: int, *, metric: Metric = "inner") -> None:
        _check(metric, width)
        self.width, self.next = width, 0
        self.metric: Metric = metric

    @abstractmethod
    def __len__(self) -> int: ...

    def add(self, keys: Float[Tensor, "N D"]) -> Int[Tensor, "N"]:
        """Store keys; returns their ids."""
        self._fits(keys)
        ids = torch.arange(self.next, self.next + len(keys))
        self._add(keys.detach(), ids)
        self.next += len(keys)
        return ids

    def search(
        self,
        q: Float[Tensor, "N D"],
        count: int,
        *,
        before: Int[Tensor, "N"] | None = None,
        apart: Int[Tensor, "N"] | None = None,
    ) -> Listing:
        """The nearest `count` keys of each query, scored against the keys as they are stored.

        Args:
            before: only ids below this. apart: all ids but this.
        """
        self._fits(q)
        _check(self.metric, count)
        return self._search(q, count, before, apart)

    @abstractmethod
    def remove(self, ids: Int[Tensor, "N"]) -> None:
        """Forget keys; ids that are not there are passed over, and none is given out again."""

    @abstractmethod
    def vectors(self, ids: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """The keys of these ids as stored; a quantised index gives what it made of them."""

    def save(self, path: str | Path) -> None:
        """Write the index as one safetensors file: whole or not at all."""
        path = Path(path)
        about = {"metric": self.metric, "width": self.width, "next": self.next}
        content, own = self._content()
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            save_file(content, temporary, metadata={"longspan_index": json.dumps(about | own)})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @abstractmethod
    def _add(self, keys: Tensor, ids: Tensor) -> None: ...

    @abstractmethod
    def _search(
        self, q: Tensor, count: int, before: Tensor | None, apart: Tensor | None
    ) -> Listing: ...

    @abstractmethod
    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...

    def _fits(self, keys: Tensor) -> None:
        if keys.shape[1] != self.width:
            raise LongspanError(
                f"this index holds keys of width {self.width} and got {keys.shape[1]}."
            )

    def _missing(self, ids: Tensor) -> LongspanError:
        return LongspanError(f"this index does not hold all of the ids {ids.tolist()[:8]} …")


class Exact(Index):
    """All keys in one tensor, searched block by block.

    Args:
        dtype: to store keys in; scores are computed in at least float32 whatever it is.
    """

    def __init__(
        self, width: int, *, metric: Metric = "inner", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(width, metric=metric)
        self.size = 0
        self.keys = torch.empty(0, width, dtype=dtype)
        self.ids = torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self.size

    def _add(self, keys: Tensor, ids: Tensor) -> None:
        size = self.size + len(keys)
        if size > len(self.keys):
            room = max(size, 2 * self.size)
            held = self.keys[: self.size], self.ids[: self.size]
            self.keys = keys.new_empty(room, self.width, dtype=self.keys.dtype)
            self.ids = ids.new_empty(room)
            self.keys[: self.size], self.ids[: self.size] = held
        self.keys[self.size : size] = keys
        self.ids[self.size : size] = ids
        self.size = size

    def _search(
        self, q: Tensor, count: int, before: Tensor | None, apart: Tensor | None
    ) -> Listing:
        k, ids = self.keys[: self.size], self.ids[: self.size].to(q.device)
        bounds = (None if t is None else t.to(q.device)[None] for t in (before, apart))
        limit, own = bounds
        query, store = q[None, None], k.to(q.device)[None, None]
        at = search(
            query, store, count, metric=self.metric, places=ids[None], before=limit, apart=own
        )
        scores = score(query, store, at, metric=self.metric)[0, 0]
        at = at[0, 0]
        if self.size:
            at = ids[at.clamp(min=0)].masked_fill(at < 0, -1)
        return Listing(scores, at)

    def remove(self, ids: Int[Tensor, "N"]) -> None:
        stays = ~torch.isin(self.ids[: self.size], ids.cpu())
        self.keys, self.ids = (t[: self.size][stays] for t in (self.keys, self.ids))
        self.size = len(self.ids)

    def vectors(self, ids: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        held, ids = self.ids[: self.size], ids.cpu()
        at = torch.searchsorted(held, ids)  # ids grow
        if bool((at >= self.size).any()) or not torch.equal(held[at], ids):
            raise self._missing(ids)
        return self.keys[at]

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        content = {"keys": self.keys[: self.size], "ids": self.ids[: self.size]}
        return {n: t.contiguous() for n, t in content.items()}, {"backend": "exact"}


class Faiss(Index):
    """An index of faiss's, on the CPU in float32.

    Args:
        kind: as faiss's factory names it: "Flat", exact; "IVF4096,PQ64", trained by `train`.
        probes: cells that an IVF index looks into.

    Raises:
        LongspanError: faiss is not installed, or refuses what is asked of this kind.
    """

    def __init__(
        self, width: int, *, metric: Metric = "inner", kind: str = "Flat", probes: int = 32
    ) -> None:
        super().__init__(width, metric=metric)
        self.faiss = _faiss()
        self.kind, self.probes = kind, probes
        measure = self.faiss.METRIC_L2 if metric == "l2" else self.faiss.METRIC_INNER_PRODUCT
        index = self._try(self.faiss.index_factory, width, kind, measure)
        cells = self.faiss.try_extract_index_ivf(index)
        if cells is None:
            index = self.faiss.IndexIDMap2(index)
        else:
            cells.set_direct_map_type(self.faiss.DirectMap.Hashtable)
        self.index = index

    def __len__(self) -> int:
        return self.index.ntotal

    def train(self, keys: Float[Tensor, "N D"]) -> None:
        """Learn cells and codes from a sample, before anything is added."""
        self._fits(keys)
        self._try(self.index.train, _numbers(keys))

    def _add(self, keys: Tensor, ids: Tensor) -> None:
        if not self.index.is_trained:
            raise LongspanError(f"a {self.kind} index learns from a sample first: call train.")
        self._try(self.index.add_with_ids, _numbers(keys), ids.numpy())

    def _search(
        self, q: Tensor, count: int, before: Tensor | None, apart: Tensor | None
    ) -> Listing:
        more = count + (apart is not None)
        ids = torch.full((len(q), more), -1)
        numbers = _numbers(q)
        limits = torch.full((len(q),), -1) if before is None else before.cpu()
        for limit in limits.unique().tolist():
            rows = limits == limit
            selector = None if before is None else self.faiss.IDSelectorRange(0, limit)
            if self.faiss.try_extract_index_ivf(self.index) is None:
                how = self.faiss.SearchParameters(sel=selector)
            else:
                how = self.faiss.SearchParametersIVF(sel=selector, nprobe=self.probes)
            found = self._try(self.index.search, numbers[rows.numpy()], more, params=how)[1]
            ids[rows] = torch.from_numpy(found)
        if apart is not None:
            gone = (ids == apart.cpu()[:, None]) | (ids < 0)
            order = gone.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
            ids = ids.masked_fill(gone, -1).gather(1, order)
        return Listing(self._scores(q, ids), ids.to(q.device))

    def _scores(self, q: Tensor, ids: Tensor) -> Tensor:
        """Scores against the stored keys, some queries at a time."""
        each = max(1, WORKSPACE // (16 * max(1, ids.shape[1] * self.width)))
        parts = []
        for x, wanted in zip(q.split(each), ids.split(each), strict=True):
            real = wanted >= 0
            at = torch.full_like(wanted, -1)
            at[real] = torch.arange(int(real.sum()))
            keys = self.vectors(wanted[real]).to(q)
            at = at.to(q.device)[None, None]
            parts.append(score(x[None, None], keys[None, None], at, metric=self.metric)[0, 0])
        wide = torch.promote_types(q.dtype, torch.float32)
        return torch.cat(parts) if parts else q.new_empty(ids.shape, dtype=wide)

    def remove(self, ids: Int[Tensor, "N"]) -> None:
        chosen = ids.cpu().contiguous().numpy()
        self._try(self.index.remove_ids, self.faiss.IDSelectorArray(chosen))

    def vectors(self, ids: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        try:
            return torch.from_numpy(self.index.reconstruct_batch(ids.cpu().contiguous().numpy()))
        except RuntimeError as error:
            raise self._missing(ids) from error

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        content = torch.from_numpy(self.faiss.serialize_index(self.index))
        return {"index": content}, {"backend": "faiss", "kind": self.kind, "probes": self.probes}

    def _try(self, call: Any, *arguments: Any, params: Any = None) -> Any:
        try:
            return call(*arguments) if params is None else call(*arguments, params=params)
        except RuntimeError as error:
            raise LongspanError(
                f"faiss cannot do this with a {self.kind} index: {error}"
            ) from error


def load(path: str | Path) -> Exact | Faiss:
    """Read what an index saved.

    Raises:
        LongspanError: no such file; a faiss index where faiss is not installed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("longspan_index", "null"))
            content = {name: file.get_tensor(name) for name in file.keys() if about}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LongspanError(f"{path} cannot be read as an index: {error}") from error
    if about is None:
        raise LongspanError(f"{path} is no saved index; expected a file by Index.save.")
    width, metric = about["width"], about["metric"]
    if about["backend"] == "exact":
        index = Exact(width, metric=metric, dtype=content["keys"].dtype)
        index.keys, index.ids, index.size = content["keys"], content["ids"], len(content["ids"])
    else:
        index = Faiss(width, metric=metric, kind=about["kind"], probes=about["probes"])
        index.index = index.faiss.deserialize_index(content["index"].numpy())
    index.next = about["next"]
    return index


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise LongspanError(
            "a faiss index was asked for and faiss is not installed: pip install faiss-cpu, or "
            "use the exact index."
        ) from error


def _numbers(t: Tensor) -> Any:
    return t.detach().to("cpu", torch.float32).contiguous().numpy()


def _check(metric: str, count: int) -> None:
    if metric not in get_args(Metric):
        raise LongspanError(f"no metric '{metric}'; expected {', '.join(get_args(Metric))}.")
    if count < 1:
        raise LongspanError(f"{count} neighbours or columns were asked for: expected 1 or more.")
