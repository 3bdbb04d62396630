"""LongspanConfig: everything a model is, as JSON."""

import copy
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any, Literal

from transformers import PreTrainedConfig

from longspan import registry
from longspan.errors import LongspanError, nearest
from longspan.nn.blocks import ACTIVATIONS, NORMS

Spec = str | dict[str, Any]

MIXING = ("attention", "mixer", "memory")

# What cannot stand in `memory` or `depth`, and what to use in its place.
ELSEWHERE = {
    "block-recurrent-transformer": "longspan.models.BlockRecurrentForCausalLM",
    "calm": "longspan.models.EarlyExitForCausalLM",
    "deq": "longspan.models.EquilibriumForCausalLM",
    "depth-adaptive-transformer": "longspan.models.EarlyExitForCausalLM",
    "feedback-transformer": "longspan.models.FeedbackForCausalLM",
    "hippo": 'mixers=["hippo"], as it remembers in place of attention',
    "memory-transformer": "longspan.models.MemoryForSeq2SeqLM",
    "sru-plus-plus": "longspan.models.SruForCausalLM",
    "token-turing-machine": "longspan.models.TokenTuringModel",
    "universal-transformer": "longspan.models.UniversalForCausalLM",
}


class LongspanConfig(PreTrainedConfig):
    """A model as a list of mechanisms tiled over its layers, and what stands around them.

    Args:
        inner: width of the feed-forwards, by default 4 E.
        mixers: ids, or dicts of an id and its options, `{"id": "longformer", "window": 256}`.
        encoder_mixers, encoder_layers: of the encoder of a sequence-to-sequence model, by default
            those of the decoder.
        position: a mechanism of kind position, likewise; None for none.
        residual: a mechanism of kind residual, likewise, in place of each sum x + y; None for that.
        memory: what every layer keeps of earlier segments: a number of its inputs, which a causal
            mixer takes as context; or a mechanism of kind memory, with its own attention and
            positions where the mixer is `multi-head-attention`, and around another one where it
            takes that (`infinite-former`). Layers that differ name theirs among `mixers`.
        depth: a mechanism of kind depth, which says how many layers each position goes through.
        axes: sizes of a grid that the tokens fill row by row: each axis gets a learned table, and
            their sum is added to the embeddings, beside a position that rotates or biases.
        length: for the mechanisms and positions that are built for one.
        sharing: lengths of runs of layers, whose sum is `layers`; the layers of a run mix by the
            attention weights of its first (LazyFormer). For `multi-head-attention` alone, and not
            in an encoder with layers or mixers of its own.
        attention_dropout: of attention weights; `dropout` is of embeddings and residuals.
        initialisation: `normal` has one deviation, initializer_range; `scaled` has
            0.125 / √(fan in), and logits that start at 0, so untied (Child et al., 2019, Sec. 6).
        causal: None leaves it to the class of the model; a classifier reads it.
        pooling: of a classifier; by default `last` where causal, else `mean`.
        allow_leaks: let a language model use a mechanism whose causal form can see the future.

    Raises:
        LongspanError: an unknown mechanism, option, norm, activation, initialisation or pooling;
            runs that do not fit the layers; zero logits that are tied; a memory or depth that is a
            model of its own, or in the config of one.

    >>> LongspanConfig(layers=6, mixers=["linear-transformer", {"id": "longformer", "window": 64}])
    """

    model_type = "longspan"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - as transformers reads it
    attribute_map = {  # noqa: RUF012
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "intermediate_size": "inner",
        "max_position_embeddings": "length",
    }

    # transformers takes further names than the fields, which jaxtyping's hook would refuse.
    __no_type_check__ = True

    vocab_size: int = 256
    width: int = 256
    layers: int = 4
    heads: int = 4
    head_width: int | None = None
    kv_heads: int | None = None
    inner: int | None = None
    mixers: Sequence[Spec] = ("multi-head-attention",)
    encoder_mixers: Sequence[Spec] | None = None
    encoder_layers: int | None = None
    position: Spec | None = "rope"
    residual: Spec | None = None
    memory: Spec | int | None = None
    depth: Spec | None = None
    norm: Literal["layer", "rms"] = "layer"
    norm_order: Literal["pre", "post"] = "pre"
    activation: Literal["relu", "gelu", "silu"] = "gelu"
    gated: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    sharing: Sequence[int] | None = None
    axes: Sequence[int] | None = None
    tie_word_embeddings: bool = True
    length: int = 2048
    initialisation: Literal["normal", "scaled"] = "normal"
    initializer_range: float = 0.02
    causal: bool | None = None
    pooling: Literal["mean", "first", "last"] | None = None
    allow_leaks: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.mixers = _specs("mixers", self.mixers, MIXING)
        if self.encoder_mixers is not None:
            self.encoder_mixers = _specs("encoder_mixers", self.encoder_mixers, MIXING)
        if self.position is not None:
            (self.position,) = _specs("position", [self.position], ("position",))
        if self.residual is not None:
            (self.residual,) = _specs("residual", [self.residual], ("residual",))
        self._check_wrapping()
        for name, known in (
            ("norm", NORMS),
            ("norm_order", ("pre", "post")),
            ("activation", ACTIVATIONS),
            ("initialisation", ("normal", "scaled")),
            ("pooling", ("mean", "first", "last", None)),
        ):
            if getattr(self, name) not in known:
                raise LongspanError(
                    f"{name} is {getattr(self, name)!r}; expected "
                    f"{', '.join(str(k) for k in known)}."
                )
        if self.initialisation == "scaled" and self.tie_word_embeddings:
            raise LongspanError(
                "initialisation='scaled' starts the logits at 0, which tied embeddings cannot: "
                "give tie_word_embeddings=False."
            )
        if self.sharing is not None:
            self._check_sharing(self.sharing)
        super().__post_init__(**kwargs)

    def _check_wrapping(self) -> None:
        if type(self) is not LongspanConfig:
            for name in ("memory", "depth"):
                own = any(name in vars(c).get("__annotations__", ()) for c in _below(type(self)))
                if not own and getattr(self, name) is not None:
                    raise LongspanError(
                        f"{name} is of the models of LongspanConfig, and {type(self).__name__} "
                        f"arranges its layers itself: leave {name} out."
                    )
            return
        if isinstance(self.memory, int) and (isinstance(self.memory, bool) or self.memory < 0):
            raise LongspanError(f"memory is {self.memory}; expected 0 or more inputs, or an id.")
        if self.memory is not None and not isinstance(self.memory, int):
            (self.memory,) = _specs("memory", [self.memory], ("memory",))
            if self.position == "rope":  # the default, of attention that the memory replaces
                self.position = None
        if self.depth is not None:
            (self.depth,) = _specs("depth", [self.depth], ("depth",))

    @property
    def wrapping(self) -> tuple[Spec | int | None, Spec | None]:
        """(memory, depth) of a stack; a config of another model may have fields of these names."""
        return (self.memory, self.depth) if type(self) is LongspanConfig else (None, None)

    def _check_sharing(self, runs: Sequence[int]) -> None:
        if sum(runs) != self.layers or min(runs, default=0) < 1:
            raise LongspanError(
                f"sharing={list(runs)} does not make {self.layers} layers: give lengths of runs, "
                "at least 1 each, whose sum is the number of layers."
            )
        if ids := sorted({split(spec)[0] for spec in self.mixers} - {"multi-head-attention"}):
            raise LongspanError(
                f"{', '.join(ids)} cannot share attention weights with later layers: sharing is "
                "for mixers=['multi-head-attention']."
            )

    def tiled(self) -> list[Spec]:
        """The mechanism of each layer: `mixers`, over and over, or a run for each of `sharing`."""
        if self.sharing is not None:
            lazy = [n > 0 for run in self.sharing for n in range(run)]
            return [{"id": "lazyformer", "lazy": later} for later in lazy]
        return list(islice(cycle(self.mixers), self.layers))

    def alone(self, *, causal: bool) -> "LongspanConfig":
        """A copy for a model of one stack that is causal or not.

        Raises:
            LongspanError: this config says otherwise.
        """
        if self.causal not in (None, causal):
            have, want = ("causal", "bidirectional")[:: 1 if self.causal else -1]
            raise LongspanError(
                f"this config is of a {have} model (causal={self.causal}) and the model asked for "
                f"is {want}: give causal={causal}, if its mechanisms have that form."
            )
        config = copy.deepcopy(self)
        config.causal = causal
        return config

    def side(self, which: Literal["encoder", "decoder"]) -> "LongspanConfig":
        """The config of one stack of a sequence-to-sequence model."""
        config = copy.deepcopy(self)
        config.is_encoder_decoder = False
        config.causal = which == "decoder"
        if which == "encoder":
            if config.wrapping[0] is not None:
                config.memory = None
            if self.encoder_mixers or self.encoder_layers not in (None, self.layers):
                config.sharing = None
            config.mixers = self.encoder_mixers or self.mixers
            config.layers = self.layers if self.encoder_layers is None else self.encoder_layers
        config.encoder_mixers = config.encoder_layers = None
        return config


