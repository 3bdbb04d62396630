"""Models of the Hugging Face ecosystem, tiled from any list of mechanisms."""

from longspan import hub
from longspan.models import (  # each registers its config and models with transformers' Auto classes
    block_recurrent,
    dmca,
    early_exit,
    equilibrium,
    feedback,
    flash,
    funnel,
    hourglass,
    latents,
    longt5,
    memory_transformer,
    spalm,
    sru,
    universal,
    xlnet,
)
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
