"""Models of the Hugging Face ecosystem, tiled from any list of mechanisms."""

from longspan import hub
from longspan.models.axial import AxialConfig, AxialTransformer
from longspan.models.block_recurrent import (
    BlockRecurrentConfig,
    BlockRecurrentForCausalLM,
    BlockRecurrentModel,
)
from longspan.models.building import mixer
from longspan.models.config import LongspanConfig
from longspan.models.dmca import DmcaConfig, DmcaForCausalLM, DmcaModel
from longspan.models.early_exit import EarlyExitConfig, EarlyExitForCausalLM, EarlyExitForSeq2SeqLM
from longspan.models.equilibrium import EquilibriumConfig, EquilibriumForCausalLM, EquilibriumModel
from longspan.models.feedback import FeedbackConfig, FeedbackForCausalLM
from longspan.models.flash import FlashConfig, FlashForCausalLM, FlashForMaskedLM, FlashModel
from longspan.models.forecast import ForecastConfig, ForecastModel
from longspan.models.funnel import (
    FunnelConfig,
    FunnelForMaskedLM,
    FunnelForSequenceClassification,
    FunnelModel,
)
from longspan.models.heads import (
    LongspanForCausalLM,
    LongspanForMaskedLM,
    LongspanForSequenceClassification,
)
from longspan.models.hourglass import HourglassConfig, HourglassForCausalLM, HourglassModel
from longspan.models.image import ImageConfig, ImageTransformerModel
from longspan.models.informer import InformerConfig, InformerForForecasting
from longspan.models.latents import SetTransformerConfig, SetTransformerModel
from longspan.models.longt5 import LongT5Config, LongT5ForSeq2SeqLM, LongT5Stack
from longspan.models.luna import (
    LunaConfig,
    LunaForSeq2SeqLM,
    LunaForSequenceClassification,
    LunaModel,
)
from longspan.models.memory_transformer import (
    MemoryConfig,
    MemoryForMaskedLM,
    MemoryForSeq2SeqLM,
    MemoryModel,
)
from longspan.models.neighborhood import (
    NeighborhoodBackbone,
    NeighborhoodConfig,
    NeighborhoodForImageClassification,
    NeighborhoodModel,
)
from longspan.models.perceiver import (
    PerceiverBytesConfig,
    PerceiverConfig,
    PerceiverForClassification,
    PerceiverForMaskedLM,
    PerceiverIOConfig,
    PerceiverIOModel,
)
from longspan.models.perceiver_ar import PerceiverARConfig, PerceiverARForCausalLM
from longspan.models.policy import (
    ActorCriticLoss,
    PolicyConfig,
    PolicyModel,
    PolicyOutput,
    actor_critic_loss,
    vtrace,
)
from longspan.models.rwkv import RwkvConfig, RwkvForCausalLM, RwkvModel
from longspan.models.seq2seq import LongspanForSeq2SeqLM
from longspan.models.signals import SignalClassifier, SignalConfig, SignalModel
from longspan.models.spalm import SpalmConfig, SpalmForCausalLM
from longspan.models.sru import SruConfig, SruForCausalLM
from longspan.models.stack import LongspanModel
from longspan.models.token_turing import TokenTuringConfig, TokenTuringModel
from longspan.models.tree import (
    TreeConfig,
    TreeForCausalLM,
    TreeForSeq2SeqLM,
    TreeForSequenceClassification,
)
from longspan.models.universal import (
    UniversalConfig,
    UniversalForCausalLM,
    UniversalForMaskedLM,
    UniversalForSeq2SeqLM,
    UniversalForSequenceClassification,
    UniversalModel,
)
from longspan.models.xlnet import XlnetConfig, XlnetForLanguageModeling, XlnetModel

__all__ = [
    "ActorCriticLoss",
    "AxialConfig",
    "AxialTransformer",
    "BlockRecurrentConfig",
    "BlockRecurrentForCausalLM",
    "BlockRecurrentModel",
    "DmcaConfig",
    "DmcaForCausalLM",
    "DmcaModel",
    "EarlyExitConfig",
    "EarlyExitForCausalLM",
    "EarlyExitForSeq2SeqLM",
    "EquilibriumConfig",
    "EquilibriumForCausalLM",
    "EquilibriumModel",
    "FeedbackConfig",
    "FeedbackForCausalLM",
    "FlashConfig",
    "FlashForCausalLM",
    "FlashForMaskedLM",
    "FlashModel",
    "ForecastConfig",
    "ForecastModel",
    "FunnelConfig",
    "FunnelForMaskedLM",
    "FunnelForSequenceClassification",
    "FunnelModel",
    "HourglassConfig",
    "HourglassForCausalLM",
    "HourglassModel",
    "ImageConfig",
    "ImageTransformerModel",
    "InformerConfig",
    "InformerForForecasting",
    "LongT5Config",
    "LongT5ForSeq2SeqLM",
    "LongT5Stack",
    "LongspanConfig",
    "LongspanForCausalLM",
    "LongspanForMaskedLM",
    "LongspanForSeq2SeqLM",
    "LongspanForSequenceClassification",
    "LongspanModel",
    "LunaConfig",
    "LunaForSeq2SeqLM",
    "LunaForSequenceClassification",
    "LunaModel",
    "MemoryConfig",
    "MemoryForMaskedLM",
    "MemoryForSeq2SeqLM",
    "MemoryModel",
    "NeighborhoodBackbone",
    "NeighborhoodConfig",
    "NeighborhoodForImageClassification",
    "NeighborhoodModel",
    "PerceiverARConfig",
    "PerceiverARForCausalLM",
    "PerceiverBytesConfig",
    "PerceiverConfig",
    "PerceiverForClassification",
    "PerceiverForMaskedLM",
    "PerceiverIOConfig",
    "PerceiverIOModel",
    "PolicyConfig",
    "PolicyModel",
    "PolicyOutput",
    "RwkvConfig",
    "RwkvForCausalLM",
    "RwkvModel",
    "SetTransformerConfig",
    "SetTransformerModel",
    "SignalClassifier",
    "SignalConfig",
    "SignalModel",
    "SpalmConfig",
    "SpalmForCausalLM",
    "SruConfig",
    "SruForCausalLM",
    "TokenTuringConfig",
    "TokenTuringModel",
    "TreeConfig",
    "TreeForCausalLM",
    "TreeForSeq2SeqLM",
    "TreeForSequenceClassification",
    "UniversalConfig",
    "UniversalForCausalLM",
    "UniversalForMaskedLM",
    "UniversalForSeq2SeqLM",
    "UniversalForSequenceClassification",
    "UniversalModel",
    "XlnetConfig",
    "XlnetForLanguageModeling",
    "XlnetModel",
    "actor_critic_loss",
    "mixer",
    "vtrace",
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
