"""What is measured of one row, in the row's own process."""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.bench.decoder import InSegments, decoder, parameters, training_flops
from longspan.bench.match import match
from longspan.bench.memory import peak_bytes, resident_bytes
from longspan.bench.pictures import picture
from longspan.bench.settings import BASELINE, Budget, Settings, Spec
from longspan.bench.speed import paired
from longspan.bench.train import Progress, train
from longspan.data import corpus, random_windows, recall, recall_accuracy
from longspan.errors import LongspanError
from longspan.nn import state_bytes

HELD_OUT, CURVE = 2**15, 2**12  # tokens of validation data, at the end and on the way
RECALL = {"length": 32, "pairs": 4, "vocabulary": 16}
RECALL_BATCH = 64
PICTURED = 64
Tell = Callable[[str, float], None]


def row(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """The figures of one row: the part of its record that only its own process can know.

    Raises:
        LongspanError: the model cannot be built or matched, or its loss is not finite.
    """
    known = {field.name for field in fields(Settings)}
    given = {n: v for n, v in job["settings"].items() if n in known}
    settings = Settings(**{**given, "data": job["corpus"]})
    spec, seed = Spec(job["id"], job["arguments"]), job["seed"]
    before = resident_bytes()
    tell("matching", 0.0)
    torch.manual_seed(seed)
    sized = match(spec, settings)
    spec = Spec(spec.id, sized.arguments)
    torch.manual_seed(seed)
    lm = decoder(spec, settings, inner=sized.inner).to(settings.device)
    quality, tokens_per_second = _language(lm, settings, seed, tell)
    peak = peak_bytes()
    tell("recall", 0.0)
    quality["recall"] = _recall(spec, settings, seed, tell)
    speed, state, crossover = _speed(lm, spec, settings, tell)
    valid = corpus(settings.data).valid
    window = torch.from_numpy(valid[: min(PICTURED, settings.length)].astype("int64"))[None]
    pictured = picture(lm.model if isinstance(lm, InSegments) else lm, window.to(settings.device))
    verdicts = []
    if settings.certificate:
        tell("certificate", 0.0)
        from longspan.testing import certificate

        verdicts = [asdict(verdict) for verdict in certificate(spec.id)]
    return {
        "reason": sized.unmatched,
        "parameters": parameters(lm),
        "flops_per_token": training_flops(lm, settings.length),
        "quality": quality,
        "speed": {"train_tokens_per_second": tokens_per_second, **speed},
        "memory": {"peak_bytes": peak, "increase_bytes": peak - before, "state": state},
        "crossover": crossover,
        "attention": {
            "weights": [[round(w, 5) for w in line] for line in pictured.weights.tolist()],
            "how": pictured.how,
        },
        "certificate": verdicts,
        "matched": {"inner": sized.inner, "arguments": sized.arguments},
    }


def _language(
    lm: nn.Module, settings: Settings, seed: int, tell: Tell
) -> tuple[dict[str, Any], float]:
    """Train on the corpus, then the held-out figures, and the training tokens a second."""
    data, length, batch = corpus(settings.data), settings.length, settings.batch
    assert batch is not None
    # The order of the data depends on the seed alone, so that all rows read the same.
    order, fixed = (torch.Generator().manual_seed(s) for s in (seed, 0))
    held_out = random_windows(
        data.valid, batch=max(4, HELD_OUT // length), length=length, generator=fixed
    )
    few = held_out[: max(1, CURVE // length)]
    rows = max(batch, CURVE // length)  # at once, when nothing is kept for a backward pass

    def draw() -> dict[str, Tensor]:
        tokens = random_windows(data.train, batch=batch, length=length, generator=order)
        return {"input_ids": tokens, "labels": tokens}

    progress = Progress(
        Budget.parse(settings.budget),
        batch * length,
        evaluate=lambda m: float(bits(m, few, rows).mean()),
        tell=lambda done: tell("training", done),
    )
    train(lm, draw, progress, rate=settings.rate, seed=seed, device=settings.device)
    tell("held-out", 0.0)
    found = bits(lm, held_out, rows).mean(0)
    if not found.isfinite().all():
        raise LongspanError(
            f"the held-out bits per byte are not finite after {len(progress.seconds)} steps: "
            f"training diverged at the learning rate {settings.rate}."
        )
    # The first steps allocate and warm caches; of a few steps, only the first is left out.
    steady = progress.seconds[min(3, len(progress.seconds) // 2) :]
    quality = {
        "bits_per_byte": float(found.mean()),
        "by_position": by_position(found),
        "steps": len(progress.seconds),
        "tokens": progress.tokens,
        "curve": progress.curve,
    }
    return quality, batch * length / statistics.median(steady)


def bits(lm: nn.Module, windows: Tensor, rows: int) -> Tensor:
    """Bits of each byte of each window but its first, given those before it: B × (L − 1).

    Args:
        rows: windows read at once.
    """
    lm.eval()
    device = next(lm.parameters()).device
    with torch.no_grad():
        found = [
            F.cross_entropy(
                lm(input_ids=part, use_cache=False).logits[:, :-1].float().mT,
                part[:, 1:],
                reduction="none",
            )
            for part in windows.to(device).split(rows)
        ]
    return torch.cat(found).double().cpu() / math.log(2)


def by_position(found: Tensor) -> list[dict[str, Any]]:
    """The mean over spans of positions, 0 to 64 and then doubling: does it use its context?"""
    spans, start, end = [], 0, 64
    while start < len(found):
        bits_per_byte = float(found[start:end].mean())
        spans.append(
            {"from": start, "to": min(end, len(found) + 1), "bits_per_byte": bits_per_byte}
        )
        start, end = end, 2 * end
    return spans


def _recall(spec: Spec, settings: Settings, seed: int, tell: Tell) -> float:
    """Accuracy on fresh sequences of a small model of the same mixer, trained to recall.

    Two layers of width 64, for a quarter of the row's budget, on 4 pairs in 32 tokens:
    guessing among the four values gives a quarter.
    """
    budget = Budget.parse(settings.budget)
    share = Budget(
        seconds=budget.seconds and budget.seconds / 4,
        tokens=budget.tokens and max(1, budget.tokens // 4),
    )
    generator, fixed = (torch.Generator().manual_seed(s) for s in (seed, 1000 + seed))
    torch.manual_seed(seed)
    small = decoder(
        spec,
        settings,
        vocab_size=RECALL["vocabulary"],
        width=64,
        heads=2,
        layers=2,
        length=RECALL["length"],
    ).to(settings.device)

    def draw() -> dict[str, Tensor]:
        tokens, labels = recall(batch=RECALL_BATCH, generator=generator, **RECALL)
        return {"input_ids": tokens, "labels": labels}

    progress = Progress(
        share, RECALL_BATCH * RECALL["length"], tell=lambda done: tell("recall", done)
    )
    train(small, draw, progress, rate=settings.rate, seed=seed, device=settings.device)
    tokens, labels = recall(batch=256, generator=fixed, **RECALL)
    small.eval()
    with torch.no_grad():
        logits = small(input_ids=tokens.to(settings.device), use_cache=False).logits
    return float(recall_accuracy(logits.cpu().float(), labels))


def _speed(
    lm: nn.Module, spec: Spec, settings: Settings, tell: Tell
) -> tuple[dict[str, Any], list[dict[str, int]], dict[str, int | None]]:
    """Prefill and step at lengths from a sixteenth to four times the training length, beside dense.

    Doubling lengths: all up to the training length, and beyond it until the next would outlast
    what is left of half the budget (5 s to a minute; 20 s for a budget of tokens).
    """
    dense = decoder(Spec(BASELINE, {}), settings).to(settings.device).eval()
    lm.eval()
    seconds = Budget.parse(settings.budget).seconds
    patience = 20.0 if seconds is None else min(60.0, max(5.0, seconds / 2))
    started = time.perf_counter()
    prefill: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    state: list[dict[str, int]] = []
    ratios: list[tuple[int, float]] = []
    lengths = [n for k in range(-4, 3) if (n := int(settings.length * 2.0**k)) >= 16]
    for number, length in enumerate(lengths):
        tell("speed", number / len(lengths))
        tokens = torch.zeros(1, length, dtype=torch.long, device=settings.device)

        def run(which: nn.Module, tokens: Tensor = tokens) -> Any:
            with torch.no_grad():
                cache = which(input_ids=tokens, use_cache=True).past_key_values
            if settings.device != "cpu":
                torch.cuda.synchronize()
            return cache

        begun = time.perf_counter()
        try:
            both = paired(lambda: run(lm), lambda: run(dense), seconds=patience / 40)
            cache = run(lm)
        except LongspanError:
            break  # built for a length that this exceeds
        prefill.append(
            {"length": length, "seconds": both.first, "tokens_per_second": length / both.first}
        )
        ratios.append((length, both.ratio))
        if cache is not None:
            state.append({"length": length, "bytes": state_bytes(cache.states)})
            with suppress(LongspanError):  # built for exactly this length
                steps.append({"length": length, "seconds": _step(lm, cache, settings.device)})
        now = time.perf_counter()
        if length >= settings.length and now - started + 4 * (now - begun) > patience:
            break
    crossover: dict[str, int | None] = {"length": None, "beyond": None}
    if spec.id != BASELINE and ratios:
        crossover = cross(ratios)
    return {"prefill": prefill, "step": steps}, state, crossover


def _step(lm: nn.Module, cache: Any, device: str) -> float:
    """Median seconds of one more token, of 16, after one that is not counted."""
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    seconds = []
    for _ in range(17):
        start = time.perf_counter()
        with torch.no_grad():
            lm(input_ids=token, past_key_values=cache, use_cache=True)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def cross(ratios: list[tuple[int, float]]) -> dict[str, int | None]:
    """The length from which on the ratio to dense stays below 1, between lengths in log-log.

    Where it is below 1 throughout, the shortest length measured; where it is not at the longest,
    None, and `beyond` is that longest length.
    """
    length, ratio = ratios[-1]
    if ratio >= 1:
        return {"length": None, "beyond": length}
    for (short, above), (long, below) in zip(ratios[-2::-1], ratios[:0:-1], strict=True):
        if above >= 1:
            share = math.log(above) / (math.log(above) - math.log(below))
            return {"length": round(short * (long / short) ** share), "beyond": None}
    return {"length": ratios[0][0], "beyond": None}
