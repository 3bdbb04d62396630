"""Funnel-Transformer (Dai et al., 2020): an encoder that halves its sequence, and a decoder."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from longspan import hub
from longspan.engines import dense, pool, relative
from longspan.errors import LongspanError
from longspan.mechanisms.hierarchical.funnel import Funnel, Pooling
from longspan.models.losses import ClassifierOutput, MaskedOutput, cross_entropy
from longspan.models.stack import padding
from longspan.nn import FeedForward
from longspan.nn.relative import numbers
from longspan.shapes import Inputs, Tokens

CLS_SEGMENT = 2


class FunnelConfig(PreTrainedConfig):
    """A funnel, by its blocks.

    Args:
        blocks: layers of each block, "4-4-4"; "6-3x2-3x2" runs each of 3 layers twice.
        decoder_layers: at full length.
        pool_query_only: in the first layer of a block keys and values are not yet pooled.
        separate_cls, truncate: keep the first token apart, and drop as many tokens at the end.
        attention: how relative scores are computed; both give the same.
        initializer_std: of linear weights, by default √(1 / (inputs + outputs)).

    Raises:
        LongspanError: blocks that are not written so; an unknown form of attention.
    """

    model_type = "longspan-funnel"
    __no_type_check__ = True

    vocab_size: int = 30522
    blocks: str = "4-4-4"
    decoder_layers: int = 2
    width: int = 768
    heads: int = 12
    head_width: int = 64
    inner: int = 3072
    pooling: Pooling = "mean"
    pool_query_only: bool = True
    separate_cls: bool = True
    truncate: bool = True
    attention: Literal["shift", "factorised"] = "shift"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.1
    initializer_std: float | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.sizes()
        if self.attention not in ("shift", "factorised"):
            raise LongspanError(
                f"funnel has no attention {self.attention!r}: expected 'shift' or 'factorised'."
            )
        super().__post_init__(**kwargs)

    def sizes(self) -> list[tuple[int, int]]:
        """(layers, times each) of every block."""
        found = [
            re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", part) for part in self.blocks.split("-")
        ]
        if not all(found):
            raise LongspanError(
                f"blocks is {self.blocks!r}; expected layers of each block, as in '4-4-4', and "
                "how often each runs, as in '6-3x2-3x2'."
            )
        return [(int(one[1]), int(one[2] or 1)) for one in found if one]


class Side(NamedTuple):
    """One side of the scores: states, their places and segments, and which may be seen."""

    x: Float[Tensor, "B N E"]
    at: range
    segments: Int[Tensor, "B N"]
    keep: Bool[Tensor, "B N"] | None


class FunnelAttention(nn.Module):
    """((q + r_w)·k + c ((q + r_r)·W R(p_i − p_j) + (q + r_s)·s_same)) / √D (App. A.1 and A.2).

    c is 0 where query or key is a [CLS] kept apart, else 1; s is one of two vectors, for tokens of
    the same segment or of different ones; [CLS] is of every segment.
    """

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__()
        heads, inner = config.heads, config.heads * config.head_width
        self.heads, self.form, self.apart = heads, config.attention, config.separate_cls
        self.dropout = config.attention_dropout
        self.project = nn.ModuleDict(
            {name: nn.Linear(config.width, inner, bias=name != "q") for name in "qkv"}
        )
        self.output = nn.Linear(inner, config.width)
        self.distance = nn.Parameter(torch.empty(heads, config.head_width, config.width))
        self.segment = nn.Parameter(torch.empty(2, heads, config.head_width))
        self.biases = nn.ParameterDict(
            {name: torch.empty(heads, config.head_width) for name in ("w", "r", "s")}
        )

    def forward(self, queries: Side, keys: Side) -> Float[Tensor, "B L E"]:
        q, k, v = (
            rearrange(self.project[name](side.x), "B L (H D) -> B H L D", H=self.heads)
            for name, side in (("q", queries), ("k", keys), ("v", keys))
        )
        of_w, of_r, of_s = (self.biases[name][:, None] for name in ("w", "r", "s"))
        offset, scale = len(keys.at) - len(queries.at), q.shape[3] ** -0.5

        def bias(q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
            start = int(pos_q[0]) - offset
            rows = slice(start, start + q.shape[2])
            at_q, at_k = queries.at[rows], keys.at
            if self.form == "shift":
                scores = relative.shifted(q + of_r, self.distance, at_q, at_k)
            else:
                places = numbers(at_q, q[:1]), numbers(at_k, q[:1])
                scores = relative.factorised(q + of_r, self.distance, *places)
            ours, theirs = queries.segments[:, rows, None], keys.segments[:, None]
            same = (ours == theirs) | (ours == CLS_SEGMENT) | (theirs == CLS_SEGMENT)
            other, alike = ((q + of_s) @ s[:, :, None] for s in self.segment)
            scores = scores + torch.where(same[:, None], alike, other)
            if self.apart:
                scores = scores * ((pos_q > offset)[:, None] & (pos_k > 0))
            return (scores + of_w @ k.mT) * scale

        dropout = self.dropout if self.training else 0.0
        o, _ = dense.tiled(q, k, v, keep=keys.keep, bias=bias, dropout=dropout)
        return self.output(rearrange(o, "B H L D -> B L (H D)"))


class FunnelLayer(GradientCheckpointingLayer):
    """h ← LN(q + attention(q, k)), h ← LN(h + FFN(h)), the gelu by tanh."""

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__()
        self.attention = FunnelAttention(config)
        self.norm, self.feed_forward_norm = (nn.LayerNorm(config.width, 1e-9) for _ in range(2))
        self.feed_forward = FeedForward(config.width, inner=config.inner)
        self.feed_forward.activation = partial(F.gelu, approximate="tanh")
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, queries: Side, keys: Side) -> Float[Tensor, "B L E"]:
        x = self.norm(queries.x + self.dropout(self.attention(queries, keys)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class _Funnelled(hub.Pretrained):
    config: FunnelConfig
    config_class = FunnelConfig
    _is_stateful = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the official code: uniform vectors of the attention, normal matrices."""
        config = self.config
        if isinstance(module, nn.Linear):
            std = config.initializer_std or sum(module.weight.shape) ** -0.5
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=config.initializer_std or 1.0)
        elif isinstance(module, FunnelAttention):
            for weight in (module.distance, module.segment, *module.biases.values()):
                nn.init.uniform_(weight, 0, config.initializer_range)


