"""SLiM Performer (Likhosherstov et al., 2020): exact gradients in the memory of one chunk."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn import Mixer, tensors
from longspan.nn.state import map_tensors
from longspan.registry import mechanism
from longspan.shapes import Keep, Tokens


@mechanism(
    Card(
        id="slim-performer",
        name="SLiM Performer",
        kind="training",
        family="kernel",
        paper="Sub-Linear Memory: How to Make Performers SLiM",
        cite="Likhosherstov et al., 2020",
        link="https://arxiv.org/abs/2012.11346",
        what="Trains a linear-attention model chunk by chunk: sums that were added are subtracted "
        "again on the way back, so nothing is stored.",
        modes={"causal"},
        time="L*D*M",
        memory="C*D + D*M",
    )
)
class SlimPerformer:
    """loss_with_grad: the mean next-token loss, `.grad` as by full backpropagation (Sec. 3).

    Forward, chunks run left to right and only the layers' states S^(n) are kept. Backward, from the
    last chunk on: each layer's S^(n−1) = S^(n) − (what the chunk adds to nothing), a leaf; the
    chunk runs again, ⟨S^(n), dS^(n)⟩ is added to its loss, and the leaf's gradient is dS^(n−1).
    So the states must be sums: of `linear-transformer`, `performer`, … without decay.

    The model is a causal language model of longspan, whatever its norms and position-wise parts.
    Dropout is drawn from `seed` and replayed; random features must not be redrawn meanwhile.

    Args:
        chunk: C tokens.

    Raises:
        LongspanError: a chunk below 1; nothing to predict; a state that is not a sum.
    """

    def __init__(self, *, chunk: int = 512, seed: int = 0) -> None:
        if chunk < 1:
            raise LongspanError(f"slim-performer got chunk={chunk}: expected at least 1 token.")
        self.chunk, self.seed = chunk, seed

    def __call__(self, model: nn.Module, tokens: Tokens, *, keep: Keep | None = None) -> Tensor:
        """Add the gradients of the mean loss over all real next tokens to `.grad`; returns it."""
        targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
        if keep is not None:
            targets = targets.masked_fill(~(keep & F.pad(keep[:, 1:], (0, 1))), -100)
        count = (targets != -100).sum()
        if not count:
            raise LongspanError("slim-performer got no token to predict: give two a row or more.")
        mask = torch.ones_like(tokens) if keep is None else keep.long()
        spans = [
            slice(s, min(s + self.chunk, tokens.shape[1]))
            for s in range(0, tokens.shape[1], self.chunk)
        ]

        def run(n: int, cache: Any) -> tuple[Tensor, Any]:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed + n)
                output = model(
                    tokens[:, spans[n]],
                    attention_mask=mask[:, spans[n]],
                    past_key_values=cache,
                    use_cache=True,
                )
            logits = output.logits.flatten(0, 1)
            wide = torch.promote_types(logits.dtype, torch.float32)
            loss = F.cross_entropy(logits.to(wide), targets[:, spans[n]].flatten(), reduction="sum")
            return loss / count, output.past_key_values

        losses, cache = [], None
        with torch.no_grad():
            for n in range(len(spans)):
                loss, cache = run(n, cache)
                losses.append(loss)
        later: list[Tensor] = []
        for n in range(len(spans) - 1, -1, -1):
            assert cache is not None
            real = mask[:, spans[n]].sum(1)
            seen = cache.seen - real
            cache.seen, cache.length = seen, spans[n].start
            with _undoing(model, first=n == 0) as before:
                loss, cache = run(n, cache)
            after = _floats(cache.states)
            if later:
                loss = loss + sum((s * d).sum() for s, d in zip(after, later, strict=True))
            loss.backward()
            leaves = [t for state in before for t in _floats(state)]
            later = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
            cache.seen = seen
            cache.states = tuple(map_tensors(Tensor.detach, state) for state in before)
        return torch.stack(losses).sum()


@contextmanager
def _undoing(model: nn.Module, *, first: bool) -> Iterator[list[Any]]:
    """Every mixer starts from its state less what the chunk adds; yields those, leaves."""
    before: list[Any] = []

    def start(mixer: Mixer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, state, keep = args[0], args[1], kwargs.get("keep")
        new = x.shape[1] if keep is None else keep.sum(1)
        with torch.no_grad(), torch.random.fork_rng():
            # Whole numbers count tokens (where rotations go on from); all else is a sum.
            empty = map_tensors(
                lambda t: torch.zeros_like(t) if t.is_floating_point() else t - new, state
            )
            added = mixer.forward(x, empty, **kwargs)[1]
            sums = iter(tensors(added))
            old = map_tensors(
                lambda t: t - (s if (s := next(sums)).is_floating_point() else new), state
            )
        if first:
            _refuse_leftovers(old, added)
            old = map_tensors(torch.zeros_like, old)
        leaf = map_tensors(lambda t: t.requires_grad_() if t.is_floating_point() else t, old)
        before.append(leaf)
        return (x, leaf), kwargs

    mixers = [m for m in model.modules() if isinstance(m, Mixer)]
    hooks = [m.register_forward_pre_hook(start, with_kwargs=True) for m in mixers]
    try:
        yield before
    finally:
        for hook in hooks:
            hook.remove()


def _floats(state: Any) -> list[Tensor]:
    return [t for t in tensors(state) if t.is_floating_point()]


def _refuse_leftovers(left: Any, added: Any) -> None:
    """Once all chunks are undone, sums are 0 up to rounding; anything else was no sum."""
    for t, whole in zip(_floats(left), _floats(added), strict=True):
        if t.numel() and t.abs().max() > 1e-2 * whole.abs().max().clamp(min=1):
            raise LongspanError(
                "slim-performer undoes running sums, and a layer's state is none (what its chunks "
                "added does not add up): use linear attention without decay, or a larger chunk if "
                "rounding is the reason."
            )
