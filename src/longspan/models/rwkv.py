"""RWKV-4 (Peng et al., 2023): a language model of time mixing and channel mixing only."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longspan import hub
from longspan.errors import LongspanError
from longspan.models.config import LongspanConfig, Spec
from longspan.models.heads import LongspanForCausalLM
from longspan.models.stack import LongspanModel


class RwkvConfig(LongspanConfig):
    """A LongspanConfig whose every layer is a time mixing and a channel mixing.

    Args:
        layers: N; the model has 2 N blocks, each of one mixer.
        inner: of channel mixing, by default 4 E.
    """

    model_type = "longspan-rwkv"
    __no_type_check__ = True

    mixers: Sequence[Spec] = ("rwkv", "rwkv-channel-mix")
    position: Spec | None = None
    tie_word_embeddings: bool = False
    causal: bool | None = True

    def tiled(self) -> list[Spec]:
        """The two mixers of each layer, with the layer's number, which they are initialised by."""
        inner = {} if self.inner is None else {"inner": self.inner}
        return [
            {"id": id_, "layer": layer, "layers": self.layers, **(own if "mix" in id_ else {})}
            for layer in range(self.layers)
            for id_, own in (("rwkv", {}), ("rwkv-channel-mix", inner))
        ]


class NormedEmbedding(nn.Embedding):
    """An embedding with the extra LayerNorm before the first block (Sec. 3.4)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__(tokens, width)
        nn.init.uniform_(self.weight, -1e-4, 1e-4)
        self.norm = nn.LayerNorm(width)

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(super().forward(input))


class RwkvModel(LongspanModel):
    """2 N blocks x ← x + mixer(norm(x)) and a final norm.

    The paper's initialisation (App. E): the projections that write into the residual, the keys of
    time mixing and all receptances start at 0.
    """

    config: RwkvConfig

    def __init__(self, config: LongspanConfig) -> None:
        super().__init__(config)
        self.embed_tokens = hub.settled(NormedEmbedding(config.vocab_size, config.width))
        blocks: Any = list(self.layers)
        for time, channel in zip(blocks[::2], blocks[1::2], strict=True):
            for mixer, names in ((time.mixer, "rk"), (channel.mixer, "rv")):
                for name in names:
                    nn.init.zeros_(mixer.project[name].weight)
            nn.init.zeros_(time.mixer.output.weight)
        self.post_init()

    def _feed_forward(self) -> Any:
        return None


class RwkvForCausalLM(LongspanForCausalLM):
    """RWKV-4 with its next-token head; the state is five vectors a layer.

    >>> model = RwkvForCausalLM(RwkvConfig(width=768, layers=12, vocab_size=50277))
    """

    config: RwkvConfig
    _tied_weights_keys = {}  # noqa: RUF012

    def __init__(self, config: RwkvConfig) -> None:
        config = config.alone(causal=True)  # pyright: ignore[reportAssignmentType]
        super(LongspanForCausalLM, self).__init__(config)
        self.model = RwkvModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        gain = 0.5 * max(1.0, config.vocab_size / config.width) ** 0.5
        nn.init.orthogonal_(self.lm_head.weight, gain=gain)
        hub.settled(self.lm_head)
        self.post_init()


# Published names (BlinkDL/RWKV-LM) and ours; those of transformers differ by `_SPELLINGS`.
_NAMES = {
    "emb.weight": "model.embed_tokens.weight",
    "blocks.0.ln0": "model.embed_tokens.norm",
    "ln_out": "model.norm",
    "head.weight": "lm_head.weight",
}
_PARTS = {
    "ln1": (0, "mixer_norm"),
    "ln2": (1, "mixer_norm"),
    "att.time_decay": (0, "mixer.log_decay"),
    "att.time_first": (0, "mixer.bonus"),
    "att.time_mix_": (0, "mixer.mix."),
    "att.output": (0, "mixer.output"),
    "att.receptance": (0, "mixer.project.r"),
    "att.key": (0, "mixer.project.k"),
    "att.value": (0, "mixer.project.v"),
    "ffn.time_mix_": (1, "mixer.mix."),
    "ffn.receptance": (1, "mixer.project.r"),
    "ffn.key": (1, "mixer.project.k"),
    "ffn.value": (1, "mixer.project.v"),
}
_SPELLINGS = {
    "rwkv.": "",
    "embeddings.": "emb.",
    ".pre_ln.": ".ln0.",
    ".attention.": ".att.",
    ".feed_forward.": ".ffn.",
    "time_mix_key": "time_mix_k",
    "time_mix_value": "time_mix_v",
    "time_mix_receptance": "time_mix_r",
}


def from_published(weights: Mapping[str, Tensor]) -> RwkvForCausalLM:
    """An RWKV-4 with published weights, under BlinkDL's names or those of transformers.

    Raises:
        LongspanError: a name that no RWKV-4 has, or one that is missing.

    >>> model = from_published(safetensors.torch.load_file("rwkv-4-169m.safetensors"))
    """
    ours: dict[str, Tensor] = {}
    for name, weight in weights.items():
        ours[_renamed(name)] = weight.squeeze()
    needed = {"model.embed_tokens.weight", "model.layers.1.mixer.project.k.weight"}
    if missing := needed - set(ours):
        raise LongspanError(f"these are no RWKV-4 weights: they lack {', '.join(sorted(missing))}.")
    vocabulary, width = ours["model.embed_tokens.weight"].shape
    config = RwkvConfig(
        vocab_size=vocabulary,
        width=width,
        layers=sum(n.endswith("mixer.log_decay") for n in ours),
        inner=len(ours["model.layers.1.mixer.project.k.weight"]),
    )
    with torch.random.fork_rng():
        model = RwkvForCausalLM(config)
    missing = set(model.state_dict()) - set(ours)
    if missing or len(ours) != len(model.state_dict()):
        raise LongspanError(
            f"these are no complete RWKV-4 weights: missing {sorted(missing)}, unknown "
            f"{sorted(set(ours) - set(model.state_dict()))}."
        )
    model.load_state_dict(ours)
    return model.eval()


def _renamed(name: str) -> str:
    plain = name
    for theirs, published in _SPELLINGS.items():
        plain = plain.replace(theirs, published)
    for published, own in _NAMES.items():
        if plain.startswith(published):
            return own + plain[len(published) :]
    _, _, rest = plain.partition("blocks.")
    layer, _, part = rest.partition(".")
    for published, (which, own) in _PARTS.items():
        if layer.isdigit() and part.startswith(published):
            return f"model.layers.{2 * int(layer) + which}.{own}{part[len(published) :]}"
    raise LongspanError(
        f"RWKV-4 has no weight '{name}': give the state dict of an RWKV-4, under BlinkDL's or "
        "transformers' names."
    )


hub.register(RwkvConfig, {"AutoModel": RwkvModel, "AutoModelForCausalLM": RwkvForCausalLM})
