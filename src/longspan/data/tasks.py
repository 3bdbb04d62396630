"""Generated tasks: multi-query associative recall."""

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from longspan.errors import LongspanError
from longspan.shapes import Tokens

IGNORED = -100


def recall(
    *,
    batch: int,
    length: int,
    pairs: int,
    vocabulary: int,
    generator: Generator,
    power: float = 0.01,
) -> tuple[Tokens, Tokens]:
    """Multi-query associative recall (Zoology, Arora et al. 2023, Sec. 4 and App. C).

    First `pairs` keys, each followed by its value; then every key once more, at random even
    places among random filler, where its value is to be predicted. Keys are distinct tokens of
    1 … vocabulary/2 − 1, values distinct tokens of vocabulary/2 … vocabulary − 1, filler any
    token; a gap of i two-token slots before a query has the weight i^(power − 1).

    Zoology puts the target at the query. A causal LM of transformers shifts its labels, so here
    the target stands one place later, and `labels` goes straight into the model. As in Zoology
    the value is not in `input_ids` there: that place holds filler. With 2 pairs, 10 tokens and
    a vocabulary of 16, f being filler:

        input_ids    5   9   3  14   f   f   3   f   5   f
        labels       .   .   .   .   .   .   .  14   .   9        . = −100

    Departure: Zoology's generator wants an even length and a vocabulary above it; neither is
    needed here.

    Raises:
        LongspanError: the pairs do not fit the length (4 tokens a pair) or the vocabulary.
    """
    if min(batch, pairs) < 1:
        raise LongspanError(f"recall got batch={batch} and pairs={pairs}; expected at least 1.")
    if 4 * pairs > length:
        raise LongspanError(
            f"{pairs} pairs need a length of at least {4 * pairs} and got {length}: "
            f"use at most {length // 4} pairs, or a longer sequence."
        )
    half = vocabulary // 2
    if pairs > half - 1:
        raise LongspanError(
            f"{pairs} pairs need a vocabulary of at least {2 * pairs + 2} and got {vocabulary}: "
            f"use at most {max(half - 1, 0)} pairs, or a larger vocabulary."
        )

    def distinct(weights: Tensor) -> Tensor:
        return torch.multinomial(weights.expand(batch, -1), pairs, generator=generator)

    device, context = generator.device, 2 * pairs
    keys = 1 + distinct(torch.ones(half - 1, device=device))
    values = half + distinct(torch.ones(vocabulary - half, device=device))
    slots = torch.arange(1, (length - context) // 2 + 1, device=device, dtype=torch.float64)
    queries = context + 2 * distinct(slots ** (power - 1))

    input_ids = torch.randint(vocabulary, (batch, length), generator=generator, device=device)
    input_ids[:, 0:context:2] = keys
    input_ids[:, 1:context:2] = values
    input_ids.scatter_(1, queries, keys)
    labels = torch.full_like(input_ids, IGNORED).scatter_(1, queries + 1, values)
    return input_ids, labels


def recall_accuracy(logits: Float[Tensor, "B L N"], labels: Tokens) -> float:
    """The share of labels that the logits one place before put first.

    Raises:
        LongspanError: no label to be judged by.
    """
    asked = labels[:, 1:] != IGNORED
    if not asked.any():
        raise LongspanError(f"every label is {IGNORED}: expected labels made by recall().")
    right = logits[:, :-1].argmax(-1) == labels[:, 1:]
    return right[asked].double().mean().item()
