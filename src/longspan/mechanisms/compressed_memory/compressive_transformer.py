"""Compressive Transformer (Rae et al., 2019)."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from longspan.card import Card
from longspan.engines import segment as kept
from longspan.errors import LongspanError
from longspan.nn import MultiHead, Position
from longspan.nn.memory import Losses, Segmented
from longspan.registry import build, mechanism
from longspan.shapes import Inputs

Compression = Literal["mean", "max", "conv", "dilated-conv", "most-used"]
Loss = Literal["attention-reconstruction", "auto-encoding", "bptt", "none"]


class Memory(NamedTuple):
    """The compressed memory, the memory, and of its slots the attention received and by how many
    queries (where the most used are kept)."""

    compressed: kept.Queue
    recent: kept.Queue
    usage: Float[Tensor, "B M 2"] | None


class Convolution(nn.Module):
    """Same-length convolutions of width 3 with relus between, then one of width and stride c."""

    def __init__(self, width: int, rate: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=d, dilation=d) for d in dilations
        )
        self.last = nn.Conv1d(width, width, rate, stride=rate)

    def forward(self, x: Inputs) -> Float[Tensor, "B N E"]:
        y = x.mT
        for layer in self.layers:
            y = layer(y).relu()
        return self.last(y).mT


@mechanism(
    Card(
        id="compressive-transformer",
        name="Compressive Transformer",
        kind="memory",
        family="compressed-memory",
        paper="Compressive Transformers for Long-Range Sequence Modelling",
        cite="Rae et al., ICLR 2020",
        link="https://arxiv.org/abs/1911.05507",
        what="Compresses what leaves the memory of recent inputs into a second, coarser memory.",
        modes={"causal", "step"},
        time="L*C*E + L*M*E + L*E*E",
        memory="M*E + C*E",
        tiny={
            "width": 24,
            "heads": 3,
            "segment": 12,
            "memory": 16,
            "compressed": 5,
            "rate": 2,
            "loss": "bptt",
        },
        exact={"width": 24, "heads": 3, "segment": 12, "memory": 0, "rate": 2, "loss": "bptt"},
    )
)
class CompressiveTransformer(Segmented):
    """Causal attention over [cm ; m ; segment] with Transformer-XL's positions, counted in slots.

        m ← the last n_m of [m ; h], cm ← the last n_cm of [cm ; f_c(the n_s that left m)]

    Both hold the layer's inputs, and are normalised and projected anew (Sec. 3). The state is both
    and the tokens of the open segment. Nothing flows from the layer's own loss into what is
    remembered, and the losses that train f_c (Sec. 3.1) reach f_c alone:

        auto-encoding              ‖old − g(f_c(old))‖
        attention-reconstruction   ‖attn(h, old) − attn(h, f_c(old))‖, without positions

    With `bptt` it all flows through the segments of a call. The paper's memories start as zeros
    that are attended to; here they start empty unless `start` says so.

    Args:
        segment: n_s. memory: n_m. compressed: n_cm, by default n_m / c. rate: c.
        memory_eval, compressed_eval: in evaluation, by default the same.
        compression: f_c, or a module of one's own, B × n_s × E → B × n_s / c × E.
        dilations: of dilated-conv, which the paper leaves open.
        error: the norm of each row's difference, or its mean square.
        relative: a position that biases, shared with other layers; by default one of its own.

    Raises:
        LongspanError: sizes that are negative or do not divide, a name that does not exist,
            a memory shorter than a segment where the most used are kept.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        head_width: int | None = None,
        segment: int = 512,
        memory: int = 512,
        compressed: int | None = None,
        memory_eval: int | None = None,
        compressed_eval: int | None = None,
        rate: int = 4,
        compression: Compression | nn.Module = "conv",
        dilations: Sequence[int] = (1, 2, 4),
        loss: Loss = "attention-reconstruction",
        error: Literal["norm", "square"] = "norm",
        start: Literal["empty", "zeros"] = "empty",
        dropout: float = 0.0,
        relative: Position | None = None,
    ) -> None:
        super().__init__(segment=segment)
        compressed = memory // max(rate, 1) if compressed is None else compressed
        memory_eval = memory if memory_eval is None else memory_eval
        compressed_eval = compressed if compressed_eval is None else compressed_eval
        self.sizes = {True: (compressed, memory), False: (compressed_eval, memory_eval)}
        self.rate, self.loss, self.error, self.start = rate, loss, error, start
        self.compression = compression if isinstance(compression, str) else "own"
        self._check(dilations)
        each = head_width or width // heads
        position = relative or build(
            "transformer-xl-relative-position", width=width, heads=heads, head_width=each
        )
        attention = build("multi-head-attention", causal=True, backend="tiled", dropout=dropout)
        self.mixer = MultiHead(
            attention, width=width, heads=heads, head_width=each, position=position, biases=False
        )
        if isinstance(compression, nn.Module):
            self.compress = compression
        elif compression in ("conv", "dilated-conv"):
            self.compress = Convolution(width, rate, dilations if "dilated" in compression else ())
        else:
            self.compress = None
        self.restore = None
        if loss == "auto-encoding":
            self.restore = nn.ConvTranspose1d(width, width, rate, stride=rate)

    def _check(self, dilations: Sequence[int]) -> None:
        for name, value, known in (
            ("compression", self.compression, (*get_args(Compression), "own")),
            ("loss", self.loss, get_args(Loss)),
            ("error", self.error, ("norm", "square")),
            ("start", self.start, ("empty", "zeros")),
        ):
            if value not in known:
                raise LongspanError(f"no {name} '{value}'; expected {', '.join(known)}.")
        sizes = [size for pair in self.sizes.values() for size in pair]
        if min(sizes) < 0 or self.rate < 1 or self.segment % self.rate or min(dilations) < 1:
            raise LongspanError(
                f"memories of {sizes} slots, a rate of {self.rate} for segments of {self.segment}, "
                f"dilations {list(dilations)}: expected at least 0, a divisor, and at least 1."
            )
        if self.compression == "most-used" and min(sizes[1::2]) < self.segment and any(sizes[::2]):
            raise LongspanError(
                f"most-used counts attention to the memory, which a memory of {min(sizes[1::2])} "
                f"is too short for: give at least a segment, {self.segment}."
            )

    def fresh(self, x: Inputs) -> Memory:
        compressed, recent = (kept.empty(x, size) for size in self.sizes[self.training])
        return Memory(compressed, recent, self._usage(recent.items))

    def _usage(self, like: Tensor) -> Tensor | None:
        used = self.compression == "most-used"
        return like.new_zeros(*like.shape[:2], 2, dtype=torch.float32) if used else None

    def read(
        self, memory: Memory, x: Tensor, seen: Tensor, asks: Tensor
    ) -> tuple[Tensor, Memory, Losses]:
        few, many = self.sizes[self.training]
        usage = memory.usage
        if usage is not None:
            usage = F.pad(usage, (0, 0, many - usage.shape[1], 0))
        memory = Memory(
            kept.resize(memory.compressed, few), kept.resize(memory.recent, many), usage
        )
        items = torch.cat([memory.compressed.items, memory.recent.items], 1)
        keep = torch.cat([memory.compressed.keep, memory.recent.keep], 1)
        if self.start == "zeros":
            keep = torch.ones_like(keep)
        whole = self.norm(torch.cat([items.to(x.dtype), x], 1))
        keep = torch.cat([keep, seen], 1)
        queries = whole[:, whole.shape[1] - asks.shape[1] :]
        y, _ = self.mixer(queries, context=whole, keep=keep)
        if usage is not None:
            weights = self._weights(queries, whole, keep)[..., few : few + many]
            received = torch.einsum("bhqm, bq -> bm", weights.float(), asks.float())
            asked = asks.sum(1)[:, None].expand_as(received)
            more = torch.stack([received / self.mixer.heads, asked], -1)
            memory = memory._replace(usage=usage + more)
        return y, memory, {}

    @torch.no_grad()
    def _weights(self, x: Tensor, whole: Tensor, keep: Tensor) -> Tensor:
        q, k = (
            self.mixer.project[name](t).unflatten(-1, (self.mixer.heads, -1)).transpose(1, 2)
            for name, t in (("q", x), ("k", whole))
        )
        bias: Any = self.mixer.position.bias  # pyright: ignore[reportOptionalMemberAccess]
        return self.mixer.attention.weights(q, k, keep=keep, bias=bias)  # pyright: ignore[reportCallIssue]

    def write(self, memory: Memory, x: Tensor, rows: Tensor) -> tuple[Memory, Losses]:
        (few, many), losses, flows = self.sizes[self.training], {}, self.loss == "bptt"
        compressed, recent, usage = memory
        whole = kept.push(
            recent, x, torch.ones_like(x[..., 0]) > 0, capacity=many + self.segment, gradient=flows
        )
        old, present = (t[:, : self.segment] for t in whole)
        if few:
            new, keep = self._compressed(old, present, usage)
            if self.training:
                losses = self._losses(x.detach(), old, present, new, keep, rows)
            compressed = kept.push(compressed, new, keep, capacity=few, gradient=flows)
        if usage is not None:
            usage = F.pad(usage, (0, 0, 0, self.segment))[:, self.segment :]
        return Memory(compressed, kept.resize(whole, many), usage), losses

    def _compressed(
        self, old: Tensor, present: Tensor, usage: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        count = self.segment // self.rate
        if usage is not None:
            received, queries = usage[:, : self.segment].unbind(-1)
            score = (received / queries.clamp(min=1)).masked_fill(~present, -1)
            new, at = kept.select(old, score, count)
            return new, present.gather(1, at)
        if self.compression in ("mean", "max"):
            new = kept.pool(old, self.rate, self.compression)
        else:
            assert self.compress is not None
            new = self.compress(old)
        if new.shape != (old.shape[0], count, old.shape[2]):
            raise LongspanError(
                f"the compression made {tuple(new.shape)} of {tuple(old.shape)}; expected "
                f"{(old.shape[0], count, old.shape[2])}, a vector for each {self.rate}."
            )
        return new, present.unflatten(1, (count, self.rate)).any(2)

    def _losses(
        self, x: Tensor, old: Tensor, present: Tensor, new: Tensor, keep: Tensor, rows: Tensor
    ) -> Losses:
        real = rows & present.any(1)
        if self.loss in ("bptt", "none") or not (new.requires_grad or self.restore):
            return {}
        if not bool(real.any()):
            return {}
        if self.restore is not None:
            name, missed = "auto_encoding", (old - self.restore(new.mT).mT) * present[..., None]
        else:
            name = "attention_reconstruction"
            missed = self._content(x, old, present) - self._content(x, new, keep)
        missed = missed[real].flatten(1)
        error = missed.square().mean(1) if self.error == "square" else missed.norm(dim=1)
        return {name: error.mean()}

    def _content(self, x: Tensor, memory: Tensor, keep: Tensor) -> Tensor:
        """attn(x, memory) by the layer's own projections, which get no gradient."""
        heads, project = self.mixer.heads, self.mixer.project
        x, memory = (_fixed(self.norm, t) for t in (x, memory))
        q, k, v = (
            _fixed(project[name], t).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name, t in (("q", x), ("k", memory), ("v", memory))
        )
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~keep[:, None, None], -torch.inf)
        dead = ~keep.any(1)[:, None, None, None]
        return scores.masked_fill(dead, 0).softmax(-1) @ v


def _fixed(module: nn.Module, x: Tensor) -> Tensor:
    return functional_call(module, {n: p.detach() for n, p in module.named_parameters()}, (x,))
