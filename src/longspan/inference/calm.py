"""Calibrated early exits: a threshold that keeps generated texts close to those of full depth.

Schuster et al., 2022, Sec. 4.2; the tests are those of `learn_then_test`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from longspan.errors import LongspanError
from longspan.inference.exits import Graded
from longspan.inference.learn_then_test import Bound, Calibration, LearnThenTest

# (tokens, tokens) → a number in [0, 1]; 0 where the first is as good as the second.
TextLoss = Callable[[list[int], list[int]], float]


def rouge_l_loss(text: list[int], reference: list[int]) -> float:
    """1 − ROUGE-L: the F score of the longest common subsequence (Lin, 2004).

    >>> rouge_l_loss([1, 2, 3, 4], [1, 3, 4])
    0.14285714285714285
    """
    if not text or not reference:
        return float(text != reference)
    lengths = [0] * (len(reference) + 1)
    for token in text:
        before = 0
        for j, other in enumerate(reference, 1):
            above = lengths[j]
            lengths[j] = before + 1 if token == other else max(above, lengths[j - 1])
            before = above
    return 1 - 2 * lengths[-1] / (len(text) + len(reference))


@dataclass(frozen=True)
class Calibrated:
    """λ, full depth (1) where no threshold was accepted, and what was tested on the way.

    With probability ≥ 1 − ε over the prompts, the expected loss at `threshold` is ≤ δ.
    """

    threshold: float
    calibration: Calibration

    @property
    def fell_back(self) -> bool:
        """Whether nothing was certified, so that all blocks run."""
        return not self.calibration.accepted


def calibrate(
    model: Any,
    prompts: Int[Tensor, "n P"],
    *,
    level: float,
    error: float = 0.05,
    new_tokens: int,
    thresholds: Sequence[float] = tuple(n / 20 for n in range(19, -1, -1)),
    loss: TextLoss = rouge_l_loss,
    references: Sequence[list[int]] | None = None,
    mask: Tensor | None = None,
    bound: Bound = "hoeffding-bentkus",
    batch: int = 32,
) -> Calibrated:
    """Find and set the smallest λ whose loss is certified to be ≤ `level` (δ).

    Without references, the loss of a text is `loss(early, full)` (textual consistency). With them,
    it is max(0, loss(early, reference) − loss(full, reference)) (risk consistency).

    Args:
        thresholds: falling, and chosen without a look at the prompts.
        loss: of two texts (token ids behind the prompt, up to the end token), in [0, 1].
        references: a text for each prompt.

    Raises:
        LongspanError: thresholds that do not fall, references that do not match the prompts.
    """
    if any(low >= high for high, low in pairwise(thresholds)):
        raise LongspanError("thresholds are tested from the safest on: give them falling.")
    if references is not None and len(references) != len(prompts):
        raise LongspanError(
            f"{len(references)} references were given for {len(prompts)} prompts: give one each."
        )
    rule = model.driver.rule

    def texts(threshold: float) -> list[list[int]]:
        rule.set_threshold(threshold)
        return _texts(model, prompts, mask, new_tokens, batch)

    def losses(threshold: float) -> Tensor:
        early = texts(threshold)
        if references is None:
            found = [loss(a, b) for a, b in zip(early, full, strict=True)]
        else:
            found = [
                max(0.0, loss(a, r) - loss(b, r))
                for a, b, r in zip(early, full, references, strict=True)
            ]
        return torch.tensor(found, dtype=torch.float64)

    before = rule.thresholds.tolist()
    try:
        full = texts(1.0)
        calibration = LearnThenTest(error=error, bound=bound)(losses, list(thresholds), level)
    except BaseException:
        rule.set_threshold(before)
        raise
    threshold = calibration.choose() if calibration.accepted else 1.0
    rule.set_threshold(threshold)
    return Calibrated(threshold, calibration)


def agreement(graded: Graded) -> Int[Tensor, "B L"]:
    """The oracle measure, for analysis: the first block from which the choice is the last's.

    >>> oracle = agreement(model.grade(tokens))
    >>> model(tokens, exits=oracle)
    """
    return graded.agrees.int().argmax(0) + 1


def _texts(
    model: Any, prompts: Tensor, mask: Tensor | None, new_tokens: int, batch: int
) -> list[list[int]]:
    found: list[list[int]] = []
    behind = 1 if model.config.is_encoder_decoder else prompts.shape[1]
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    masks = torch.ones_like(prompts) if mask is None else mask
    for rows, seen in zip(prompts.split(batch), masks.split(batch), strict=True):
        tokens = model.generate(
            rows, attention_mask=seen, max_new_tokens=new_tokens, do_sample=False
        )
        for row in tokens[:, behind:].tolist():
            stop = next((n for n, token in enumerate(row) if token in ends), len(row))
            found.append(row[:stop])
    return found