def _below(kind: type) -> list[type]:
    """A config's class and its bases, as far as LongspanConfig."""
    return list(kind.__mro__[: kind.__mro__.index(LongspanConfig)])


def split(spec: Spec) -> tuple[str, dict[str, Any]]:
    """(id, options) of a mechanism as a config names it."""
    if isinstance(spec, str):
        return spec, {}
    options = dict(spec)
    return options.pop("id"), options


def _specs(field: str, given: Any, kinds: tuple[str, ...]) -> list[Spec]:
    if isinstance(given, str | Mapping):
        given = [given]
    if not given:
        raise LongspanError(f"{field} is empty; expected at least one mechanism.")
    for spec in given:
        if isinstance(spec, Mapping) and not isinstance(spec.get("id"), str):
            raise LongspanError(
                f"{field} holds {spec!r}; expected an id, or a dict of an id and its options, "
                'as in {"id": "longformer", "window": 256}.'
            )
        id_, options = (spec, {}) if isinstance(spec, str) else split(dict(spec))
        card = registry.show(id_)
        if field in ("memory", "depth") and id_ in ELSEWHERE:
            raise LongspanError(f"'{id_}' cannot stand in {field}: use {ELSEWHERE[id_]}.")
        if card.kind not in kinds:
            raise LongspanError(
                f"'{id_}' is of kind {card.kind} and cannot stand in {field}, which takes "
                f"{', '.join(kinds)}."
            )
        known = registry.options(id_)
        for name in options:
            if name not in known:
                raise LongspanError(
                    f"'{id_}' has no argument '{name}'{nearest(name, known)} "
                    f"It takes: {', '.join(known) or 'none'}."
                )
    return [spec if isinstance(spec, str) else dict(spec) for spec in given]
