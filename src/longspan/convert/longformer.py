"""BERT and RoBERTa into Longformer (Beltagy et al., 2020, Sec. 5)."""

from longspan.convert.bert import Model, with_attention
from longspan.nn import Attention
from longspan.registry import build


def longformer(model: Model, *, window: int = 512, length: int = 4096, hubs: int = 1) -> Model:
    """A copy of a BERT or RoBERTa that attends as Longformer does, for `length` tokens.

    Its W_q, W_k, W_v are also those of the global tokens; the position table is repeated. While
    window / 2 ≥ L, outputs are the model's own. Call it with `global_attention_mask` (B L, nonzero
    where global) to make more tokens global. Else as `convert.bert.with_attention`.

    Args:
        window: the total width w, even.
        hubs: the first so many tokens of each row are global ([CLS] or <s>: 1).

    Raises:
        LongspanError: whatever `with_attention` or the mechanism refuses.

    >>> long = longformer(RobertaModel.from_pretrained("roberta-base"), window=512, length=4096)
    """

    def attend(_: int) -> Attention:
        return build("longformer", window=window, hubs=hubs)

    return with_attention(model, "longformer", attend, length=length)
