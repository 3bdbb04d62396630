"""Nyströmformer checkpoints of transformers, freed from their fixed length."""

from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longspan.errors import LongspanError
from longspan.nn import MultiHead
from longspan.registry import build
from longspan.shapes import Inputs

Model = TypeVar("Model", bound=PreTrainedModel)


def nystromformer(model: Model) -> Model:
    """A copy of a transformers Nyströmformer whose attention is longspan's, with its weights.

    It takes any length up to the position table's and cuts segments over real tokens, so that
    padding changes nothing; at the length the original is fixed to, outputs are the original's up
    to its coupling of the batch (its iteration starts from one scale for all rows).

    Raises:
        LongspanError: another architecture.

    >>> free = nystromformer(NystromformerModel.from_pretrained("uw-madison/nystromformer-512"))
    """
    config: Any = model.config
    if config.model_type != "nystromformer":
        raise LongspanError(
            f"this loads models of type nystromformer and got a {config.model_type}: give a "
            "Nystromformer model of transformers."
        )
    converted = deepcopy(model)
    base: Any = converted.base_model
    for layer in base.encoder.layer:
        layer.attention.self = SelfAttention(layer.attention.self)
    return converted


class SelfAttention(nn.Module):
    """transformers' NystromformerSelfAttention by longspan's mechanism; W_o stays in its place."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        weight, heads = original.conv.weight, original.num_attention_heads
        attention = build(
            "nystromformer",
            landmarks=original.num_landmarks,
            heads=heads,
            kernel=weight.shape[2],
        )
        attention.weight = nn.Parameter(weight.detach().view(heads, -1))
        with torch.device("meta"):  # all its projections are replaced
            self.mixer = MultiHead(attention, width=original.query.in_features, heads=heads)
        project = self.mixer.project
        project["q"], project["k"], project["v"] = original.query, original.key, original.value
        self.mixer.add_module("output", nn.Identity())

    def forward(
        self, hidden_states: Inputs, attention_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> tuple[Inputs]:
        # transformers hands over an additive mask, B 1 1 L: 0 where a token is real.
        keep = None if attention_mask is None else attention_mask[:, 0, 0] == 0
        return (self.mixer(hidden_states, keep=keep)[0],)
