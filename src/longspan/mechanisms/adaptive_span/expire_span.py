"""Expire-Span (Sukhbaatar et al., 2021)."""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn import MultiHead
from longspan.nn.memory import Losses, Open, Segmented
from longspan.registry import build, mechanism
from longspan.shapes import Inputs


class Memory(NamedTuple):
    """The layer's inputs that are kept, how far each lies before the segment, which are alive."""

    items: Float[Tensor, "B S E"]
    age: Int[Tensor, "B S"]
    keep: Bool[Tensor, "B S"]


class Spans(NamedTuple):
    """The mean and the longest span of what is alive in a memory, and how many slots it has."""

    mean: float
    longest: float
    slots: int


@mechanism(
    Card(
        id="expire-span",
        name="Expire-Span",
        kind="memory",
        family="adaptive-span",
        paper="Not All Memories are Created Equal: Learning to Forget by Expiring",
        cite="Sukhbaatar et al., ICML 2021",
        link="https://arxiv.org/abs/2105.06548",
        what="Predicts from each token how long it stays visible, and frees what has expired.",
        modes={"causal", "step"},
        time="L*C*E + L*M*E + L*E*E",
        memory="M*E + C*E",
        tiny={"width": 24, "heads": 3, "span": 24, "ramp": 12, "start": 0.5, "segment": 24},
        exact={
            "width": 24,
            "heads": 3,
            "span": 24,
            "ramp": 12,
            "start": 0.5,
            "segment": 24,
            "memory": 0,
        },
    )
)
class ExpireSpan(Segmented):
    """a'_ti = m_ti a_ti / (Σ_j m_tj a_tj + 1e−8) over the i ≤ t with m_ti > 0 (Eq. 6)

        e_i = L σ(w·h_i / div + b)      m_ti = clamp(1 + r_ti / R, 0, 1)      r_ti = e_i − (t − i)

    a is a softmax, with learned key vectors for the last `positions` distances. After a segment of
    M tokens, what no later query can see is dropped, as many in every row, in multiples of M. In
    training the loss α / (R M) Σ r_ti over the ramp is reported (Eq. 7). The state is the layer's
    inputs that are alive and the open segment; nothing of earlier segments has a gradient, so w
    learns from the segment that holds the token.

    Args:
        span: L. ramp: R. penalty: α. start: p, of L, where spans start.
        segment: M. positions: by default M.
        memory: tokens before a segment that it can see at most; by default any span's reach.
        noise: in training, no span exceeds u L, one u ~ U(0, 1) for all layers of a pass.
        itself: False, as in the released code, hides each token from its own query.
        evict: False only masks; the result is the same.
        around: a softmax attention's layer, whose projections to use; its positions are not.

    Raises:
        LongspanError: sizes or a start out of range, a layer with grouped heads.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        head_width: int | None = None,
        span: int = 1024,
        ramp: int = 128,
        penalty: float = 1e-6,
        start: float = 0.1,
        div: float = 1.0,
        segment: int = 512,
        positions: int | None = None,
        memory: int | None = None,
        noise: bool = False,
        itself: bool = True,
        evict: bool = True,
        around: MultiHead | None = None,
    ) -> None:
        super().__init__(segment=segment)
        positions = segment if positions is None else positions
        memory = span + ramp if memory is None else memory
        if min(span, ramp) < 1 or min(positions, memory) < 0 or not 0 < start < 1 or div <= 0:
            raise LongspanError(
                f"expire-span got span={span}, ramp={ramp}, positions={positions}, "
                f"memory={memory}, start={start}, div={div}: the first two must be at least 1, the "
                "next two at least 0, start between 0 and 1, div above 0."
            )
        self.mixer = around or MultiHead(
            build("multi-head-attention", causal=True),
            width=width,
            heads=heads,
            head_width=head_width,
            biases=False,
        )
        if self.mixer.kv_heads != self.mixer.heads:
            raise LongspanError(
                "expire-span needs as many heads of keys as of queries: give a layer without "
                f"kv_heads, not {self.mixer.kv_heads} for {self.mixer.heads}."
            )
        self.span, self.ramp, self.penalty, self.div = span, ramp, penalty, div
        self.memory, self.noise, self.itself, self.evict = memory, noise, itself, evict
        self.predict = nn.Linear(width, 1)
        nn.init.zeros_(self.predict.weight)
        nn.init.constant_(self.predict.bias, -math.log(1 / start - 1))
        self.places = nn.Parameter(torch.randn(positions, self.mixer.head_width) * 0.02)
        self.passes, self.limit = 0, 1.0
        self.register_forward_pre_hook(_draw)

    def spans(self, x: Inputs) -> Float[Tensor, "B L"]:
        """e of a layer's inputs, before noise."""
        return self._spans(self.norm(x))

    @torch.no_grad()
    def statistics(self, state: Open) -> Spans:
        """Of the memory that a state carries."""
        memory: Memory = state.memory
        alive = self.spans(memory.items)[memory.keep]
        if not len(alive):
            return Spans(0.0, 0.0, memory.keep.shape[1])
        return Spans(float(alive.mean()), float(alive.max()), memory.keep.shape[1])

    def _spans(self, x: Tensor) -> Tensor:
        return self.span * self.predict(x / self.div)[..., 0].sigmoid()

    def fresh(self, x: Inputs) -> Memory:
        none = x.new_zeros(x.shape[0], 0, dtype=torch.long)
        return Memory(x.new_zeros(x.shape[0], 0, x.shape[2]), none, none.bool())

    def read(
        self, memory: Memory, x: Tensor, seen: Tensor, asks: Tensor
    ) -> tuple[Tensor, Memory, Losses]:
        length = x.shape[1]
        whole = self.norm(torch.cat([memory.items.to(x.dtype), x], 1))
        keep = torch.cat([memory.keep, seen], 1)
        here = torch.arange(length, device=x.device)
        queries = here[length - asks.shape[1] :]
        age = torch.cat([memory.age, -here.expand(len(x), -1)], 1)
        far = queries[:, None] + age[:, None]  # B Q S
        spans = self._spans(whole)
        if self.training and self.noise:
            spans = spans.clamp(max=self.limit * self.span)
        left = spans[:, None] - far
        m = (1 + left / self.ramp).clamp(0, 1)
        causal = (far >= (0 if self.itself else 1)) & keep[:, None]
        y = self._attend(whole, far, torch.where(causal, m, 0), len(queries))
        losses = {}
        if self.training and self.penalty:
            inside = causal & (m > 0) & (m < 1) & asks[..., None]
            value = (left * inside).sum() / len(x)
            losses["span"] = self.penalty / (self.ramp * self.segment) * value
        return y, memory, losses

    def _attend(self, whole: Tensor, far: Tensor, m: Tensor, queries: int) -> Tensor:
        q, k, v = (
            rearrange(self.mixer.project[n](whole), "B L (H D) -> B H L D", H=self.mixer.heads)
            for n in ("q", "k", "v")
        )
        q = q[:, :, q.shape[2] - queries :]
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            q, k, m = q.to(wide) * q.shape[-1] ** -0.5, k.to(wide), m.to(wide)[:, None]
            scores = q @ k.mT
            if count := len(self.places):
                at = far.clamp(0, count - 1)[:, None].expand_as(scores)
                placed = (q @ self.places.to(wide).mT).gather(3, at)
                scores = scores + placed.masked_fill(far[:, None] >= count, 0)
            dead = ~(m > 0).any(-1, keepdim=True)
            scores = scores.masked_fill(m <= 0, -math.inf).masked_fill(dead, 0)
            weights = scores.softmax(-1) * m
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-8)
            o = (weights @ v.to(wide)).to(v.dtype)
        return self.mixer.output(rearrange(o, "B H L V -> B L (H V)"))

    @torch.no_grad()
    def write(self, memory: Memory, x: Tensor, rows: Tensor) -> tuple[Memory, Losses]:
        size = self.segment
        items = torch.cat([memory.items, x.detach()], 1)
        age = torch.cat([memory.age, -torch.arange(size, device=x.device).expand(len(x), -1)], 1)
        age = age + size
        left = self.spans(items) - age + self.ramp
        reach = (left > 0) & (age <= self.memory)
        keep = torch.cat([memory.keep, torch.ones_like(x[..., 0]) > 0], 1) & reach
        if not self.evict:
            return Memory(items, age, keep), {}
        gone = int((~keep).sum(1)[rows].min()) // size * size
        order = left.masked_fill(~keep, -math.inf).argsort(dim=1, stable=True)[:, gone:]
        order = order.sort(dim=1).values
        kept = items.gather(1, order[..., None].expand(-1, -1, items.shape[2]))
        return Memory(kept, age.gather(1, order), keep.gather(1, order)), {}


def _draw(module: nn.Module, _: object) -> None:
    """u of this pass: layers have made as many passes, so all draw the same."""
    assert isinstance(module, ExpireSpan)
    recomputing = torch._C._current_graph_task_id() != -1  # keeps the u of the pass it repeats
    if module.training and module.noise and not recomputing:
        module.passes += 1
        generator = torch.Generator().manual_seed(torch.initial_seed() + module.passes)
        module.limit = float(torch.rand((), generator=generator))
