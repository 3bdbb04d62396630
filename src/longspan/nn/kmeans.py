"""Online spherical k-means: centroids of each head that follow the tokens they are nearest to."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from longspan.engines import dense, pattern
from longspan.errors import LongspanError
from longspan.nn.protocols import Attention
from longspan.shapes import Keep, Keys, Outputs, Queries, Values

Tokens = Float[Tensor, "B H L D"]


def on_sphere(x: Tokens) -> Tokens:
    """x layer-normalised without gain or bias: length √D, in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.layer_norm(wide, x.shape[-1:])


class Centroids(nn.Module):
    """μ_c ← λ μ_c + (1 − λ) · (what the tokens nearest to c say), in training calls only.

    The newest centroids are a buffer of at least float32, which casts of the module leave so: at
    λ = 0.999 an average in bfloat16 would stand still. A forward pass recomputed under activation
    checkpointing finds the centroids of the first pass and does not move them. Over
    `torch.distributed` the sums are those of all processes.

    Args:
        count: centroids a head. decay: λ. seed: of the directions they start from.
        sums: move by the plain sum of the nearest tokens (the paper's equation), under which large
            clusters grow; by default by their mean, brought back to the sphere.

    Before the first training call the centroids are random; it takes them from its own tokens.
    """

    centroids: Tensor
    used: Tensor
    fitted: Tensor

    def __init__(
        self,
        heads: int,
        count: int,
        width: int,
        *,
        decay: float = 0.999,
        sums: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if count < 1 or not 0 <= decay <= 1:
            raise LongspanError(
                f"centroids got count={count} and decay={decay}: expected at least 1 and a share."
            )
        self.decay, self.sums, self.seed = decay, sums, seed
        start = torch.randn(
            heads, count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
        )
        start = F.layer_norm(start, (width,))
        self.register_buffer("centroids", start)
        self.register_buffer("used", start.clone(), persistent=False)
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Centroids":
        exact = self.centroids, self.used
        super()._apply(fn, recurse)
        if self.centroids.dtype.itemsize < 4:
            device = self.centroids.device
            self.centroids, self.used = (t.to(device) for t in exact)
        return self

    @torch.no_grad()
    def forward(
        self,
        sides: Sequence[Float[Tensor, "B H _ D"]],
        keep: Sequence[Bool[Tensor, "B _"] | None],
    ) -> Float[Tensor, "H C D"]:
        """The centroids to route by; a training call then moves them towards the given tokens.

        Args:
            sides: tokens on the sphere, the queries and, where they are others, the keys.
            keep: for each side, the tokens that count.
        """
        if not self.training:
            return self.centroids
        # Inside a backward pass this is a recomputation of an earlier call.
        if torch._C._current_graph_task_id() != -1:  # pyright: ignore[reportAttributeAccessIssue]
            return self.used
        if not self.fitted and self._start(sides[0], keep[0]):
            self.fitted.fill_(True)
        self.used.copy_(self.centroids)
        if self.fitted:
            self._move(sides, keep)
        return self.used

    def _start(self, x: Tokens, keep: Tensor | None) -> bool:
        """Take the centroids from tokens of the first call, drawn without replacement."""
        rows = x.transpose(0, 1).flatten(1, 2)  # H (B L) D
        rows = rows if keep is None else rows[:, keep.flatten()]
        if not rows.shape[1]:
            return False
        generator = torch.Generator().manual_seed(self.seed)
        heads, count, _ = self.centroids.shape
        for h in range(heads):
            drawn = torch.randperm(rows.shape[1], generator=generator)[:count].to(rows.device)
            self.centroids[h, : len(drawn)] = rows[h, drawn].to(self.centroids.dtype)
        if _shared():
            torch.distributed.broadcast(self.centroids, 0)
        return True

    def _move(self, sides: Sequence[Tensor], keep: Sequence[Tensor | None]) -> None:
        aims = []
        for x, kept in zip(sides, keep, strict=True):
            total, count = self._statistics(x, nearest(x, self.centroids), kept)
            if _shared():
                torch.distributed.all_reduce(total)
                torch.distributed.all_reduce(count)
            if self.sums:
                aims.append(total)
            else:
                mean = total / count.clamp(min=1)[..., None]
                aims.append(torch.where(count[..., None] > 0, mean, self.centroids))
        aim = torch.stack(aims).mean(0)
        moved = torch.lerp(aim, self.centroids, self.decay)
        self.centroids.copy_(moved if self.sums else F.layer_norm(moved, moved.shape[-1:]))

    def _statistics(self, x: Tokens, codes: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sums (H C D) and counts (H C) of the tokens nearest to each centroid."""
        heads, count, width = self.centroids.shape
        weight = torch.ones_like(codes, dtype=self.centroids.dtype)
        if keep is not None:
            weight = weight * keep[:, None]
        base = torch.arange(heads, device=x.device)[:, None] * count
        at = (codes + base).flatten()
        total = self.centroids.new_zeros(heads * count, width + 1)
        rows = torch.cat([x.to(weight.dtype) * weight[..., None], weight[..., None]], -1)
        total.index_add_(0, at, rows.flatten(0, 2))
        total = total.view(heads, count, -1)
        return total[..., :-1], total[..., -1]


@torch.no_grad()
def nearest(x: Tokens, centroids: Float[Tensor, "H C D"]) -> Int[Tensor, "B H L"]:
    """The centroid of largest inner product for each token, a few tokens at a time."""
    dtype = torch.promote_types(x.dtype, centroids.dtype)
    codes = torch.zeros(x.shape[:3], dtype=torch.long, device=x.device)
    centroids = centroids.to(dtype)
    size = max(1, x.shape[0] * centroids[..., 0].numel() * dtype.itemsize)
    step = max(1, pattern.WORKSPACE // size)
    for start in range(0, x.shape[2], step):
        piece = slice(start, start + step)
        with torch.autocast(x.device.type, enabled=False):
            codes[:, :, piece] = (x[:, :, piece].to(dtype) @ centroids.mT).argmax(-1)
    return codes


def commitment(
    x: Tokens, centroids: Float[Tensor, "H C D"], keep: Bool[Tensor, "B L"] | None = None
) -> Float[Tensor, ""]:
    """The mean of ‖x − μ_argmax‖² over the kept tokens and their elements, with gradient to x."""
    aim = chosen(x, centroids)
    error = (x - aim).square()
    if keep is None:
        return error.mean()
    kept = keep[:, None, :, None].expand_as(error)
    return error[kept].sum() / kept.sum().clamp(min=1)


def chosen(x: Tokens, centroids: Float[Tensor, "H C D"]) -> Tokens:
    """Each token's nearest centroid."""
    codes = nearest(x, centroids)
    heads, count, width = centroids.shape
    base = torch.arange(heads, device=x.device)[:, None] * count
    found = centroids.reshape(-1, width).index_select(0, (codes + base).flatten())
    return found.view(x.shape).to(x.dtype)


class _Commit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, aim: Tensor, beta: float) -> Tensor:
        ctx.save_for_backward(x, aim)
        ctx.beta = beta
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, aim = ctx.saved_tensors
        return grads[0] + (2 * ctx.beta / max(1, x.numel())) * (x - aim), None, None


def commit(x: Tokens, centroids: Float[Tensor, "H C D"], beta: float) -> Tokens:
    """x as it is; the backward pass adds the gradient of β · `commitment`.

    So the loss acts in any model without being carried to the model's own.
    """
    return _Commit.apply(x, chosen(x, centroids), beta)  # pyright: ignore[reportReturnType]


class Routed(NamedTuple):
    """Every key and value seen, which of them may be seen, and their cluster in routed heads."""

    k: Float[Tensor, "B H S D"]
    v: Float[Tensor, "B H S V"]
    keep: Bool[Tensor, "B S"]
    codes: Int[Tensor, "B R 1 S"]

    @classmethod
    def grow(
        cls, table: "Routed | None", k: Keys, v: Values, keep: Keep, codes: Tensor
    ) -> "Routed":
        """The table with tokens more; masked ones are zeros."""
        hidden = ~keep[:, None, :, None]
        grown = cls(k.masked_fill(hidden, 0), v.masked_fill(hidden, 0), keep, codes[:, :, None])
        if table is None:
            return grown
        pairs = zip(table, grown, (2, 2, 1, 3), strict=True)
        return cls(*(torch.cat([old, new], axis) for old, new, axis in pairs))


def near(q: Queries, k: Keys, v: Values, keep: Keep | None, *, reach: int, causal: bool) -> Outputs:
    """Attention to the `reach` tokens before and, not causally, behind; aligned at the end."""
    window = pattern.Window(reach, 0 if causal else reach)
    if q.shape[2] == 1:
        seen = window.mask(1, k.shape[2]).to(q.device)
        seen = seen if keep is None else seen & keep[:, None, None]
        return dense.explicit(q, k, v, seen=seen)[0]
    return dense.union(q, [(pattern.Banded([window], keep), k, v)])[0]


class RoutedAttention(Attention):
    """Attention whose first heads are `local` and whose others are routed by centroids.

    In a routed head q and k are layer-normalised without gain and bias; causally its keys are its
    queries. The state is every key and value, and the keys' centroids. Where there are as many
    queries as keys, the mask is taken to be of both.

    Args:
        causal: by default where it has that form alone.
        clusters: centroids of each routed head. window: tokens a cluster, at least 1.
        local: how many heads, the first, are local; by default half. reach: of theirs.
        decay, sums, seed: of the `Centroids`. commitment: β of `commit`.

    Raises:
        LongspanError: sizes below 1; local heads that are not among the heads.

    Attributes:
        name: what errors call it. usual: `window` where none is given; None for as many tokens as
            make the clusters hold all.
    """

    name: ClassVar[str]
    usual: ClassVar[int | None] = None

    def __init__(
        self,
        *,
        heads: int,
        head_width: int,
        causal: bool | None = None,
        clusters: int = 64,
        window: int | None = None,
        local: int | None = None,
        reach: int = 128,
        decay: float = 0.999,
        sums: bool = False,
        commitment: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(causal=causal)
        local = heads // 2 if local is None else local
        window = self.usual if window is None else window
        if heads < 1 or not 0 <= local <= heads or reach < 0 or (window is not None and window < 1):
            raise LongspanError(
                f"{self.name} got heads={heads}, local={local}, window={window}, reach={reach}: "
                "expected 0 ≤ local ≤ heads, a window of at least 1 and a reach of at least 0."
            )
        self.local, self.window, self.reach, self.beta = local, window, reach, commitment
        self.means = Centroids(
            heads - local, clusters, head_width, decay=decay, sums=sums, seed=seed
        )
        self.heads, self.width = heads, head_width

    def across(
        self, x: Tokens, y: Tokens, v: Values, means: Tensor, own: Keep | None, keep: Keep | None
    ) -> Tensor:
        """The routed heads of queries x that `own` marks, and keys y; of a bidirectional form."""
        raise NotImplementedError(f"{type(self).__name__} is causal only.")

    @abstractmethod
    def along(self, x: Tokens, table: Routed, means: Float[Tensor, "H C D"]) -> Tensor:
        """The routed heads, causally, of the newest tokens x, which are the last of the table."""

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: Routed | None = None,
        *,
        keep: Keep | None = None,
    ) -> tuple[Outputs, Routed | None]:
        self._check(q, k)
        own = keep if q.shape[2] == k.shape[2] else None  # of the queries
        if keep is not None:
            k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
        if own is not None:
            q = q.masked_fill(~own[:, None, :, None], 0)
        near = self.local
        x = on_sphere(q[:, near:])
        if not self.causal:
            y = on_sphere(k[:, near:])
            means = self.means([x, y], [own, keep])
            x, y = self._committed(x, means), self._committed(y, means)
            routed = self.across(x, y, v[:, near:], means, own, keep)
            return torch.cat([self._nearby(q, k, v, keep), routed], 1), None
        means = self.means([x], [own])
        x = self._committed(x, means)
        seen = q.new_ones(q.shape[0], q.shape[2], dtype=torch.bool) if keep is None else keep
        keys = torch.cat([k[:, :near], x.to(q.dtype)], 1)
        table = Routed.grow(state, keys, v, seen, nearest(x, means))
        local = self._nearby(q, table.k, table.v, table.keep)
        return torch.cat([local, self.along(x, table, means)], 1), table

    def share(self, x: Tokens, keep: Keep | None) -> Int[Tensor, "B"]:
        """Tokens of a cluster of each row: `window`, or its kept tokens over the clusters."""
        count = x.new_full(x.shape[:1], x.shape[2], dtype=torch.long)
        count = count if keep is None else keep.sum(1)
        if self.window is not None:
            return count.clamp(max=self.window)
        return -(-count // self.means.centroids.shape[1])

    def _check(self, q: Queries, k: Keys) -> None:
        """Refuse inputs of other heads or width than the centroids, and causal earlier keys."""
        if (q.shape[1], q.shape[3]) != (self.heads, self.width):
            raise LongspanError(
                f"{self.name} was built for {self.heads} heads of width {self.width} and got "
                f"{q.shape[1]} of {q.shape[3]}: build it with heads={q.shape[1]}, "
                f"head_width={q.shape[3]}."
            )
        if self.causal and q.shape[2] != k.shape[2]:
            raise LongspanError(
                f"{self.name} routes its queries as keys and got {q.shape[2]} for "
                f"{k.shape[2]} keys: carry earlier tokens in the state."
            )

    def _nearby(self, q: Queries, k: Keys, v: Values, keep: Keep | None) -> Tensor:
        """The local heads' outputs, of the first heads of q, k and v."""
        q, k, v = (t[:, : self.local] for t in (q, k, v))
        return near(q, k, v, keep, reach=self.reach, causal=self.causal)

    def _committed(self, x: Tokens, centroids: Float[Tensor, "H C D"]) -> Tokens:
        """x; in training with the gradient of the commitment, where it has a weight."""
        return commit(x, centroids, self.beta) if self.training and self.beta else x


def _shared() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
