"""What a swap did to a language model: its quality and its cost, before and after."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from longspan import registry
from longspan.convert.swap import original
from longspan.errors import LongspanError
from longspan.hub.swapped import cache_bytes
from longspan.shapes import Tokens

# Tokens that ask for a needle, and as many that answer.
HALF = 8
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Positions whose probabilities are held at a time: a vocabulary is wide.
SPAN = 256


@dataclass(frozen=True)
class Pair:
    """One figure of the original and of the swapped model; None where there is none."""

    before: float | None
    after: float | None


@dataclass(frozen=True)
class At:
    """The figures that depend on the length of what was read."""

    length: int
    recall: Pair
    state_bytes: Pair
    prefill: Pair
    decode: Pair


@dataclass(frozen=True)
class Health:
    """What a swap did.

    Attributes:
        layers: the mechanism of each swapped layer. tokens: how many were predicted.
        loss: nats a token.
        divergence: mean Kullback–Leibler divergence of the swapped model's predictions from the
            original's, nats a token.
        agreement: share of positions at which both predict the same token first.
        at: for each length, the share of a needle's tokens recalled, bytes of the cache, and
            tokens a second read (prefill) and written (decode).
    """

    layers: dict[str, dict[str, Any]]
    tokens: int
    loss: Pair
    divergence: float
    agreement: float
    at: list[At]

    def as_dict(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("")
        for name in ("before", "after"):
            table.add_column(name, justify="right")

        def row(name: str, pair: Pair, form: Callable[[float], str]) -> None:
            table.add_row(name, *("–" if n is None else form(n) for n in (pair.before, pair.after)))

        row("loss, nats a token", self.loss, "{:.4f}".format)
        row("divergence, nats a token", Pair(None, self.divergence), "{:.4f}".format)
        row("same first choice", Pair(None, self.agreement), "{:.1%}".format)
        for name, form in (
            ("recall", "{:.1%}".format),
            ("state_bytes", lambda n: f"{n / 2**20:,.2f} MiB"),
            ("prefill", "{:,.0f} tokens/s".format),
            ("decode", "{:,.1f} tokens/s".format),
        ):
            for at in self.at:
                row(f"{name.replace('_bytes', '')} at {at.length:,}", getattr(at, name), form)
        return table


def health(
    model: PreTrainedModel,
    tokens: Tokens,
    *,
    lengths: Sequence[int] = (128, 512),
    steps: int = 16,
    seed: int = 0,
) -> Health:
    """Measure a swapped language model beside what it was before, on held-out text.

    A needle is 16 random tokens of the text's own, hidden at each of five depths; at the end its
    first 8 are given again, and the share of the other 8 that come first, each after the right ones
    before it, is the recall.

    Args:
        tokens: B L, windows of text; end to end they make the haystacks, too.
        lengths: at which needles are sought and the cost is measured.
        steps: decoded tokens a time is the median of.

    Raises:
        LongspanError: no language model, nothing swapped, a length that is too short for a needle
            or longer than the text or the model.

    >>> rich.print(health(swap(model, "performer"), windows, lengths=(512, 2048)))
    """
    config: Any = model.config
    if not model.can_generate():
        raise LongspanError(
            f"health reads causal language models and got a {type(model).__name__}: give the "
            "model with its language-model head."
        )
    if not 1 <= steps <= 4 * HALF:
        raise LongspanError(f"steps={steps}: give 1 to {4 * HALF} tokens to decode.")
    stream = tokens.flatten()
    most = min(stream.numel(), config.max_position_embeddings)
    if wrong := [n for n in lengths if not 4 * HALF < n <= most]:
        raise LongspanError(
            f"cannot measure at {', '.join(map(str, wrong))} tokens: give lengths above {4 * HALF} "
            f"and up to {most} (of the text {stream.numel()}, of the model "
            f"{config.max_position_embeddings})."
        )
    trained = model.training
    model.eval()
    try:
        with torch.no_grad():
            loss, divergence, agreement = _agreement(model, tokens)
            at = [_at(model, stream, length, steps, seed) for length in lengths]
    finally:
        model.train(trained)
    return Health(config.longspan, tokens[:, 1:].numel(), loss, divergence, agreement, at)


def _agreement(model: PreTrainedModel, tokens: Tensor) -> tuple[Pair, float, float]:
    sums = torch.zeros(4, dtype=torch.float64)
    for row in tokens.split(1):
        with original(model):
            first = model(row, use_cache=False).logits[0, :-1]
        second = model(row, use_cache=False).logits[0, :-1]
        parts = (first, second, row[0, 1:])
        for was, now, answer in zip(*(t.split(SPAN) for t in parts), strict=True):
            was, now = (F.log_softmax(t.double(), dim=-1) for t in (was, now))
            sums += torch.stack(
                [
                    F.nll_loss(was, answer, reduction="sum"),
                    F.nll_loss(now, answer, reduction="sum"),
                    F.kl_div(now, was, log_target=True, reduction="sum"),
                    (was.argmax(-1) == now.argmax(-1)).sum(),
                ]
            ).cpu()
    before, after, divergence, agreement = (sums / tokens[:, 1:].numel()).tolist()
    return Pair(before, after), divergence, agreement


def _at(model: PreTrainedModel, stream: Tensor, length: int, steps: int, seed: int) -> At:
    record: dict[str, dict[str, Any]] = model.config.longspan
    continues = all("step" in registry.show(spec["id"]).modes for spec in record.values())
    rows = needles(stream, length, seed=seed)

    def figures(inside: AbstractContextManager[None], continues: bool) -> tuple[float | None, ...]:
        with inside:
            recall = _recall(model, rows)
            return recall, *_cost(model, stream[None, :length], steps if continues else 0)

    before, after = figures(original(model), True), figures(nullcontext(), continues)
    return At(length, *(Pair(*pair) for pair in zip(before, after, strict=True)))


def needles(stream: Tensor, length: int, *, seed: int = 0) -> Tensor:
    """A haystack of so many tokens for each depth, in which a needle is hidden and then repeated.

    Its last 8 tokens are to be recalled after the 8 before them.
    """
    generator = torch.Generator().manual_seed(seed)
    known, rows = stream.unique(), []
    for depth in DEPTHS:
        drawn = torch.randint(len(known), (2 * HALF,), generator=generator)
        needle = known[drawn.to(known.device)]
        hay = stream[: length - 4 * HALF]
        place = round(depth * len(hay))
        rows.append(torch.cat([hay[:place], needle, hay[place:], needle]))
    return torch.stack(rows)


def _recall(model: Any, rows: Tensor) -> float:
    right = [
        model(row, use_cache=False, logits_to_keep=HALF + 1).logits[:, :-1].argmax(-1)
        == row[:, -HALF:]
        for row in rows.split(1)
    ]
    return float(torch.cat(right).double().mean())


def _cost(
    model: PreTrainedModel, row: Tensor, steps: int
) -> tuple[float | None, float, float | None]:
    """(bytes of the cache, tokens a second of prefill, of decoding); None without steps."""

    def timed(tokens: Tensor, cache: Any) -> tuple[float, Any]:
        start = time.perf_counter()
        made = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        made.logits.argmax().item()  # waits for a GPU, too
        return time.perf_counter() - start, made.past_key_values

    prompt, rest = row.split([row.shape[1] - steps, steps], dim=1)
    seconds, cache = timed(prompt, None)
    prefill = prompt.shape[1] / seconds
    if not steps:
        return None, prefill, None
    times = [timed(token, cache)[0] for token in rest.split(1, dim=1)]
    return float(cache_bytes(cache)), prefill, 1 / statistics.median(times)
