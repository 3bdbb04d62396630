"""BERT and RoBERTa with SMYRF in the place of their attention (Daras et al., 2020, Sec. 4)."""

from longspan.convert.bert import Model, with_attention
from longspan.nn import Attention
from longspan.registry import build


def smyrf(
    model: Model,
    *,
    cluster: int = 64,
    rounds: int = 4,
    transform: str = "xbox+",
    seed: int = 0,
    redraw: bool = False,
    length: int | None = None,
) -> Model:
    """A copy of a trained BERT or RoBERTa that attends within SMYRF's clusters.

    It has no new parameters: use it as it is, or fine-tune it. With one cluster and one round
    outputs are the model's own. For one attention module alone, `convert.bert.SelfAttention` takes
    its place. Else as `convert.bert.with_attention`.

    Args:
        seed: of the hashes; layer i draws with seed + i.
        length: tokens that the position table is extended to, by repetition.

    Raises:
        LongspanError: whatever `with_attention` or the mechanism refuses.

    >>> quick = smyrf(BertModel.from_pretrained("bert-base-uncased"), cluster=64, rounds=4)
    """

    def attend(layer: int) -> Attention:
        return build(
            "smyrf",
            cluster=cluster,
            rounds=rounds,
            transform=transform,
            seed=seed + layer,
            redraw=redraw,
        )

    return with_attention(model, "smyrf", attend, length=length)
