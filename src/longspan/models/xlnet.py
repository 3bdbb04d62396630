"""XLNet (Yang et al., 2019): a model of all orders, an encoder, or a plain causal model."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Generator, Tensor, nn
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from longspan import hub, registry
from longspan.engines import segment
from longspan.errors import LongspanError
from longspan.models.config import LongspanConfig, Spec
from longspan.models.losses import CausalLMOutput, cross_entropy, shifted
from longspan.models.stack import initialise
from longspan.nn import FeedForward
from longspan.shapes import Inputs, Tokens


class XlnetConfig(LongspanConfig):
    """A LongspanConfig for XLNet: post-norm, gelu, no absolute positions.

    Args:
        attention: `bi`, all tokens see each other but for what perm_mask hides; `uni`, causal.
        memory: vectors that each layer keeps of earlier segments.
        clamp_len: distances beyond it count as it.
        bi_data: the second half of a batch runs backwards in the order of the data.
    """

    model_type = "longspan-xlnet"
    __no_type_check__ = True

    attention: Literal["bi", "uni"] = "bi"
    memory: int = 0
    clamp_len: int | None = None
    bi_data: bool = False
    position: Spec | None = None
    norm_order: Literal["pre", "post"] = "post"


class Permutation(NamedTuple):
    """Who may not see whom (True hides), and the places to predict, first in the order first."""

    perm_mask: Bool[Tensor, "B L L"]
    targets: Int[Tensor, "B T"]


def hidden(rank: Int[Tensor, "B L"]) -> Bool[Tensor, "B L L"]:
    """perm_mask of an order: i sees j where rank_j < rank_i; ranks of −1 see each other."""
    mine, theirs = rank[:, :, None], rank[:, None]
    return (theirs > mine) | ((theirs == mine) & (mine >= 0))


def permutation(
    functional: Bool[Tensor, "B L"], *, targets: int, span: int = 5, generator: Generator
) -> Permutation:
    """Spans of 1 … `span` tokens, `targets` in all, last in a random order; the rest sees itself.

    Context comes first in the order, as one: no token of it sees a target (partial prediction,
    Sec. 2.3). Functional tokens ([CLS], [SEP], padding) are never predicted.

    Raises:
        LongspanError: a row has fewer tokens that can be predicted, or nothing is to be.
    """
    batch, length = functional.shape
    free = int((~functional).sum(1).min()) if batch else targets
    if not 1 <= targets <= free or span < 1:
        raise LongspanError(
            f"{targets} targets in spans of up to {span} were asked of rows with as few as {free} "
            "tokens that are not functional: give 1 to that many, and a span of at least 1."
        )
    sizes = torch.randint(1, span + 1, (batch, length), generator=generator)
    rank = torch.full((batch, length), -1)
    places = []
    for row, (plain, size) in enumerate(zip(~functional, sizes, strict=True)):
        of_span = torch.repeat_interleave(torch.arange(length), size)[:length]
        turn = torch.randperm(length, generator=generator)[of_span]
        chosen = turn.masked_fill(~plain.cpu(), length).argsort(stable=True)[:targets]
        chosen = chosen[torch.randperm(targets, generator=generator)]
        rank[row, chosen] = torch.arange(targets)
        places.append(chosen)
    at = torch.stack(places) if places else torch.zeros(0, targets, dtype=torch.long)
    return Permutation(hidden(rank).to(functional.device), at.to(functional.device))


class XlnetLayer(nn.Module):
    """Both streams: x ← norm(x + attention), x ← norm(x + feed_forward(x)), by the same weights."""

    def __init__(self, config: XlnetConfig) -> None:
        super().__init__()
        self.mixer = registry.build(
            "xlnet",
            width=config.width,
            heads=config.heads,
            clamp_len=config.clamp_len,
            dropout=config.attention_dropout,
        )
        self.mixer_norm = nn.LayerNorm(config.width)
        self.feed_forward = FeedForward(
            config.width,
            inner=config.inner,
            activation=config.activation,
            dropout=config.dropout,
        )
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, h: Tensor, g: Tensor | None, named: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        y, z = self.mixer(h, g, **named)
        return self._after(h, y), None if g is None else self._after(g, z)

    def _after(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.mixer_norm(x + self.dropout(y))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class XlnetModel(hub.Pretrained):
    """Hidden states of the content stream, or of the query stream at the targets where given."""

    config: XlnetConfig

    def __init__(self, config: XlnetConfig) -> None:
        super().__init__(config)
        if config.attention not in ("bi", "uni") or config.memory < 0:
            raise LongspanError(
                f"attention={config.attention!r}, memory={config.memory}: expected bi or uni, and "
                "at least 0."
            )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        # w, where the query stream starts from: it says nothing of the token or its place.
        self.query = nn.Parameter(torch.randn(config.width) * config.initializer_range)
        self.layers = nn.ModuleList(XlnetLayer(config) for _ in range(config.layers))
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config)

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tokens | None = None,
        perm_mask: Bool[Tensor, "B L L"] | None = None,
        targets: Int[Tensor, "B T"] | None = None,
        inputs_embeds: Inputs | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states B L E, or B T E at the targets.

        Args:
            token_type_ids: segments; what is remembered counts as segment 0.
            perm_mask: True where token i must not see token j. targets: places to predict.
            past_key_values: a `StateCache`, filled in place, with each layer's memory.

        Raises:
            LongspanError: inputs that contradict each other; an odd batch with bi_data.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise LongspanError("give either input_ids or inputs_embeds, and not both.")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = h.shape[:2]
        if self.config.bi_data and batch % 2:
            raise LongspanError(f"bi_data reads half of the rows backwards; {batch} have no half.")
        if use_cache is None:
            use_cache = past_key_values is not None
        cache = past_key_values if past_key_values is not None else hub.StateCache()
        memories = cache.states or tuple(segment.empty(h) for _ in self.layers)
        keep = _kept(attention_mask, h)
        past = memories[0].keep
        seen, seen_g, at = self._masks(past, keep, perm_mask, targets)
        other = None
        if token_type_ids is not None:
            keys = F.pad(token_type_ids, (past.shape[1], 0))
            other = token_type_ids[:, :, None] != keys[:, None]
        backwards = None
        if self.config.bi_data:
            backwards = torch.arange(batch, device=h.device) >= batch // 2
        h = self.dropout(h.masked_fill(~keep[..., None], 0))
        g = None
        if at is not None:
            g = self.dropout(self.query.expand(*at.shape, -1))
        carried, states = [], [h]
        for layer, memory in zip(self.layers, memories, strict=True):
            named = {"memory": memory, "seen": seen, "seen_g": seen_g, "at": at}
            carried.append(segment.push(memory, h, keep, capacity=self.config.memory))
            h, g = layer(h, g, {**named, "other": other, "backwards": backwards})
            states.append(h)
        if use_cache:
            seen_so_far = 0 if cache.seen is None else cache.seen
            cache.update_states(tuple(carried), seen_so_far + keep.sum(1), length)
        return BaseModelOutputWithPast(
            last_hidden_state=self.dropout(h if g is None else g),  # pyright: ignore[reportArgumentType]
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(states) if output_hidden_states else None,  # pyright: ignore[reportArgumentType]
        )

    def _masks(
        self, past: Tensor, keep: Tensor, perm_mask: Tensor | None, targets: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Who sees whom: queries of the content stream, targets; and the targets' places."""
        length = keep.shape[1]
        sees = keep[:, None].expand(-1, length, -1)
        if perm_mask is not None:
            sees = sees & ~perm_mask
        own = torch.eye(length, dtype=torch.bool, device=keep.device)
        if self.config.attention == "uni":
            sees = sees & torch.ones_like(own).tril()
        before = past[:, None].expand(-1, length, -1)
        seen = torch.cat([before, sees | (own & keep[:, None])], 2)
        if targets is None:
            return seen, None, None
        rows = torch.cat([before, sees & ~own], 2)
        return seen, rows.gather(1, targets[..., None].expand(-1, -1, rows.shape[2])), targets


