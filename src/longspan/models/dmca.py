"""T-DMCA (Liu et al., 2018): a decoder of local and memory-compressed layers in turn."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from longspan import hub
from longspan.errors import LongspanError
from longspan.models.config import LongspanConfig, Spec
from longspan.models.heads import LongspanForCausalLM
from longspan.models.losses import IGNORED
from longspan.models.stack import LongspanModel, initialise
from longspan.nn.experts import Experts
from longspan.shapes import Tokens


class DmcaConfig(LongspanConfig):
    """A LongspanConfig of the layers that a pattern of letters names.

    Args:
        pattern: L for local attention, M for memory-compressed.
        block: tokens of a local block. factor, kernel: of the compression.
        experts: feed-forwards among which the middle layer chooses `active`; 0 for none.

    Raises:
        LongspanError: another letter, or none.
    """

    model_type = "longspan-dmca"
    __no_type_check__ = True

    pattern: str = "LMLML"
    block: int = 256
    factor: int = 3
    kernel: int = 3
    experts: int = 0
    active: int = 2
    position: Spec | None = "sinusoidal-position"

    def __post_init__(self, **kwargs: Any) -> None:
        if not self.pattern or set(self.pattern) - set("LM"):
            raise LongspanError(
                f"pattern is {self.pattern!r}; expected L and M, a letter a layer, as in 'LMLML'."
            )
        kinds: dict[str, Spec] = {
            "L": {"id": "local-block-attention", "block": self.block},
            "M": {
                "id": "memory-compressed-attention",
                "factor": self.factor,
                "kernel": self.kernel,
            },
        }
        self.layers = len(self.pattern)
        self.mixers: Sequence[Spec] = [kinds[letter] for letter in self.pattern]
        super().__post_init__(**kwargs)


class DmcaModel(LongspanModel):
    """The stack, its middle feed-forward a mixture of experts where the config names some."""

    config: DmcaConfig

    def __init__(self, config: DmcaConfig) -> None:
        super().__init__(config)
        if config.experts:
            experts = Experts(
                config.width, experts=config.experts, active=config.active, inner=config.inner
            )
            experts.apply(lambda module: initialise(module, config))
            middle: Any = self.layers[len(self.layers) // 2]
            middle.feed_forward = hub.settled(experts)
        self.post_init()


class DmcaForCausalLM(LongspanForCausalLM):
    """T-DMCA with its next-token head; trained on source and target joined (`joined`).

    >>> model = DmcaForCausalLM(DmcaConfig(pattern="LMLML", experts=128))
    """

    config: DmcaConfig

    def __init__(self, config: DmcaConfig) -> None:
        config = config.alone(causal=True)  # pyright: ignore[reportAssignmentType]
        super(LongspanForCausalLM, self).__init__(config)
        self.model = DmcaModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()


def joined(
    source: Int[Tensor, "B S"], target: Int[Tensor, "B T"], *, separator: int, whole: bool = False
) -> tuple[Tokens, Tokens]:
    """(ids, labels) of source, separator and target as one sequence (Sec. 4.2.1).

    Args:
        whole: labels for the source too; else it is ignored (−100).
    """
    between = torch.full_like(source[:, :1], separator)
    ids = torch.cat([source, between, target], 1)
    labels = ids.clone()
    if not whole:
        labels[:, : source.shape[1] + 1] = IGNORED
    return ids, labels


hub.register(DmcaConfig, {"AutoModel": DmcaModel, "AutoModelForCausalLM": DmcaForCausalLM})
