"""Decoders with an output classifier after every block, whose tokens leave early.

Depth-Adaptive Transformer (Elbayad et al., 2019) and CALM (Schuster et al., 2022).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan import hub, registry
from longspan.errors import LongspanError
from longspan.inference.exits import EarlyExit, Fixed, Given, Graded
from longspan.models.config import LongspanConfig, Spec, split
from longspan.models.heads import LongspanForCausalLM, pool
from longspan.models.losses import (
    IGNORED,
    CausalLMOutput,
    Seq2SeqOutput,
    cross_entropy,
    shifted,
)
from longspan.models.seq2seq import LongspanForSeq2SeqLM, Targets
from longspan.models.stack import LongspanModel, padding
from longspan.nn import MultiHead
from longspan.nn.depth import Step, step_of
from longspan.shapes import Inputs, Keep, Tokens

Trains = Literal["decoder", "exits", "both"]


class EarlyExitConfig(LongspanConfig):
    """A LongspanConfig, and who leaves the decoder when.

    Args:
        exit: a mechanism with exits (`calm`, `depth-adaptive-transformer`) and its options, or the
            number of the block after which all tokens leave; None for full depth.
        share_heads: one output classifier for all blocks, else each has its own.
        weights: of the blocks' losses: `uniform`, `linear` (w_n = n) or one each.
        samples: M; 0 trains every block on every token (aligned), else every batch is seen M
            times with random exits, whose states are copied upwards (mixed).
        gradient_scaling: γ_n, factors on the gradients of each block's parameters alone.
        trains: the decoder, its exit rule with the decoder frozen, or both.
        exit_weight: α, of the rule's loss beside the decoder's.
        exits_in_prompt: let prompts leave early too; `generate` else runs them at full depth.

    Raises:
        LongspanError: a mechanism without exits, factors that do not fit the layers.
    """

    model_type = "longspan-early-exit"
    __no_type_check__ = True

    exit: Spec | int | None = None
    share_heads: bool = True
    weights: Sequence[float] | Literal["uniform", "linear"] = "uniform"
    samples: int = 0
    gradient_scaling: Sequence[float] | None = None
    trains: Trains = "both"
    exit_weight: float = 1.0
    exits_in_prompt: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.trains not in ("decoder", "exits", "both"):
            raise LongspanError(
                f"trains is {self.trains!r}; expected 'decoder', 'exits' or 'both'."
            )
        if isinstance(self.weights, str) and self.weights not in ("uniform", "linear"):
            raise LongspanError(
                f"weights is {self.weights!r}; expected 'uniform', 'linear' or a number a layer."
            )
        for name in ("weights", "gradient_scaling"):
            given = getattr(self, name)
            if not isinstance(given, str | None) and len(given) != self.layers:
                raise LongspanError(
                    f"{name} has {len(given)} numbers for {self.layers} layers: give one each."
                )
        if self.gradient_scaling is not None and self.samples:
            raise LongspanError(
                "gradient_scaling balances aligned training: leave it out, or samples=0."
            )
        if self.sharing is not None:
            raise LongspanError(
                "a layer cannot borrow the attention of one that was left out: leave sharing out."
            )
        super().__post_init__(**kwargs)

    def block_weights(self) -> list[float]:
        """w_n / Σ w."""
        known = {"uniform": [1] * self.layers, "linear": range(1, self.layers + 1)}
        weights = known[self.weights] if isinstance(self.weights, str) else self.weights
        return [w / sum(weights) for w in weights]


@dataclass
class ExitOutput(CausalLMOutput):
    """Beside the logits: the block after which each token left (0 for padding), and how many
    output classifiers it was put through."""

    exits: Tensor | None = None
    projections: Tensor | None = None


@dataclass
class Seq2SeqExitOutput(Seq2SeqOutput):
    """The same, of the decoder's tokens."""

    exits: Tensor | None = None
    projections: Tensor | None = None


class ExitStates(NamedTuple):
    """The blocks' states, and how many tokens each row had seen when generation began."""

    layers: tuple[Any, ...]
    start: Int[Tensor, "B"]


@dataclass(frozen=True)
class Work:
    """What tokens cost: applications of blocks, of what copied states cost, of classifiers.

    `flops` counts 2 for each weight that a token meets; attention to earlier tokens comes on top.
    """

    tokens: int
    blocks: int
    copies: int
    projections: int
    flops: int
    full_flops: int

    @property
    def depth(self) -> float:
        """Mean blocks a token."""
        return self.blocks / max(self.tokens, 1)


