"""Matching in size: the arguments at which a model costs what dense attention's does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from longspan.bench.decoder import carried_bytes, decoder, parameters, training_flops
from longspan.bench.settings import BASELINE, Settings, Spec
from longspan.errors import LongspanError
from longspan.registry import options, show

TOLERANCE = 0.02
# Arguments that set how much a mechanism carries, by the names they have.
SIZES = ("window", "memory", "slots", "features", "landmarks", "near", "span", "segment", "states")


@dataclass(frozen=True)
class Sized:
    """A mechanism with the inner width and arguments that match, and what could not be matched."""

    arguments: dict[str, Any]
    inner: int
    unmatched: str | None = None


def match(spec: Spec, settings: Settings) -> Sized:
    """The sizes at which `spec`'s model equals dense attention's, by `settings.match`.

    Raises:
        LongspanError: no inner width comes within 2 %.
    """
    dense = Spec(BASELINE, {})
    unmatched = None
    if settings.match == "time" or spec.id == BASELINE:
        return Sized(spec.arguments, 4 * settings.width)
    if settings.match == "state":
        spec, unmatched = _match_state(spec, settings)
    if settings.match == "flops":

        def cost(which: Spec, inner: int) -> int:
            return training_flops(decoder(which, settings, inner=inner), settings.length)
    else:

        def cost(which: Spec, inner: int) -> int:
            return parameters(decoder(which, settings, inner=inner))

    target = cost(dense, 4 * settings.width)
    inner = _solve(lambda inner: cost(spec, inner), target, 4 * settings.width)
    if inner is None:
        raise LongspanError(
            f"'{spec.id}' cannot be matched: even with no feed-forward its model has more "
            f"{'FLOPs' if settings.match == 'flops' else 'parameters'} than dense attention's "
            f"{target}: compare with --match time, or with smaller arguments."
        )
    return Sized(spec.arguments, inner, unmatched)


def _solve(cost: Callable[[int], int], target: int, guess: int) -> int | None:
    """The inner width at which an affine cost meets its target, a multiple of 8 where that does."""
    here, half = cost(guess), cost(guess // 2)
    if abs(here - target) <= TOLERANCE / 4 * target:
        return guess
    exact = guess + (target - here) * (guess - guess // 2) / (here - half)
    for inner in (8 * round(exact / 8), round(exact)):
        if inner >= 1 and abs(cost(inner) - target) <= TOLERANCE * target:
            return inner
    return None


def _match_state(spec: Spec, settings: Settings) -> tuple[Spec, str | None]:
    target = carried_bytes(decoder(Spec(BASELINE, {}), settings), max(1, settings.length // 8))
    if "step" not in show(spec.id).modes:
        return spec, f"state not matched ('{spec.id}' carries none: it has no step form)."

    known = options(spec.id)
    name = next((n for n in SIZES if n in known and isinstance(known[n].default, int)), None)
    if name is None:
        own = carried_bytes(decoder(spec, settings), settings.length)
        return spec, (
            f"state not matched ('{spec.id}' has no argument for its size): {own} bytes against "
            f"{target}."
        )

    def resized(size: int) -> Spec:
        return Spec(spec.id, {**spec.arguments, name: size})

    def carried(size: int) -> int:
        return carried_bytes(decoder(resized(size), settings), settings.length)

    small, large = (2 * max(1, settings.length // part) for part in (64, 16))
    low, high = carried(small), carried(large)
    if high > low:
        size = small + (target - low) * (large - small) / (high - low)
        size = max(2, 2 * round(size / 2))  # a window is even
        own = carried(size)
        if abs(own - target) <= 0.1 * target:
            return resized(size), None
    return spec, f"state not matched ('{name}' of '{spec.id}' does not reach {target} bytes)."