class FunnelModel(_Funnelled):
    """Blocks at lengths L, L/2, L/4 …; with `decode`, back to L (Sec. 2.2 and 2.3).

        g = repeat(h_M, 2^{M−1}) + h_1, then the decoder's layers

    h_1 are the states of the first block. Without, the states of the last block. Rows may be padded
    on either side; kept tokens stand first inside, and states of padding are 0.
    """

    def __init__(self, config: FunnelConfig, *, decode: bool = True) -> None:
        super().__init__(config)
        self.decode = decode
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.norm, self.dropout = nn.LayerNorm(config.width, 1e-9), nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            nn.ModuleList(FunnelLayer(config) for _ in range(layers))
            for layers, _ in config.sizes()
        )
        options: Any = {"apart": config.separate_cls, "truncate": config.truncate}
        self.pool = Funnel(pooling=config.pooling, **options)
        self.unpool = Funnel(factor=2 ** (len(self.blocks) - 1), **options)
        self.decoder = nn.ModuleList(
            FunnelLayer(config) for _ in range(config.decoder_layers if decode else 0)
        )
        self.post_init()

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tokens | None = None,
        inputs_embeds: Inputs | None = None,
    ) -> BaseModelOutput:
        """States B L E, or, without a decoder, B N E.

        Args:
            token_type_ids: segments; 2 is the segment of [CLS].

        Raises:
            LongspanError: both or none of ids and embeddings.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise LongspanError("give either input_ids or inputs_embeds, and not both.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = self.dropout(self.norm(x))
        keep, back = padding(attention_mask, x.shape[1]), None
        segments = torch.zeros_like(x[..., 0], dtype=torch.long)
        segments = segments if token_type_ids is None else token_type_ids
        if keep is not None:
            order, back = pool.align(keep)
            x, segments = pool.rows(x, order), pool.rows(segments, order)
            keep = keep.gather(1, order)
        side = Side(x, range(x.shape[1]), segments, keep)
        first, last = self._encode(side)
        if not self.decode:
            return BaseModelOutput(last_hidden_state=last.x)  # pyright: ignore[reportArgumentType]
        x = first.x
        if len(self.blocks) > 1:
            _, _, plan = self.unpool.shorten(x, keep=keep)
            groups = last.keep if keep is not None else None
            x = x + self.unpool.lengthen(last.x, x, plan._replace(groups=groups))[0]
        else:
            x = x + last.x
        for layer in self.decoder:
            x = layer(side._replace(x=x), side._replace(x=x))
        if back is not None and keep is not None:
            x = pool.rows(x.masked_fill(~keep[..., None], 0), back)
        return BaseModelOutput(last_hidden_state=x)  # pyright: ignore[reportArgumentType]

    def _encode(self, side: Side) -> tuple[Side, Side]:
        """States of the first block and of the last."""
        config, first = self.config, side
        for n, (block, (_, times)) in enumerate(zip(self.blocks, config.sizes(), strict=True)):
            layers: Any = [layer for layer in block for _ in range(times)]  # pyright: ignore
            queries = keys = side
            if n and side.x.shape[1] > 1 + config.separate_cls:
                queries = self._pooled(side, n)
                keys = side if config.pool_query_only else queries
            for layer in layers:
                x = layer(queries, keys)
                queries = keys = queries._replace(x=x)
            side = queries
            first = side if n == 0 else first
        return first, side

    def _pooled(self, side: Side, block: int) -> Side:
        """Half the sequence: means or maxima, and places and segments of the first of each group.

        [CLS] stands where the group before the first would.
        """
        x, keep, _ = self.pool.shorten(side.x, keep=side.keep)
        step, picks = 2**block, self.pool.picks(side.x.shape[1], side.x.device)[:, 0]
        start = 1 - step if self.config.separate_cls else 0
        at = range(start, start + step * x.shape[1], step)
        return Side(x, at, pool.rows(side.segments, picks.expand(len(x), -1)), keep)


class FunnelForMaskedLM(_Funnelled):
    """A funnel with its decoder and a masked-token head, tied to the embedding.

    >>> model = FunnelForMaskedLM(FunnelConfig(blocks="6-3x2-3x2"))
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__(config)
        self.model = FunnelModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tokens | None = None,
        inputs_embeds: Inputs | None = None,
        labels: Tokens | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MaskedOutput:
        """Logits B L vocabulary, and the mean loss of the labels that are not −100."""
        x = self.model(input_ids, attention_mask, token_type_ids, inputs_embeds).last_hidden_state
        logits = self.lm_head(x)
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return MaskedOutput(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]


