"""BERT and RoBERTa into BigBird (Zaheer et al., 2020, Sec. 4)."""

from longspan.convert.bert import Model, with_attention
from longspan.nn import Attention
from longspan.registry import build


def bigbird(
    model: Model,
    *,
    length: int = 4096,
    block: int = 64,
    near: int = 3,
    chance: int = 3,
    seed: int = 0,
) -> Model:
    """A copy of a BERT or RoBERTa that attends as BigBird-ITC does, for `length` tokens.

    The position table is repeated. Up to (5 + 2 chance) blocks, which see each other whole, outputs
    are the model's own; then the first and the last block are global. Else as
    `convert.bert.with_attention`.

    Args:
        seed: of the random blocks; layer i draws with seed + i.

    Raises:
        LongspanError: whatever `with_attention` or the mechanism refuses.

    >>> long = bigbird(RobertaModel.from_pretrained("roberta-base"), length=4096)
    """

    def attend(layer: int) -> Attention:
        return build("bigbird", block=block, near=near, chance=chance, seed=seed + layer)

    return with_attention(model, "bigbird", attend, length=length)