class _Board:
    """Logits of the last `wanted` tokens, each by the classifier that was asked last."""

    def __init__(
        self, score: Callable[[int, Tensor], Tensor], shape: tuple[int, int], x: Tensor, wanted: int
    ) -> None:
        self.score, self.wanted = score, wanted
        self.count = torch.zeros(shape, dtype=torch.long, device=x.device)
        self.by = self.count
        self.kept: Tensor | None = None

    def __call__(self, n: int, x: Tensor, at: Bool[Tensor, "B L"]) -> Tensor:
        logits = self.score(n, x)
        self.count, self.by = self.count + at, self.by.masked_fill(at, n)
        first = at.shape[1] - self.wanted
        if self.kept is None:
            self.kept = logits.new_zeros(len(at), self.wanted, logits.shape[-1])
        shown = logits[at.nonzero()[:, 1] >= first]
        self.kept = self.kept.masked_scatter(at[:, first:, None], shown)
        return logits

    def finished(self, x: Inputs, exits: Int[Tensor, "B L"]) -> Float[Tensor, "B _ vocabulary"]:
        """The logits at the exits, asking for those that are missing."""
        missing = self.by != exits
        missing[:, : exits.shape[1] - self.wanted] = False
        for n in exits[missing].unique().tolist():
            at = missing & (exits == n)
            self(n, x[at], at)
        if self.kept is None:  # nothing but padding, of which nothing is said
            return torch.zeros_like(self.score(1, x[:, exits.shape[1] - self.wanted :]))
        return self.kept


class _Ran(NamedTuple):
    logits: Tensor
    exits: Tensor
    projections: Tensor
    cache: hub.StateCache | None


