"""FLASH (Hua et al., 2022): language models of gated attention units only."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan import hub
from longspan.models.config import LongspanConfig, Spec
from longspan.models.heads import LongspanForCausalLM, LongspanForMaskedLM
from longspan.models.stack import LongspanModel
from longspan.nn import Position
from longspan.nn.positions import at_least_float32, sinusoid


class FlashConfig(LongspanConfig):
    """A LongspanConfig whose every layer is one gated attention unit; two are a Transformer layer.

    Of FLASH-Quad, `mixers=[{"id": "flash-gau", "form": "quadratic"}]`. `position` rotates.
    """

    model_type = "longspan-flash"
    __no_type_check__ = True

    mixers: Sequence[Spec] = ("flash-gau",)


class ScaledSinusoid(Position):
    """x + g PE(i), the sines, then the cosines, with one learned g."""

    acts = frozenset({"embed"})

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(width**-0.5))

    def embed(self, x: Float[Tensor, "B L E"], pos: Int[Tensor, "B L"]) -> Float[Tensor, "B L E"]:
        table = sinusoid(pos, x.shape[-1], layout="concatenated", dtype=at_least_float32(x))
        return x + self.gain * table.to(x.dtype)


class FlashModel(LongspanModel):
    """x + g PE, blocks x ← x + unit(norm(x)), and a final norm."""

    config: FlashConfig

    def __init__(self, config: LongspanConfig) -> None:
        super().__init__(config)
        self.position = hub.settled(ScaledSinusoid(config.width))
        self.post_init()

    def _feed_forward(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None


class FlashForCausalLM(LongspanForCausalLM):
    """FLASH with its next-token head.

    >>> model = FlashForCausalLM(FlashConfig(width=768, layers=24, vocab_size=32000))
    """

    config: FlashConfig

    def __init__(self, config: FlashConfig) -> None:
        super().__init__(config)
        self.model = FlashModel(self.config)
        self.post_init()


class FlashForMaskedLM(LongspanForMaskedLM):
    """FLASH with a masked-token head."""

    config: FlashConfig

    def __init__(self, config: FlashConfig) -> None:
        super().__init__(config)
        self.model = FlashModel(self.config)
        self.post_init()


hub.register(
    FlashConfig,
    {
        "AutoModel": FlashModel,
        "AutoModelForCausalLM": FlashForCausalLM,
        "AutoModelForMaskedLM": FlashForMaskedLM,
    },
)
