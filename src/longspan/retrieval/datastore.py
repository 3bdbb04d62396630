"""A datastore on disk: keys and the tokens that followed them, built by reading a corpus.

    FOLDER/store.json           what is in it: shards with sizes and SHA-256, parts, the index
    FOLDER/000000.keys.npy      n × width, float16, mapped into memory
    FOLDER/000000.values.npy    n, int32
    FOLDER/index.safetensors    a faiss index over the first shards, where one was built

Every file is written beside its place and moved there, and `store.json` last: what it names is
whole, and a build that was killed goes on behind the last shard it names.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.engines import nearest
from longspan.engines.nearest import Listing, Metric
from longspan.errors import LongspanError
from longspan.nn.retrieval import Found
from longspan.retrieval.reading import Stream, body, evaluating, key_layer, tapped, windows

_ABOUT, _INDEX = "store.json", "index.safetensors"
_DTYPES = {torch.float16: np.float16, torch.float32: np.float32}


class Datastore:
    """Keys of one width under ids 0, 1, 2 …, each with the token that followed it.

    Args:
        check: compare every file with its SHA-256 (reads all of them), or its size only.

    Raises:
        LongspanError: no datastore there, or a file that is gone, cut short or changed.

    >>> store = Datastore.create("memory", width=576)
    >>> store.read(model, tokens)
    >>> found = store.find(queries, 1024)
    """

    def __init__(self, folder: str | Path, *, check: bool = True) -> None:
        self.folder = Path(folder)
        path = self.folder / _ABOUT
        try:
            self.about: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            raise LongspanError(
                f"{self.folder} holds no datastore: make one by Datastore.create."
            ) from None
        except ValueError as error:
            raise LongspanError(f"{path} cannot be read: {error}.") from error
        for name, fact in self._files().items():
            self._check(name, fact, whole=check)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        width: int,
        dtype: torch.dtype = torch.float16,
        metric: Metric = "l2",
    ) -> "Datastore":
        """An empty datastore; one that is already there is opened, if it is of this make.

        Raises:
            LongspanError: another width, dtype or metric is there; a dtype that is no float16 or
                float32.
        """
        if dtype not in _DTYPES:
            raise LongspanError(f"keys cannot be stored as {dtype}: expected float16 or float32.")
        make = {"width": width, "dtype": str(dtype).removeprefix("torch."), "metric": metric}
        folder = Path(folder)
        if (folder / _ABOUT).is_file():
            store = cls(folder)
            if other := {n: store.about[n] for n in make if store.about[n] != make[n]}:
                raise LongspanError(f"the datastore in {folder} has {other}; expected {make}.")
            return store
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / _ABOUT, _json({**make, "shards": [], "parts": [], "index": None}))
        return cls(folder)

    def __len__(self) -> int:
        return sum(shard["count"] for shard in self.about["shards"])

    @property
    def width(self) -> int:
        return self.about["width"]

    def add(self, keys: Float[Tensor, "N D"], values: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
        """Append a shard of keys and their values; returns their ids.

        Raises:
            LongspanError: keys of another width, or too large for the dtype; a stream that is not
                read to its end, whose ids must not be broken.
        """
        if any(part["done"] < part["entries"] for part in self.about["parts"]):
            raise LongspanError(f"{self.folder} is amid a stream: read it to its end first.")
        first = len(self)
        self._append(keys, values, {})
        return torch.arange(first, len(self))

    def read(
        self,
        model: nn.Module,
        tokens: Stream,
        *,
        layer: str | None = None,
        window: int = 1024,
        stride: int | None = None,
        batch: int = 1,
        shard: int = 65536,
    ) -> range:
        """Append an entry for every token of a stream but the last: its key, and the next token.

        Returns the ids, so that entry n of the stream has the nth. A stream that was read already,
        by this model in this way, is not read again, and one that was interrupted goes on where
        it stopped, bit by bit as if it had not been.

        Args:
            tokens: one stream, which may be mapped from a file; call again for more documents.
            layer: as in `key_layer`.
            window, stride, batch: as in `windows`; keys see as much context as they leave.
            shard: entries that are held in memory and then written at once.

        Raises:
            LongspanError: another stream is unfinished, or a setting that cannot be.
        """
        layer = key_layer(model, layer)
        how = {"layer": layer, "window": window, "stride": stride or window, "batch": batch}
        asked = {**how, "tokens": digest([tokens]), "model": fingerprint(model)}
        part = self._part(asked, len(tokens) - 1)
        device = next(model.parameters()).device
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def flush() -> None:
            count = sum(map(len, keys))
            if count:
                then = {"part": part["number"], "done": part["done"] + count}
                self._append(torch.cat(keys), torch.cat(values), then)
                part["done"] += count
                keys.clear()
                values.clear()

        with evaluating(model), tapped(model, layer) as taps:
            run = body(model) if taps.only_body else model
            spans = windows(tokens, window=window, stride=stride, batch=batch, start=part["done"])
            for rows, new, _ in spans:
                run(input_ids=rows[:, :-1].to(device), use_cache=False)
                keys.append(taps[layer][:, -new:].flatten(0, 1).cpu())
                values.append(rows[:, -new:].flatten())
                if sum(map(len, keys)) >= shard:
                    flush()
            flush()
        return range(part["first"], part["first"] + part["entries"])

    def _part(self, asked: dict[str, Any], entries: int) -> dict[str, Any]:
        """What is on record of reading a stream; where there is nothing, it starts here."""
        parts = self.about["parts"]
        known = [p for p in parts if all(p[name] == fact for name, fact in asked.items())]
        open_parts = [p for p in parts if p["done"] < p["entries"]]
        if open_parts and open_parts[0] not in known:
            part = open_parts[0]
            changed = [name for name, fact in asked.items() if part[name] != fact]
            raise LongspanError(
                f"{self.folder} was interrupted at entry {part['done']} of {part['entries']} of a "
                f"stream, and this is another (by {', '.join(changed)}): go on with that one, or "
                "make a new datastore."
            )
        if known:
            return dict(known[-1])
        part = {"number": len(parts), "first": len(self), "entries": entries, "done": 0, **asked}
        self._write({**self.about, "parts": [*parts, part]})
        return dict(part)

    def values(self, ids: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The tokens of these ids; −1 for −1."""
        return self._pick(ids, 1).masked_fill(ids.cpu() < 0, -1).to(ids.device)

    def keys(self, ids: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """The keys of these ids, in the dtype they are stored in."""
        return self._pick(ids, 0).to(ids.device)

    def search(
        self,
        q: Float[Tensor, "N D"],
        count: int,
        *,
        apart: Int[Tensor, "N"] | None = None,
        exact: bool = False,
    ) -> Listing:
        """The nearest `count` entries of each query, with distances to the keys as stored.

        By the index, where one was built, for what it covers, and exactly for the rest.

        Args:
            apart: all ids but this: a query's own entry, on text that is stored.
            exact: leave the index aside.
        """
        index = None if exact else self.index
        best: list[Listing] = []
        start = 0
        if index is not None:
            start = self.about["index"]["entries"]
            ids = index.search(q, count, apart=apart).ids
            best.append(Listing(self._distances(q, ids), ids))
        first = 0
        for keys, _ in self._shards:
            if first >= start:
                best.append(self._scan(q, count, keys, first, apart))
            first += len(keys)
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.cat([q.new_empty(len(q), 0, dtype=wide), *(b.scores for b in best)], 1)
        ids = torch.cat([*(b.ids for b in best), *([] if best else [scores.long()])], 1)
        scores, order = scores.topk(min(count, scores.shape[1]), dim=1)
        return Listing(scores, ids.gather(1, order))

    def find(
        self,
        q: Float[Tensor, "B L D"],
        count: int,
        *,
        apart: Int[Tensor, "B L"] | None = None,
        exact: bool = False,
    ) -> Found:
        """`search` for a batch of sequences, with the tokens that followed what it found."""
        own = None if apart is None else apart.flatten()
        if not count:
            empty = q.new_empty(*q.shape[:2], 0)
            return Found(empty.float(), empty.long())
        scores, ids = self.search(q.flatten(0, 1), count, apart=own, exact=exact)
        return Found(scores.unflatten(0, q.shape[:2]), self.values(ids).unflatten(0, q.shape[:2]))

    def build_index(self, kind: str = "Flat", *, probes: int = 32, sample: int = 1_000_000) -> None:
        """Build a faiss index over all entries there are, and keep it with them.

        Args:
            kind: as faiss's factory names it: "IVF4096,PQ64" is the paper's.
            sample: entries, evenly spaced, that cells and codes are learned from.

        Raises:
            LongspanError: faiss is not installed or refuses; the datastore is empty.
        """
        entries = len(self)
        if not entries:
            raise LongspanError(f"{self.folder} holds no keys to build an index of.")
        index = nearest.Faiss(self.width, metric=self.about["metric"], kind=kind, probes=probes)
        index.train(self.keys(torch.arange(0, entries, -(-entries // sample))).float())
        for keys, _ in self._shards:
            for piece in keys.split(65536):
                index.add(piece.float())
        path = self.folder / _INDEX
        index.save(path)
        self._write({**self.about, "index": {"entries": entries, **_fact(path), "kind": kind}})
        self.__dict__["index"] = index

    @cached_property
    def index(self) -> nearest.Index | None:
        """The faiss index; None where there is none, or, with a warning, no faiss to read it."""
        if self.about["index"] is None:
            return None
        try:
            return nearest.load(self.folder / _INDEX)
        except LongspanError as error:
            if not isinstance(error.__cause__, ImportError):
                raise
            warnings.warn(
                f"{self.folder} has an index and faiss is not installed: searching exactly.",
                stacklevel=3,
            )
            return None

    def _scan(
        self, q: Tensor, count: int, keys: Tensor, first: int, apart: Tensor | None
    ) -> Listing:
        metric: Metric = self.about["metric"]
        k = keys.to(q.device)[None, None]
        ids = torch.arange(first, first + len(keys), device=q.device)
        own = None if apart is None else apart[None]
        at = nearest.search(q[None, None], k, count, metric=metric, places=ids[None], apart=own)
        scores = nearest.score(q[None, None], k, at, metric=metric)[0, 0]
        return Listing(scores, torch.where(at < 0, -1, at + first)[0, 0])

    def _distances(self, q: Tensor, ids: Tensor) -> Tensor:
        """Scores against the stored keys: a quantised index knows them only roughly."""
        each = max(1, nearest.WORKSPACE // (8 * max(1, ids.shape[1] * self.width)))
        parts = []
        for x, wanted in zip(q.split(each), ids.split(each), strict=True):
            k = self.keys(wanted.flatten().clamp(min=0))[None, None]
            at = torch.arange(wanted.numel(), device=q.device).view_as(wanted)
            at = at.masked_fill(wanted < 0, -1)[None, None]
            parts.append(nearest.score(x[None, None], k, at, metric=self.about["metric"])[0, 0])
        wide = torch.promote_types(q.dtype, torch.float32)
        return torch.cat(parts) if parts else q.new_empty(ids.shape, dtype=wide)

    @cached_property
    def _shards(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every shard, mapped from the files."""

        def mapped(name: str) -> Tensor:
            # Copy on write: torch wants what it could write to, and the file stays as it is.
            return torch.from_numpy(np.load(self.folder / name, mmap_mode="c"))

        return [
            (mapped(_name(n, "keys")), mapped(_name(n, "values")))
            for n in range(len(self.about["shards"]))
        ]

    def _pick(self, ids: Tensor, which: int) -> Tensor:
        """Rows of keys (0) or values (1) from whatever shard they are in."""
        flat = ids.flatten().cpu()
        if len(flat) and int(flat.max()) >= len(self):
            raise LongspanError(f"id {int(flat.max())} of a datastore of {len(self)} entries.")
        dtype = getattr(torch, self.about["dtype"]) if which == 0 else torch.long
        picked = torch.zeros((len(flat), *((self.width,) if which == 0 else ())), dtype=dtype)
        first = 0
        for shard in self._shards:
            here = (flat >= first) & (flat < first + len(shard[0]))
            picked[here] = shard[which][flat[here] - first].to(dtype)
            first += len(shard[0])
        return picked.unflatten(0, ids.shape) if which else picked

    def _append(self, keys: Tensor, values: Tensor, part: dict[str, int]) -> None:
        """One more shard; `part` says how far the reading of a stream has come with it."""
        dtype = getattr(torch, self.about["dtype"])
        if keys.shape[1] != self.width or len(keys) != len(values):
            raise LongspanError(
                f"got {len(keys)} keys of width {keys.shape[1]} and {len(values)} values; "
                f"expected as many of each, and a width of {self.width}."
            )
        kept = keys.detach().to("cpu", dtype)
        if not bool(kept.isfinite().all()):
            raise LongspanError(
                f"some keys do not fit {dtype} or are no numbers: create the datastore with "
                "dtype=torch.float32, or look for NaN in the model."
            )
        number = len(self.about["shards"])
        shard: dict[str, Any] = {"count": len(kept)}
        for what, array in (
            ("keys", kept.numpy()),
            ("values", values.detach().cpu().to(torch.int32).numpy()),
        ):
            path = self.folder / _name(number, what)
            _replace(path, array)
            shard[what] = _fact(path)
        about = {**self.about, "shards": [*self.about["shards"], shard]}
        if part:
            about["parts"] = [
                {**p, "done": part["done"]} if p["number"] == part["part"] else p
                for p in about["parts"]
            ]
        self._write(about)

    def _write(self, about: dict[str, Any]) -> None:
        _replace(self.folder / _ABOUT, _json(about))
        self.about = about
        self.__dict__.pop("_shards", None)

    def _files(self) -> dict[str, dict[str, Any]]:
        files = {
            _name(n, what): shard[what]
            for n, shard in enumerate(self.about["shards"])
            for what in ("keys", "values")
        }
        return files if self.about["index"] is None else {**files, _INDEX: self.about["index"]}

    def _check(self, name: str, fact: dict[str, Any], *, whole: bool) -> None:
        path = self.folder / name
        if not path.is_file():
            raise LongspanError(f"{path} is gone: bring it back, or build the datastore anew.")
        size = path.stat().st_size
        if size != fact["size"] or (whole and _fact(path)["sha256"] != fact["sha256"]):
            raise LongspanError(
                f"{path} is not the file that was written ({size} bytes, expected {fact['size']}"
                f"{'' if size != fact['size'] else ', with another SHA-256'}): bring it back, or "
                "build the datastore anew."
            )


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights and their names: keys of two models do not mix."""
    state = model.state_dict()
    names = hashlib.sha256("\n".join(state).encode()).hexdigest()
    return hashlib.sha256((names + digest(state.values())).encode()).hexdigest()


def digest(tensors: Any) -> str:
    """SHA-256 of tensors' bytes, read piece by piece."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        for piece in _pieces(tensor):
            found.update(piece.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _pieces(tensor: Tensor, size: int = 1 << 24) -> Iterator[Tensor]:
    for piece in tensor.detach().reshape(-1).split(size):
        yield piece.cpu().contiguous()


def _name(number: int, what: str) -> str:
    return f"{number:06}.{what}.npy"


def _json(about: dict[str, Any]) -> bytes:
    return (json.dumps(about, indent=1) + "\n").encode()


def _fact(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "size": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _replace(path: Path, content: Any) -> None:
    """A file written, brought to the disk and moved to its place: whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                np.save(file, content, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
