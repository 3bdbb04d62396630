"""BP-Transformer models (Ye et al., 2019): language model, root classifier, encoder–decoder."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    Seq2SeqLMOutput,
    SequenceClassifierOutput,
)

from longspan import hub, registry
from longspan.errors import LongspanError
from longspan.models.losses import cross_entropy, shifted
from longspan.models.stack import padding
from longspan.shapes import Tokens


class TreeConfig(PreTrainedConfig):
    """Layers over the nodes of a binary tree; places are told by the kinds of its edges alone.

    Args:
        near: k, nodes a level to either side. encoder_layers: by default as many as `layers`.
    """

    model_type = "longspan-tree"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - as transformers reads it
    __no_type_check__ = True

    vocab_size: int = 256
    width: int = 256
    layers: int = 4
    heads: int = 8
    near: int = 4
    inner: int | None = None
    dropout: float = 0.0
    encoder_layers: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    decoder_start_token_id: int | None = None


class _Pretrained(hub.Pretrained):
    config: TreeConfig
    config_class = TreeConfig

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the constructor has initialised everything."""

    def _embedding(self) -> nn.Embedding:
        embedding = nn.Embedding(self.config.vocab_size, self.config.width)
        nn.init.normal_(embedding.weight, std=self.config.width**-0.5)
        return embedding

    def _trunk(self, *, causal: bool, layers: int | None = None, cross: bool = False) -> Any:
        config = self.config
        return registry.build(
            "bp-transformer",
            width=config.width,
            heads=config.heads,
            causal=causal,
            near=config.near,
            layers=layers or config.layers,
            inner=config.inner,
            dropout=config.dropout,
            cross=cross,
        )


class TreeForCausalLM(_Pretrained, GenerationMixin):
    """The causal tree under a next-token head; the state grows by a span where one is full."""

    def __init__(self, config: TreeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = self._embedding()
        self.trunk = self._trunk(causal=True)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tokens | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits, the loss where labels (the inputs themselves) are given, and the state."""
        batch, length = input_ids.shape
        keep = padding(attention_mask, length)
        carries = past_key_values is not None or use_cache
        cache = hub.cache_of(past_key_values, batch) if carries else None
        held = None if cache is None else cache.states
        x, state = self.trunk(self.embed_tokens(input_ids), held, keep=keep)
        if cache is not None:
            cache.update_states(state, state.tokens, length)
        logits = self.lm_head(x)
        loss = None if labels is None else cross_entropy(logits, shifted(labels))
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # pyright: ignore


class TreeForSequenceClassification(_Pretrained):
    """A class from the root, the span of all tokens."""

    def __init__(self, config: TreeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = self._embedding()
        self.trunk = self._trunk(causal=False)
        self.score = nn.Linear(config.width, config.num_labels or 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tokens,
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "B"] | None = None,
    ) -> SequenceClassifierOutput:
        """Logits B × labels, and the cross-entropy where labels are given.

        Raises:
            LongspanError: a row without tokens.
        """
        keep = padding(attention_mask, input_ids.shape[1])
        _, nodes, _ = self.trunk.nodes(self.embed_tokens(input_ids), keep=keep)
        if 0 in nodes.tokens:
            raise LongspanError("a row without tokens has no root: leave it out of the batch.")
        ends = torch.tensor([self.trunk.tree(n).nodes for n in nodes.tokens]).cumsum(0) - 1
        logits = self.score(nodes.x[ends.to(nodes.x.device)])
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # pyright: ignore


class TreeForSeq2SeqLM(_Pretrained):
    """Decoder tokens attend to the source's tree, fine around their own place and coarse far."""

    def __init__(self, config: TreeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = self._embedding()
        self.encoder = self._trunk(causal=False, layers=config.encoder_layers)
        self.decoder = self._trunk(causal=True, cross=True)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def _source(self, input_ids: Tokens, attention_mask: Tensor | None) -> Any:
        keep = padding(attention_mask, input_ids.shape[1])
        _, nodes, _ = self.encoder.nodes(self.embed_tokens(input_ids), keep=keep)
        if 0 in nodes.tokens:
            raise LongspanError("a source row is without tokens: leave it out of the batch.")
        return nodes

    def _start(self) -> int:
        if self.config.decoder_start_token_id is None:
            raise LongspanError("the decoder has no first token: set decoder_start_token_id.")
        return self.config.decoder_start_token_id

    def forward(
        self,
        input_ids: Tokens,
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        decoder_input_ids: Int[Tensor, "B T"] | None = None,
    ) -> Seq2SeqLMOutput:
        """Logits of the targets; the decoder's input is by default the labels, one place later."""
        if decoder_input_ids is None:
            if labels is None:
                raise LongspanError("the decoder has no input: give decoder_input_ids or labels.")
            decoder_input_ids = F.pad(labels.clamp(min=0), (1, -1), value=self._start())
        source = self._source(input_ids, attention_mask)
        y, _, _ = self.decoder.nodes(self.embed_tokens(decoder_input_ids), source=source)
        logits = self.lm_head(y)
        loss = None if labels is None else cross_entropy(logits, labels)
        return Seq2SeqLMOutput(loss=loss, logits=logits)  # pyright: ignore

    @torch.no_grad()
    def translate(
        self, input_ids: Tokens, attention_mask: Tensor | None = None, *, most: int = 64
    ) -> Int[Tensor, "B T"]:
        """The likeliest next token, `most` times or until all rows have ended, step by step."""
        source = self._source(input_ids, attention_mask)
        token = torch.full_like(input_ids[:, :1], self._start())
        ended, state, drawn = torch.zeros_like(token, dtype=torch.bool), None, []
        for _ in range(most):
            y, _, state = self.decoder.nodes(self.embed_tokens(token), state, source=source)
            token = self.lm_head(y).argmax(-1).masked_fill(ended, self.config.pad_token_id or 0)
            drawn.append(token)
            if self.config.eos_token_id is not None:
                ended = ended | (token == self.config.eos_token_id)
            if bool(ended.all()):
                break
        return torch.cat(drawn, 1)


hub.register(
    TreeConfig,
    {
        "AutoModelForCausalLM": TreeForCausalLM,
        "AutoModelForSequenceClassification": TreeForSequenceClassification,
        "AutoModelForSeq2SeqLM": TreeForSeq2SeqLM,
    },
)