class FunnelForSequenceClassification(_Funnelled):
    """A funnel without decoder and a head of two layers on [CLS]; one label is a number."""

    accepts_loss_kwargs = False

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__(config)
        self.model = FunnelModel(config, decode=False)
        self.dense, self.dropout = nn.Linear(config.width, config.width), nn.Dropout(config.dropout)
        self.score = nn.Linear(config.width, config.num_labels or 1)
        self.post_init()

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tokens | None = None,
        inputs_embeds: Inputs | None = None,
        labels: Tensor | None = None,
    ) -> ClassifierOutput:
        """Logits B × labels, and the loss: cross-entropy, or mean square for a number."""
        x = self.model(input_ids, attention_mask, token_type_ids, inputs_embeds).last_hidden_state
        logits, loss = self.score(self.dropout(self.dense(x[:, 0]).tanh())), None
        if labels is not None and self.config.num_labels == 1:
            loss = F.mse_loss(logits.float(), labels.float().view_as(logits))
        elif labels is not None:
            loss = F.cross_entropy(logits.float(), labels.view(-1))
        return ClassifierOutput(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]


# transformers' names and ours.
_NAMES = {
    "funnel.": "model.",
    "embeddings.word_embeddings": "embed_tokens",
    "embeddings.layer_norm": "norm",
    "encoder.blocks": "blocks",
    "decoder.layers": "decoder",
    "attention.q_head": "attention.project.q",
    "attention.k_head": "attention.project.k",
    "attention.v_head": "attention.project.v",
    "attention.post_proj": "attention.output",
    "attention.layer_norm": "norm",
    "attention.r_w_bias": "attention.biases.w",
    "attention.r_r_bias": "attention.biases.r",
    "attention.r_s_bias": "attention.biases.s",
    "attention.r_kernel": "attention.distance",
    "attention.seg_embed": "attention.segment",
    "ffn.linear_1": "feed_forward.up",
    "ffn.linear_2": "feed_forward.down",
    "ffn.layer_norm": "feed_forward_norm",
    "classifier.linear_hidden": "dense",
    "classifier.linear_out": "score",
}


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a Funnel of transformers, under these models' names."""
    ours: dict[str, Tensor] = {}
    for name, weight in weights.items():
        own = name
        for theirs, mine in _NAMES.items():
            own = own.replace(theirs, mine)
        ours[own] = weight.permute(1, 2, 0) if own.endswith("attention.distance") else weight
    return ours


hub.register(
    FunnelConfig,
    {
        "AutoModel": FunnelModel,
        "AutoModelForMaskedLM": FunnelForMaskedLM,
        "AutoModelForSequenceClassification": FunnelForSequenceClassification,
    },
)
