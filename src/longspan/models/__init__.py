"""Models of the Hugging Face ecosystem, tiled from any list of mechanisms."""

from importlib import import_module

from longspan import hub
from longspan.models.config import LongspanConfig
from longspan.models.heads import (
    LongspanForCausalLM,
    LongspanForMaskedLM,
    LongspanForSequenceClassification,
)
from longspan.models.rwkv import RwkvConfig, RwkvForCausalLM, RwkvModel
from longspan.models.seq2seq import LongspanForSeq2SeqLM
from longspan.models.stack import LongspanModel, mixer

__all__ = [
    "LongspanConfig",
    "LongspanForCausalLM",
    "LongspanForMaskedLM",
    "LongspanForSeq2SeqLM",
    "LongspanForSequenceClassification",
    "LongspanModel",
    "RwkvConfig",
    "RwkvForCausalLM",
    "RwkvModel",
    "mixer",
]

hub.register(
    LongspanConfig,
    {
        "AutoModel": LongspanModel,
        "AutoModelForCausalLM": LongspanForCausalLM,
        "AutoModelForMaskedLM": LongspanForMaskedLM,
        "AutoModelForSeq2SeqLM": LongspanForSeq2SeqLM,
        "AutoModelForSequenceClassification": LongspanForSequenceClassification,
    },
)

# Each registers its own config and models.
for _name in (
    "block_recurrent",
    "dmca",
    "early_exit",
    "equilibrium",
    "feedback",
    "flash",
    "funnel",
    "hourglass",
    "latents",
    "longt5",
    "memory_transformer",
    "spalm",
    "sru",
    "universal",
    "xlnet",
):
    import_module(f"{__name__}.{_name}")
