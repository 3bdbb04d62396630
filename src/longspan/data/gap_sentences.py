"""Principle sentence generation: the pre-training task of PEGASUS, which LongT5 uses."""

from collections import Counter
from collections.abc import Hashable, Sequence

from longspan.errors import LongspanError


def principal_sentences(sentences: Sequence[Sequence[Hashable]], count: int) -> list[int]:
    """Which `count` sentences say most of the rest, ascending: PEGASUS's Ind-Uniq.

    Each sentence is judged alone, s_i = ROUGE-1 F1(x_i, D ∖ {x_i}), with unigrams counted once on
    both sides (Zhang et al., 2020, Sec. 3.1); equal scores favour the earlier.

    Args:
        sentences: their tokens.

    Raises:
        LongspanError: more sentences asked for than there are.

    >>> principal_sentences([["a", "b"], ["c"], ["a", "b", "c"]], 1)
    [2]
    """
    if not 0 <= count <= len(sentences):
        raise LongspanError(
            f"{count} of {len(sentences)} sentences were asked for: give 0 … {len(sentences)}."
        )
    words = [set(s) for s in sentences]
    holds = Counter(w for own in words for w in own)
    scores = []
    for own in words:
        common = sum(holds[w] > 1 for w in own)
        rest = len(holds) - len(own) + common
        scores.append(2 * common / max(len(own) + rest, 1))
    return sorted(sorted(range(len(words)), key=lambda i: -scores[i])[:count])


def gap_sentences(
    sentences: Sequence[Sequence[int]],
    *,
    mask: int,
    ratio: float = 0.2,
    length: int = 4096,
    target_length: int = 910,
) -> tuple[list[int], list[int]]:
    """(input, target): the principal sentences, one `mask` in place of each, and they in order.

    Both are cut to their lengths, LongT5's by default (Guo et al., Sec. 4.1.1); at least one
    sentence is masked.

    Args:
        sentences: token ids. ratio: of sentences to mask.

    Raises:
        LongspanError: no sentence; a ratio that is not above 0 and at most 1.

    >>> gap_sentences([[5, 6], [7], [5, 6, 7]], mask=1)
    ([5, 6, 7, 1], [5, 6, 7])
    """
    if not sentences or not 0 < ratio <= 1:
        raise LongspanError(
            f"gap_sentences got {len(sentences)} sentences and ratio={ratio}: expected at least "
            "one sentence and 0 < ratio ≤ 1."
        )
    chosen = set(principal_sentences(sentences, max(1, round(ratio * len(sentences)))))
    left = [t for i, s in enumerate(sentences) for t in ([mask] if i in chosen else s)]
    gone = [t for i, s in enumerate(sentences) if i in chosen for t in s]
    return left[:length], gone[:target_length]