class _EarlyExit(hub.Pretrained):
    """What both kinds of decoder share: the driver, the classifiers, the ways of training."""

    config: EarlyExitConfig
    lm_head: nn.Linear
    _is_stateful = True  # tokens checked together do not leave where they would one by one

    def _add_exits(self, stack: LongspanModel) -> None:
        config = self.config
        self.driver = _driver(config)
        # Attention that can look elsewhere than at its own tokens can be given keys alone.
        self._splits = ["cross" in registry.show(split(spec)[0]).modes for spec in config.tiled()]
        if (
            config.samples
            and config.trains == "both"
            and any(True for _ in self.driver.parameters())
        ):
            raise LongspanError(
                "mixed training has no states of all blocks for the exit rule to learn from: train "
                "with trains='decoder' first, then with trains='exits'."
            )
        if stack.position is not None and not stack.position.acts <= {"embed", "rotate", "bias"}:
            raise LongspanError(
                f"{type(stack.position).__name__} enters before every block, and copied states "
                "would take it again: use a position that embeds, rotates or biases."
            )
        separate = 0 if config.share_heads else config.layers - 1
        self.exit_heads = nn.ModuleList(
            nn.Linear(config.width, config.vocab_size, bias=False) for _ in range(separate)
        )

    def _score(self, stack: LongspanModel, n: int, x: Tensor) -> Tensor:
        """Logits after block n: every classifier reads normalised states."""
        last = self.config.share_heads or n == self.config.layers
        return (self.lm_head if last else self.exit_heads[n - 1])(stack.norm(x))

    def _run(
        self,
        stack: LongspanModel,
        tokens: Tokens,
        mask: Tensor | None,
        past: Any,
        use_cache: bool | None,
        *,
        wanted: int,
        exits: Tensor | None,
        encoded: Tensor | None = None,
        encoded_mask: Tensor | None = None,
    ) -> _Ran:
        """The tokens through the blocks, each as far as the rule lets it go."""
        batch, length = tokens.shape
        if exits is not None and (
            exits.shape != tokens.shape
            or int(exits.min()) < 1
            or int(exits.max()) > self.config.layers
        ):
            raise LongspanError(
                f"exits are {tuple(exits.shape)} for tokens of {tuple(tokens.shape)}; expected a "
                f"block for each, from 1 to {self.config.layers}."
            )
        keep = padding(mask, length)
        use_cache = stack._caches(past, use_cache)
        cache = hub.cache_of(past, batch) if use_cache else hub.StateCache()
        held: ExitStates | None = cache.states
        seen = tokens.new_zeros(batch) if cache.seen is None else cache.seen
        every = torch.ones_like(tokens) if keep is None else keep.long()
        pos = (seen[:, None] + every.cumsum(1) - 1).clamp(min=0)
        floor, start = 1, torch.zeros_like(seen) if held is None else held.start
        if past is not None and held is None and length > 1 and not self.config.exits_in_prompt:
            start = every.sum(1) - 1
            floor = torch.full_like(tokens, self.config.layers)
            floor[:, -1] = 1
        x = _embedded(stack, tokens, pos)
        encoded_keep = None if encoded is None else padding(encoded_mask, encoded.shape[1])
        board = _Board(lambda n, x: self._score(stack, n, x), (batch, length), x, wanted)
        went = self.driver(
            [
                _step(layer, keep=keep, encoded=encoded, encoded_keep=encoded_keep, splits=splits)
                for layer, splits in zip(stack.layers, self._splits, strict=True)
            ],
            x,
            None if held is None else held.layers,
            keep=keep,
            given=Given(
                read=stack.norm,
                logits=board,
                place=(pos - start[:, None]).clamp(min=0),
                encoded=_mean(encoded, encoded_keep),
                floor=floor,
                exits=exits,
                carries=use_cache,
            ),
        )
        logits = board.finished(went.y, went.taken)
        if use_cache:
            cache.update_states(ExitStates(went.states, start), seen + every.sum(1), length)
        return _Ran(logits, went.taken, board.count, cache if use_cache else None)

    def _graded(
        self,
        stack: LongspanModel,
        tokens: Tokens,
        mask: Tensor | None,
        labels: Int[Tensor, "B L"],
        encoded: Tensor | None = None,
        encoded_mask: Tensor | None = None,
    ) -> Graded:
        """All tokens through all blocks and classifiers (aligned)."""
        keep = padding(mask, tokens.shape[1])
        every = torch.ones_like(tokens) if keep is None else keep.long()
        x = _embedded(stack, tokens, (every.cumsum(1) - 1).clamp(min=0))
        encoded_keep = None if encoded is None else padding(encoded_mask, encoded.shape[1])
        scaling = self.config.gradient_scaling or [1.0] * len(stack.layers)
        states, nats, choices = [x], [], []
        for n, (layer, factor) in enumerate(zip(stack.layers, scaling, strict=True), 1):
            # What reaches the block's parameters is scaled, what goes on to earlier ones is not.
            x = _scaled(x, 1 / factor)
            x, _ = layer(x, None, keep=keep, encoded=encoded, encoded_keep=encoded_keep)
            x = _scaled(x, factor)
            states.append(x)
            # Recomputed, N output projections keep no logits.
            found = checkpoint(self._grade, stack, n, x, labels, use_reentrant=False)
            nats.append(found[0])
            choices.append(found[1])
        choice = torch.stack(choices)
        return Graded(
            states,
            stack.norm,
            torch.stack(nats),
            choice == labels,
            choice == choice[-1],
            labels != IGNORED,
            _mean(encoded, encoded_keep),
        )

    def _grade(
        self, stack: LongspanModel, n: int, x: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = self._score(stack, n, x)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        nats = F.cross_entropy(wide, labels.flatten(), ignore_index=IGNORED, reduction="none")
        return nats.view(labels.shape), logits.argmax(-1)

    def _training_loss(
        self,
        stack: LongspanModel,
        tokens: Tokens,
        mask: Tensor | None,
        labels: Int[Tensor, "B L"],
        items: Tensor | int | None,
        encoded: Tensor | None = None,
        encoded_mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts by name."""
        config, count = self.config, (labels != IGNORED).sum().clamp(min=1)
        inputs = (stack, tokens, mask, labels)
        if config.trains == "exits":
            with torch.no_grad():
                graded = self._graded(*inputs, encoded, encoded_mask)
            graded = graded._replace(read=lambda x: stack.norm(x).detach())
            loss = self.driver.rule.loss(graded)
            if loss is None:
                raise LongspanError(
                    f"{type(self.driver.rule).__name__} has nothing to learn: trains='decoder'."
                )
            return loss, {"exit": loss.detach()}
        share = 1.0 if items is None else count / items
        if config.samples:
            return self._mixed(*inputs, encoded, encoded_mask) / count * share, {}
        graded = self._graded(*inputs, encoded, encoded_mask)
        weights = graded.nats.new_tensor(config.block_weights())
        loss = (weights * graded.nats.sum((1, 2))).sum() / count * share
        rule = self.driver.rule.loss(graded) if config.trains == "both" else None
        if rule is None:
            return loss, {}
        added = config.exit_weight * rule
        return loss + share * added, {"exit": added.detach()}

    def _mixed(
        self,
        stack: LongspanModel,
        tokens: Tokens,
        mask: Tensor | None,
        labels: Tensor,
        encoded: Tensor | None,
        encoded_mask: Tensor | None,
    ) -> Tensor:
        """Summed nats at random exits, the mean of the samples."""
        many = self.config.samples

        def again(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.repeat_interleave(many, 0)

        repeated = tokens.repeat_interleave(many, 0)
        exits = torch.randint_like(repeated, 1, self.config.layers + 1)
        ran = self._run(
            stack, repeated, again(mask), None, False, wanted=tokens.shape[1], exits=exits,
            encoded=again(encoded), encoded_mask=again(encoded_mask),
        )  # fmt: skip
        logits = ran.logits.to(torch.promote_types(ran.logits.dtype, torch.float32))
        right = labels.repeat_interleave(many, 0).flatten()
        summed = F.cross_entropy(logits.flatten(0, 1), right, ignore_index=IGNORED, reduction="sum")
        return summed / many

    def work(self, exits: Int[Tensor, "B L"], projections: Int[Tensor, "B L"]) -> Work:
        """The cost of tokens with these exits (0 for padding), as an output names them."""
        stack = self.decoder if isinstance(self, EarlyExitForSeq2SeqLM) else self.model
        blocks, copies = zip(*map(_products, stack.layers, self._splits), strict=True)
        head = self.lm_head.weight.numel()
        real, layers = exits[exits > 0], len(stack.layers)
        below = torch.arange(1, layers + 1, device=exits.device) <= real[:, None]
        reached = below.sum(0).tolist()
        products = sum(
            run * block + (len(real) - run) * copy
            for run, block, copy in zip(reached, blocks, copies, strict=True)
        )
        asked = int(projections[exits > 0].sum())
        return Work(
            tokens=len(real),
            blocks=sum(reached),
            copies=len(real) * layers - sum(reached),
            projections=asked,
            flops=2 * (products + asked * head),
            full_flops=2 * len(real) * (sum(blocks) + head),
        )


class EarlyExitForCausalLM(_EarlyExit, LongspanForCausalLM):
    """A causal language model of any mixers with a next-token classifier after every block.

    Weights of a `LongspanForCausalLM` load into it.

    Raises:
        LongspanError: as that model, or an exit rule that does not fit.

    >>> model = EarlyExitForCausalLM(EarlyExitConfig(exit={"id": "calm", "threshold": 0.8}))
    >>> model.generate(prompt, max_new_tokens=100)
    """

    def __init__(self, config: EarlyExitConfig) -> None:
        super().__init__(config)
        self._add_exits(self.model)
        self.post_init()

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tokens | None = None,
        exits: Int[Tensor, "B L"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
    ) -> ExitOutput:
        """Logits at the exits, and in training with labels the loss alone.

        Without a cache, and in one that is not `generate`'s, prompts leave early like all tokens.

        Args:
            labels: B L, the inputs themselves; −100 is ignored. In evaluation the loss is that of
                the logits at the exits.
            exits: where each token leaves, in place of the rule.
            logits_to_keep: the last so many positions get logits; 0 for all.
        """
        right = None if labels is None else shifted(labels)
        if self.training and right is not None:
            loss, named = self._training_loss(
                self.model, input_ids, attention_mask, right, num_items_in_batch
            )
            return ExitOutput(loss=loss, auxiliary=named or None)  # pyright: ignore[reportArgumentType]
        if logits_to_keep and labels is not None:
            raise LongspanError("a loss needs all logits: leave logits_to_keep out.")
        ran = self._run(
            self.model,
            input_ids,
            attention_mask,
            past_key_values,
            use_cache,
            wanted=min(logits_to_keep or input_ids.shape[1], input_ids.shape[1]),
            exits=exits,
        )
        loss = None if right is None else cross_entropy(ran.logits, right, num_items_in_batch)
        return ExitOutput(
            loss=loss,
            logits=ran.logits,  # pyright: ignore[reportArgumentType]
            past_key_values=ran.cache,
            exits=ran.exits,
            projections=ran.projections,
        )

    def grade(self, input_ids: Tokens, attention_mask: Tensor | None = None) -> Graded:
        """Every block's prediction of every next token, all states computed."""
        labels = input_ids
        if attention_mask is not None:
            labels = input_ids.masked_fill(~attention_mask.bool(), IGNORED)
        return self._graded(self.model, input_ids, attention_mask, shifted(labels))


class EarlyExitForSeq2SeqLM(_EarlyExit, LongspanForSeq2SeqLM):
    """An encoder, and a decoder with a classifier after every block.

    Weights of a `LongspanForSeq2SeqLM` load into it.
    """

    def __init__(self, config: EarlyExitConfig) -> None:
        super().__init__(config)
        self._add_exits(self.decoder)
        self.post_init()

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Targets | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Targets | None = None,
        exits: Int[Tensor, "B T"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Seq2SeqExitOutput:
        """As in the causal model, of the decoder's tokens; `labels` are the targets themselves."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, return_dict=True)
        if decoder_input_ids is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)  # pyright: ignore[reportArgumentType]
        encoded = encoder_outputs[0]
        if self.training and labels is not None:
            loss, named = self._training_loss(
                self.decoder,
                decoder_input_ids,
                decoder_attention_mask,
                labels,
                num_items_in_batch,
                encoded,
                attention_mask,
            )
            return Seq2SeqExitOutput(loss=loss, auxiliary=named or None)  # pyright: ignore[reportArgumentType]
        ran = self._run(
            self.decoder,
            decoder_input_ids,
            decoder_attention_mask,
            past_key_values,
            use_cache,
            wanted=decoder_input_ids.shape[1],
            exits=exits,
            encoded=encoded,
            encoded_mask=attention_mask,
        )
        loss = None if labels is None else cross_entropy(ran.logits, labels, num_items_in_batch)
        return Seq2SeqExitOutput(
            loss=loss,
            logits=ran.logits,  # pyright: ignore[reportArgumentType]
            past_key_values=ran.cache,
            encoder_last_hidden_state=encoded,
            exits=ran.exits,
            projections=ran.projections,
        )


def _driver(config: EarlyExitConfig) -> EarlyExit:
    if config.exit is None or isinstance(config.exit, int):
        at = config.layers if config.exit is None else config.exit
        return EarlyExit(Fixed(at, blocks=config.layers))
    id_, options = split(config.exit)
    built = registry.build(id_, **{"width": config.width, "layers": config.layers} | options)
    if not isinstance(built, EarlyExit):
        raise LongspanError(
            f"'{id_}' does not say when a token leaves: give calm, depth-adaptive-transformer, or "
            "the number of a block."
        )
    return built


def _embedded(stack: LongspanModel, tokens: Tokens, pos: Tokens) -> Inputs:
    x = stack.embed_tokens(tokens)
    if stack.position is not None:
        x = stack.position.embed(x, pos)
    return stack.dropout(x)


def _mean(x: Tensor | None, keep: Keep | None) -> Float[Tensor, "B E"] | None:
    return None if x is None else pool(x, keep, "mean")


def _scaled(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by the factor on its way back."""
    if factor == 1 or not x.requires_grad:
        return x
    x = x.view_as(x)
    x.register_hook(lambda gradient: gradient * factor)
    return x


def _step(
    layer: Any, *, keep: Keep | None, encoded: Tensor | None, encoded_keep: Any, splits: bool
) -> Step:
    """`step_of`, which where nobody is left writes keys and values and does nothing else."""
    usual = step_of(layer, keep=keep, encoded=encoded, encoded_keep=encoded_keep)
    if not _writes_alone(layer.mixer, splits):
        return usual

    def step(x: Inputs, state: Any, active: Tensor | None) -> tuple[Inputs, Any]:
        if active is None or bool(active.any()):
            return usual(x, state, active)
        source = layer.mixer_norm(x) if layer.order == "pre" else x
        # No queries, and x as what they would attend to.
        return x, layer.mixer(source[:, :0], state, keep=keep, context=source)[1]

    return step


def _writes_alone(mixer: nn.Module, splits: bool) -> bool:
    """Whether a mixer takes keys without queries: attention with keys of its own."""
    if not (splits and isinstance(mixer, MultiHead)):
        return False
    return not mixer.attention.shared and not mixer.attention.extra


def _products(layer: Any, splits: bool) -> tuple[int, int]:
    """Weights that a token meets in a block, and in what a copied state needs there."""
    every, mixer = _linear_weights(layer), layer.mixer
    if layer.cross is not None:  # keys and values are of the encoder's tokens
        every -= sum(layer.cross.project[name].weight.numel() for name in ("k", "v"))
    if not _writes_alone(mixer, splits):
        return every, _linear_weights(mixer)
    return every, sum(mixer.project[name].weight.numel() for name in ("k", "v"))


def _linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


hub.register(
    EarlyExitConfig,
    {
        "AutoModelForCausalLM": EarlyExitForCausalLM,
        "AutoModelForSeq2SeqLM": EarlyExitForSeq2SeqLM,
    },
)
