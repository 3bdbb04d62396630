"""Perceiver AR as a language model (Hawthorne et al., 2022)."""

from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.generation.utils import GenerationMixin

from longspan import hub, registry
from longspan.errors import LongspanError
from longspan.models.losses import IGNORED, CausalLMOutput, cross_entropy, shifted
from longspan.models.stack import padding
from longspan.shapes import Tokens


class PerceiverARConfig(PreTrainedConfig):
    """A decoder of long contexts; see `perceiver-ar`.

    Args:
        position: added to the inputs beside the rotary one; learned ones are of `length` places.
    """

    model_type = "longspan-perceiver-ar"
    __no_type_check__ = True

    vocab_size: int = 256
    width: int = 1024
    heads: int = 16
    layers: int = 36
    latents: int = 1024
    refill: int | None = None
    inner: int | None = None
    rotated: float = 0.25
    base: float = 8192.0
    spacing: Literal["paper", "inclusive"] = "inclusive"
    position: Literal["sinusoidal-position", "learned-position"] | None = None
    length: int = 8192
    prefix_dropout: float = 0.5
    chunk: int | None = None
    dropout: float = 0.0


class PerceiverARForCausalLM(hub.Pretrained, GenerationMixin):
    """Next tokens after each of the last m kept tokens of a row; at first all are equally likely.

    >>> model = PerceiverARForCausalLM(PerceiverARConfig(width=512, heads=8, layers=8))
    """

    config: PerceiverARConfig
    config_class = PerceiverARConfig
    supports_gradient_checkpointing = False

    def __init__(self, config: PerceiverARConfig) -> None:
        super().__init__(config)
        width = config.width
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.position = None
        if config.position == "learned-position":
            self.position = registry.build(config.position, width=width, length=config.length)
        elif config.position == "sinusoidal-position":
            self.position = registry.build(config.position)
        elif config.position is not None:
            raise LongspanError(
                f"position is {config.position!r}; expected sinusoidal-position, learned-position "
                "or None."
            )
        self.model = registry.build(
            "perceiver-ar",
            width=width,
            heads=config.heads,
            layers=config.layers,
            latents=config.latents,
            refill=config.refill,
            inner=config.inner,
            rotated=config.rotated,
            base=config.base,
            spacing=config.spacing,
            prefix_dropout=config.prefix_dropout,
            chunk=config.chunk,
            dropout=config.dropout,
        )
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        nn.init.zeros_(self.lm_head.weight)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the constructor has initialised everything."""

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tokens | None = None,
        latents: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput:
        """Logits of the last latents, B n vocabulary, the state, and the loss of these positions.

        Rows are moved so that their kept tokens come last: the last logits of every row follow its
        last kept token, whichever side is padded.

        Args:
            labels: B L, as the inputs: the model shifts them; −100 and padding are ignored.
            latents: n, at most m; after a state, how many a new stride begins with.

        Raises:
            LongspanError: a number of latents that the model does not have.
        """
        keep = padding(attention_mask, input_ids.shape[1])
        if keep is not None:
            order = keep.long().argsort(dim=1, stable=True)
            input_ids, keep = input_ids.gather(1, order), keep.gather(1, order)
            labels = None if labels is None else labels.gather(1, order)
        labels = None if labels is None else shifted(labels)
        if labels is not None and keep is not None:
            labels = labels.masked_fill(~keep, IGNORED)
        cache = hub.cache_of(past_key_values, len(input_ids))
        x = self.embed_tokens(input_ids)
        seen = cache.seen
        seen = x.new_zeros(len(x), dtype=torch.long) if seen is None else seen
        if self.position is not None:
            here = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
            here = here if keep is None else (keep.cumsum(1) - 1).clamp(min=0)
            x = self.position.embed(x, seen[:, None] + here)
        z, state = self.model(x, cache.states, keep=keep, latents=latents)
        logits = self.lm_head(self.norm(z))
        loss = None
        if labels is not None:
            loss = cross_entropy(logits, labels[:, -logits.shape[1] :], num_items_in_batch)
        if use_cache or past_key_values is not None:
            new = x.shape[1] if keep is None else keep.sum(1)
            cache.update_states(state, seen + new, x.shape[1])
        else:
            cache = None
        return CausalLMOutput(loss=loss, logits=logits, past_key_values=cache)


def random_crop(
    tokens: Int[Tensor, "B S"], *, latents: int, generator: torch.Generator | None = None
) -> Int[Tensor, "B _"]:
    """A piece of the sequences with any number of tokens before its last `latents`.

    Trained on the like, a model knows short contexts as well as long ones.

    Raises:
        LongspanError: sequences shorter than the latents.
    """
    length = tokens.shape[1]
    if length < latents:
        raise LongspanError(
            f"sequences of {length} tokens hold no {latents} latents: give longer ones."
        )
    size = int(torch.randint(latents, length + 1, (), generator=generator))
    start = int(torch.randint(0, length - size + 1, (), generator=generator))
    return tokens[:, start : start + size]


hub.register(PerceiverARConfig, {"AutoModelForCausalLM": PerceiverARForCausalLM})