def _kept(mask: Tensor | None, x: Tensor) -> Tensor:
    if mask is None:
        return x.new_ones(x.shape[:2], dtype=torch.bool)
    if mask.dim() != 2 or mask.shape[1] < x.shape[1]:
        raise LongspanError(
            f"attention_mask is {tuple(mask.shape)} for {x.shape[1]} tokens; expected one number "
            "per row and token, 1 for real tokens and 0 for padding."
        )
    return mask[:, mask.shape[1] - x.shape[1] :].bool()


class XlnetForLanguageModeling(hub.Pretrained, GenerationMixin):
    """softmax(g·e(x)): of the targets in a random order, or with `uni` of each next token.

    >>> plan = permutation(functional, targets=85, generator=torch.Generator())
    >>> model(ids, perm_mask=plan.perm_mask, targets=plan.targets, labels=ids)
    """

    config: XlnetConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: XlnetConfig) -> None:
        super().__init__(config)
        self.model = XlnetModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config)

    @property
    def steps(self) -> bool:
        return self.config.attention == "uni"

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tokens | None = None,
        perm_mask: Bool[Tensor, "B L L"] | None = None,
        targets: Int[Tensor, "B T"] | None = None,
        inputs_embeds: Inputs | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tokens | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Logits B L vocabulary, or B T vocabulary at the targets; and the loss.

        Args:
            labels: B L, the inputs themselves; −100 is ignored.

        Raises:
            LongspanError: labels without targets, where nothing else hides a token from itself.
        """
        output = self.model(
            input_ids,
            attention_mask,
            token_type_ids,
            perm_mask,
            targets,
            inputs_embeds,
            past_key_values,
            use_cache,
            return_dict=True,
        )
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            if targets is None and self.config.attention == "bi":
                raise LongspanError(
                    "without targets every token sees itself, and there is nothing to learn: give "
                    "perm_mask and targets, as `permutation` makes them."
                )
            wanted = shifted(labels) if targets is None else labels.gather(1, targets)
            loss = cross_entropy(logits, wanted, num_items_in_batch)
        return CausalLMOutput(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=logits,
            past_key_values=output.past_key_values,
        )


hub.register(
    XlnetConfig, {"AutoModel": XlnetModel, "AutoModelForCausalLM": XlnetForLanguageModeling}
)
