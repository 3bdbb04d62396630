"""Which mechanism to use, in plain words, with the reasons and the doubts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longspan.report import summary
from longspan.report.summary import NOISE, Comparison, Row, gather, listing

# Below this, a small model has not yet shown what it will do: compute-optimal is near 20.
ENOUGH_TOKENS_A_PARAMETER = 20
# Costs closer than this are within what a busy machine adds.
COST_NOISE = 1.1
RECALL_GAP = 0.05


@dataclass(frozen=True)
class Recommendation:
    """The mechanism to use, or None; what speaks for it, and what against trusting it."""

    choice: str | None
    text: str
    reasons: list[str]
    doubts: list[str]


def recommend(records: list[dict[str, Any]]) -> Recommendation:
    """The cheapest of the mechanisms whose quality cannot be told from the best.

    Quality ties within the spread of the seeds or 2 %, whichever is more; cost is the geometric
    mean of training, prefill, step and state, each relative to the best of those that tie.
    A mechanism that fails a law or can see the future is chosen only where none is sound.
    """
    return advise(gather(records))


def advise(comparison: Comparison) -> Recommendation:
    """`recommend` for records already gathered."""
    scored = comparison.scored
    if len(scored) < 2:
        return _alone(comparison, scored)
    candidates = [row for row in scored if row.sound] or scored
    tied = [row for row in candidates if not _apart(candidates[0], row)]
    costs = _costs(comparison, tied)
    choice = min(tied, key=lambda row: (costs[row.label], row.bits))
    return Recommendation(
        choice.label,
        _answer(comparison, choice, tied),
        _reasons(comparison, choice, tied),
        [*_about(comparison, choice, tied, costs), *_in_general(comparison)],
    )


def _alone(comparison: Comparison, scored: Sequence[Row]) -> Recommendation:
    doubts = _in_general(comparison)
    if not comparison.rows:
        return Recommendation(
            None, "There are no records, so there is nothing to recommend.", [], []
        )
    if not scored:
        many = len(comparison.rows)
        text = (
            f"Nothing can be recommended: {'the only row' if many == 1 else f'none of {many} rows'}"
            f" {'did not finish' if many == 1 else 'finished'} with a figure for quality."
        )
        reasons = [f"{r.label} {r.status}: {r.reason}" for r in comparison.rows if not r.done]
        return Recommendation(None, text, reasons, doubts)
    (row,) = scored
    text = (
        f"Only {row.label} finished, at {summary.bits(row.bits or 0)} bits per byte, so there is "
        "nothing to compare it with and no recommendation."
    )
    return Recommendation(None, text, [], [*_unsound(row), *doubts])


def _apart(best: Row, row: Row) -> bool:
    """Whether the quality of `row` is worse by more than the noise."""
    best_bits, bits = best.bits or 0.0, row.bits or 0.0
    return bits - best_bits > max(best.spread, row.spread, NOISE * best_bits)


def _costs(comparison: Comparison, rows: Sequence[Row]) -> dict[str, float]:
    """Geometric mean of the costs relative to the least; what a row lacks counts as the worst."""
    measured: list[Mapping[str, float]] = [
        {r.label: 1 / rate for r in rows if (rate := r.mean("speed", "train_tokens_per_second"))},
        comparison.at_shared_length(lambda r: r.prefill),
        comparison.at_shared_length(lambda r: r.step),
        comparison.at_shared_length(lambda r: r.state),
    ]
    logs: dict[str, list[float]] = {row.label: [] for row in rows}
    for costs in measured:
        own = {row.label: costs[row.label] for row in rows if costs.get(row.label, 0) > 0}
        for label in logs if own else ():
            logs[label].append(math.log(own.get(label, max(own.values())) / min(own.values())))
    return {label: math.exp(sum(v) / len(v)) if v else 1.0 for label, v in logs.items()}


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}×" if ratio >= 10 else f"{ratio:.1f}×"


def _faster(verb: str, ratio: float) -> str:
    """`ratio` is how many times as fast as dense."""
    if 1 / COST_NOISE < ratio < COST_NOISE:
        return f"{verb} about as fast as dense attention"
    if ratio > 1:
        return f"{verb} {_times(ratio)} as fast as dense attention"
    return f"{verb} at {summary.figures(100 * ratio)} % of dense attention's speed"


def _training_ratio(row: Row, dense: Row) -> float | None:
    own, theirs = (r.mean("speed", "train_tokens_per_second") for r in (row, dense))
    return own / theirs if own and theirs else None


def _at(curve: Mapping[str, float], row: Row, dense: Row) -> float | None:
    """How many times as much dense attention takes."""
    own, theirs = curve.get(row.label), curve.get(dense.label)
    return theirs / own if own and theirs else None


def _answer(comparison: Comparison, choice: Row, tied: Sequence[Row]) -> str:
    where = f" at {summary.count(comparison.length)} tokens" if comparison.length else ""
    bits, dense = f"{summary.bits(choice.bits or 0)} bits per byte", comparison.dense
    if choice is dense:
        others = [row.label for row in tied if row is not dense]
        if others:
            return (
                f"Stay with dense attention{where}: {listing(others)} cannot be told from it by "
                f"quality ({bits}), and none is cheaper over all."
            )
        return f"Stay with dense attention{where}: nothing else came within noise of its {bits}."
    quality = (
        f"has the best quality, {bits}"
        if len(tied) == 1
        else f"is the cheapest of the {len(tied)} that tie for the best quality, at {bits}"
    )
    clauses = []
    if dense is not None:
        if training := _training_ratio(choice, dense):
            clauses.append(_faster("trains", training))
        shared = comparison.shared_length(lambda r: r.state)
        smaller = _at(comparison.at_shared_length(lambda r: r.state), choice, dense)
        if shared is not None and smaller:
            after = f"state after {summary.length(shared)} tokens"
            clauses.append(
                f"carries {_times(smaller)} less {after}"
                if smaller > COST_NOISE
                else f"carries about as much {after}"
                if smaller > 1 / COST_NOISE
                else f"carries {_times(1 / smaller)} as much {after}"
            )
    but = (
        "" if choice.sound else " But no sound mechanism finished, and this one is not: see below."
    )
    return f"Use {choice.label}{where}: it {quality}" + (
        f"; it {' and '.join(clauses)}.{but}" if clauses else f".{but}"
    )


def _reasons(comparison: Comparison, choice: Row, tied: Sequence[Row]) -> list[str]:
    reasons, dense, bits = [], comparison.dense, choice.bits or 0.0
    if dense is not None and dense is not choice and dense.bits:
        by = abs(bits - dense.bits) / dense.bits
        noise = max(dense.spread, choice.spread, NOISE * min(bits, dense.bits))
        verdict = (
            "within noise of"
            if abs(bits - dense.bits) <= noise
            else f"{100 * by:.1f} % {'better' if bits < dense.bits else 'worse'} than"
        )
        reasons.append(
            f"Quality: {summary.bits(bits)} bits per byte, {verdict} dense attention's "
            f"{summary.bits(dense.bits)}."
        )
    ahead = [row for row in comparison.scored if row is not choice and row not in tied]
    if ahead and (behind := [row for row in ahead if (row.bits or 0) > bits]):
        reasons.append(
            f"The next that does not tie, {behind[0].label}, has "
            f"{summary.bits(behind[0].bits or 0)} bits per byte."
        )
    reasons += _speed(comparison, choice)
    shared = comparison.shared_length(lambda r: r.state)
    state = comparison.at_shared_length(lambda r: r.state)
    if shared is not None and choice.label in state:
        beside = (
            f", against {summary.size(state[dense.label])} for dense attention"
            if dense is not None and dense is not choice and dense.label in state
            else ""
        )
        reasons.append(
            f"State after {summary.length(shared)} tokens: "
            f"{summary.size(state[choice.label])}{beside}."
        )
    if choice.laws and not choice.laws_with("fail"):
        passed = len(choice.laws_with("pass"))
        reasons.append(f"Certificate: {passed} of {len(choice.laws)} laws pass, none fails.")
    return reasons


def _speed(comparison: Comparison, choice: Row) -> list[str]:
    found, dense = [], comparison.dense
    shared = comparison.shared_length(lambda r: r.prefill)
    if dense is not None and dense is not choice and shared is not None:
        ratio = _at(comparison.at_shared_length(lambda r: r.prefill), choice, dense)
        if ratio:
            fast = _faster("reads", ratio)
            found.append(f"Prefill: {fast} at {summary.length(shared)} tokens.")
        length, beyond = choice.crossover
        if length is not None:
            found.append(f"It overtakes dense attention from {summary.count(length)} tokens on.")
        elif beyond is not None:
            found.append(f"It was never faster than dense up to {summary.count(beyond)} tokens.")
    if choice.fit:
        beside = (
            f"; dense attention's as {dense.fit}"
            if dense is not None and dense is not choice and dense.fit
            else ""
        )
        found.append(f"Its prefill time grows as {choice.fit}{beside}.")
    return found


def _unsound(row: Row) -> list[str]:
    found = []
    if failed := row.laws_with("fail"):
        found.append(f"{row.label} fails {listing(failed)}: its figures may mean nothing.")
    if row.causality == "selection":
        found.append(
            f"{row.label} can see the future: later tokens change whom earlier ones attend to, "
            "so its quality as a language model is flattered."
        )
    elif row.causality is None:
        found.append(f"Whether {row.label} can see the future is not stated.")
    elif row.causality != "strict":
        found.append(f"{row.label} is not strictly causal (causality: {row.causality}).")
    if skipped := row.laws_with("skip"):
        found.append(f"{row.label} skips {listing(skipped)}: not shown to hold.")
    if not row.laws:
        found.append(f"{row.label} has no certificate: no law was checked.")
    return found


def _about(
    comparison: Comparison, choice: Row, tied: Sequence[Row], costs: Mapping[str, float]
) -> list[str]:
    """What speaks against the choice itself."""
    doubts = _unsound(choice)
    if others := [row.label for row in tied if row is not choice]:
        noise = max(*(row.spread for row in tied), NOISE * (tied[0].bits or 0.0))
        doubts.append(
            f"Quality within noise ({summary.figures(noise)} bits per byte): {listing(others)} "
            f"cannot be told from {choice.label}."
        )
        near = [
            row.label
            for row in tied
            if row is not choice and costs[row.label] < COST_NOISE * costs[choice.label]
        ]
        if near:
            doubts.append(f"On cost, too, {listing(near)} comes within 10 %: either will do.")
    for row in comparison.scored:
        if not row.sound and (row.bits or 0) < (choice.bits or 0) and row is not choice:
            why = row.laws_with("fail")
            doubts.append(
                f"{row.label} scored better ({summary.bits(row.bits or 0)}) and was passed over: "
                + (f"it fails {listing(why)}." if why else f"its causality is {row.causality}.")
            )
    recalls = {row.label: row.mean("quality", "recall") for row in comparison.scored}
    known = {label: value for label, value in recalls.items() if value is not None}
    if known:
        best, own = max(known, key=lambda label: known[label]), recalls[choice.label]
        if own is None:
            doubts.append(f"The recall of {choice.label} was not measured.")
        elif known[best] - own > RECALL_GAP:
            doubts.append(
                f"Recall: {choice.label} finds {summary.share(own)} of what it was shown, "
                f"{best} {summary.share(known[best])}. Where exact recall matters, choose that."
            )
    late = choice.by_position
    if len(late) >= 4 and late[-1][1] > (1 - NOISE / 2) * late[len(late) // 2 - 1][1]:
        doubts.append(
            f"The loss of {choice.label} hardly falls over the later half of the positions: "
            "at this budget it makes little use of a long context."
        )
    curve = choice.curve
    if len(curve) >= 4 and curve[-1][1] < (1 - NOISE) * curve[-1 - len(curve) // 4][1]:
        doubts.append(f"{choice.label} was still improving when its budget ended.")
    return doubts


def _in_general(comparison: Comparison) -> list[str]:
    """What limits the comparison as a whole."""
    doubts = []
    scored = comparison.scored
    if scored and (fewest := min(len(set(map(str, row.seeds))) for row in scored)) < 3:
        doubts.append(
            ("One seed" if fewest == 1 else "Two seeds")
            + ": the spread between runs is "
            + ("unknown." if fewest == 1 else "barely known.")
        )
    doubts += _budget(comparison)
    if scored and comparison.dense is None:
        doubts.append("Dense attention did not finish: nothing here is measured against it.")
    for status in ("failed", "refused"):
        if names := [row.label for row in comparison.rows if row.status == status]:
            was = "was" if len(names) == 1 else "were"
            doubts.append(
                f"{listing(names)} {'failed' if status == 'failed' else f'{was} refused'}, "
                "so could not be chosen."
            )
    partly = [r.label for r in comparison.finished if len(r.done) < len(r.records)]
    if partly:
        doubts.append(f"Not every run of {listing(partly)} finished.")
    if scored:
        doubts += _where(comparison)
    return doubts


def _budget(comparison: Comparison) -> list[str]:
    seen = [
        tokens / parameters
        for row in comparison.scored
        if (tokens := row.mean("quality", "tokens")) and (parameters := row.mean("parameters"))
    ]
    if not seen or min(seen) >= ENOUGH_TOKENS_A_PARAMETER:
        return []
    budget = next(iter(comparison.distinct("settings", "budget")), None)
    given = f" ({budget} a run)" if budget else ""
    least = summary.figures(min(seen))
    return [
        f"Small budget{given}: the least trained saw {least} tokens a parameter, and about "
        f"{ENOUGH_TOKENS_A_PARAMETER} is usual. The order may change with more training."
    ]


def _where(comparison: Comparison) -> list[str]:
    doubts = []
    machines = [
        str(m.get("cpu") or m.get("name") or "one machine")
        for m in comparison.distinct("machine")
        if isinstance(m, Mapping)
    ]
    devices = [str(d) for d in comparison.distinct("machine", "device")]
    if len(machines) == 1:
        on = f"{devices[0].upper()} only ({machines[0]})" if devices else machines[0]
        at = f" and at {summary.count(comparison.length)} tokens" if comparison.length else ""
        doubts.append(f"Measured on {on}{at}: another device or length may order them differently.")
    elif machines:
        doubts.append("Measured on different machines: their speeds cannot be compared.")
    for name, path in (
        ("training lengths", ("settings", "length")),
        ("budgets", ("settings", "budget")),
        ("ways of matching size", ("settings", "match")),
        ("data", ("settings", "data", "sha256")),
        ("versions of the code", ("commit",)),
    ):
        if len(comparison.distinct(*path)) > 1:
            doubts.append(f"The rows come from different {name}: do not compare them blindly.")
    return doubts
