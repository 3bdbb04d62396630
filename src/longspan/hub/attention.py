"""longspan's attentions under transformers' `attn_implementation`.

An attention function is given queries, keys and values and no more: every key is at hand at each
call, those of the cache too, and nothing is kept between calls. So it serves mechanisms without
parameters, whose causal form aligns the last query with the last key; `longspan.convert.swap`
serves the others.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from longspan import registry
from longspan.card import Mode
from longspan.errors import LongspanError
from longspan.nn import Attention, Bias
from longspan.shapes import Keep

PREFIX = "longspan:"
SWAP = "longspan.convert.swap puts it into the model's layers."
# Sizes of a model not yet known: heads and a width that every option divides or fits.
USUAL = {"heads": 12, "head_width": 64}
# What other implementations compute from further arguments, and this one cannot.
BEYOND = {
    "sliding_window": "a sliding window",
    "softcap": "scores that are capped",
    "s_aux": "attention sinks",
    "cu_seq_lens_q": "sequences packed in a row",
    "cache": "a paged cache",
    "output_attentions": "attention weights as an output",
}


def attention(text: str) -> str:
    """The name under which `attn_implementation=` finds a mechanism, checked and registered.

    `text` is an id with its options, as in `performer?features=64&seed=1` or
    `performer(features=64, seed=1)`, with or without `longspan:` before it; an option's value is
    a Python literal. Ids alone are registered when `longspan.hub` is imported. Options that
    depend on the model's heads or width are checked at its first call.

    Raises:
        LongspanError: an unknown mechanism or option, a mechanism that cannot serve by queries,
            keys and values alone.

    >>> model.set_attn_implementation(attention("performer?features=64"))
    """
    id_, query, values = text.removeprefix(PREFIX).partition("?")
    id_, options = registry.parse(f"{id_}({values.replace('&', ', ')})" if query else id_)
    if (kind := registry.show(id_).kind) != "attention":
        raise LongspanError(
            f"'{id_}' is of kind {kind} and attn_implementation takes attentions: "
            'longspan.find(kind="attention") lists them.'
        )
    return _register(id_, options)


def _register(id_: str, options: Mapping[str, Any], *, checked: bool = True) -> str:
    given = "&".join(f"{name}={value!r}" for name, value in options.items())
    key = f"{PREFIX}{id_}?{given}" if given else f"{PREFIX}{id_}"
    served = Served(id_, options)
    if checked:
        served.check(key)
    AttentionInterface.register(key, served)
    AttentionMaskInterface.register(key, visible)
    return key


class Served:
    """A mechanism as transformers calls an attention function.

    Called with q (B H L D), k and v (B G S D), un-repeated, returns outputs (B L H D) and None
    for the weights.
    """

    def __init__(self, id_: str, options: Mapping[str, Any]) -> None:
        self.id, self.options = id_, dict(options)
        self.built: dict[tuple[Any, ...], Attention] = {}

    def check(self, key: str) -> None:
        """Refuse what cannot serve in any form."""
        if "flash" in key:
            raise LongspanError(
                f"transformers takes every name with 'flash' in it, as '{key}', for its own "
                "kernels: use multi-head-attention or rabe-staats, which are as exact."
            )
        modes, refusals = registry.show(self.id).modes, []
        forms = [causal for causal in (False, True) if _form(causal) in modes]
        for causal in forms:
            try:
                self._build(causal=causal, dropout=0.0, **USUAL)
            except LongspanError as refusal:
                refusals.append(refusal)
        if len(refusals) == len(forms):
            raise refusals[0]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **further: Any,
    ) -> tuple[Tensor, None]:
        name = type(module).__name__
        for argument, what in BEYOND.items():
            given = further.get(argument)
            if given is not None and given is not False:
                raise LongspanError(
                    f"{name} asks for {what} ({argument}), which '{PREFIX}{self.id}' cannot give: "
                    "turn it off in the model's config, or use attn_implementation='eager'."
                )
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        keep = _keep(name, attention_mask)
        if causal and keep is not None and keep.shape[1] < key.shape[2]:
            # A static cache: behind the last query there are only places not yet filled.
            key, value = (t[:, :, : keep.shape[1]] for t in (key, value))
        self._check_form(module, query, key, causal=causal)
        attend = self._attend(query, causal=causal, dropout=dropout, training=module.training)
        if not attend.grouped and (copies := query.shape[1] // key.shape[1]) > 1:
            key, value = (t.repeat_interleave(copies, dim=1) for t in (key, value))
        unit = query.shape[3] ** -0.5
        if scaling is not None and scaling != unit:
            query = query * (scaling / unit)
        hooks: dict[str, Any] = {}
        if position_bias is not None:
            if not attend.takes_bias:
                raise LongspanError(
                    f"{name} adds a bias to its scores, which '{self.id}' has none of: use a "
                    "mechanism that takes a bias (multi-head-attention, rabe-staats)."
                )
            hooks["bias"] = _bias(position_bias, key.shape[2])
        o, _ = attend(query, key, value, keep=keep, **hooks)
        return o.transpose(1, 2).contiguous(), None

    def _check_form(self, module: nn.Module, q: Tensor, k: Tensor, *, causal: bool) -> None:
        modes = registry.show(self.id).modes
        # A module of a decoder that is not causal attends to the encoder, of whatever length.
        crosses = not causal and (
            q.shape[2] != k.shape[2]
            or getattr(module, "is_cross_attention", False)
            or getattr(module, "is_decoder", False)
        )
        form = "cross" if crosses else _form(causal)
        if form not in modes:
            raise LongspanError(
                f"{type(module).__name__} attends in the {form} form, which '{self.id}' lacks "
                f'(modes: {", ".join(sorted(modes))}); longspan.find(mode="{form}") lists those '
                "that have it."
            )

    def _attend(self, q: Tensor, *, causal: bool, dropout: float, training: bool) -> Attention:
        """The mechanism in one form, built at its first call and shared by all layers."""
        key = (causal, q.shape[1], q.shape[3], dropout, training, q.device)
        if key not in self.built:
            attend = self._build(
                causal=causal, dropout=dropout, heads=q.shape[1], head_width=q.shape[3]
            )
            self.built[key] = attend.to(q.device).train(training)
        return self.built[key]

    def _build(self, *, causal: bool, dropout: float, heads: int, head_width: int) -> Attention:
        if causal and registry.show(self.id).causality != "strict":
            strict = f"{self.id}-causal"
            instead = f"'{strict}'" if strict in registry.cards() else "a strictly causal mechanism"
            raise LongspanError(
                f"'{self.id}' can see the future in its causal form: use {instead}."
            )
        if "causal" in self.options:
            raise LongspanError(
                f"'{self.id}' was given causal={self.options['causal']!r}, which is the model's "
                "to say: leave it out."
            )
        known = registry.options(self.id)
        if dropout and "dropout" not in known:
            raise LongspanError(
                f"'{self.id}' has no dropout of its weights: set the attention dropout of the "
                "model's config to 0."
            )
        # An argument that is None by default turns a part on, with parameters of its own (nat).
        offered = {
            name: value
            for name, value in (
                ("causal", causal),
                ("heads", heads),
                ("head_width", head_width),
                ("dropout", dropout),
            )
            if name in known and known[name].default is not None
        }
        # Built to last: no tensors of an inference mode, and the caller's draws left alone.
        with torch.inference_mode(False), torch.random.fork_rng([]):
            attend = registry.build(self.id, **(offered | self.options))
            if fault := _lacks(attend) or _moves(attend, heads, head_width):
                raise LongspanError(f"'{self.id}' {fault}")
        return attend


def _form(causal: bool) -> Mode:
    return "causal" if causal else "bidirectional"


def _lacks(attend: Attention) -> str | None:
    """What a mechanism needs beside queries, keys and values, or None."""
    if own := [name for name, _ in attend.named_parameters()]:
        return (
            f"has parameters of its own ({', '.join(own)}), which attn_implementation has no place "
            f"for: {SWAP}"
        )
    if attend.shared:
        return f"uses its queries as keys, where a model hands over both: {SWAP}"
    if attend.extra:
        return (
            f"needs projections of its own ({', '.join(attend.extra)}), which a model does not "
            f"hand over: {SWAP}"
        )
    return None


def _moves(attend: Attention, heads: int, width: int) -> str | None:
    """Why a mechanism, called anew at each token, would not give what it gives at once, or None."""
    before = {name: buffer.clone() for name, buffer in attend.named_buffers()}
    q, k, v = torch.randn(3, 1, heads, 6, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            attend.train()(q, k, v)
            whole = attend.eval()(q, k, v)[0]
        except LongspanError:
            return None  # Sizes that stand in for a model's may not suit it: its own call will say.
        if any(not torch.equal(buffer, before[name]) for name, buffer in attend.named_buffers()):
            return f"changes from call to call in training, and all layers would share it: {SWAP}"
        if not attend.causal:
            return None
        try:
            last = attend(q[:, :, -1:], k, v)[0]
            early = attend(*(t[:, :, :3] for t in (q, k, v)))[0]
        except LongspanError:
            return f"takes keys before its queries in a state alone, and none is kept: {SWAP}"
    again = torch.cat([early, whole[:, :, 3:-1], last], dim=2)
    if torch.allclose(again, whole, rtol=1e-3, atol=1e-4):
        return None
    return (
        "gives a token another output when more tokens follow, which a cache cannot take back: "
        "build it with length=."
    )


def _keep(name: str, mask: Any) -> Keep | None:
    """The padding mask that `visible` handed over."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = f"a mask of shape {tuple(mask.shape)}"
        raise LongspanError(
            f"{name} got {shape}, one entry for each query and key; expected one number per row "
            "and token: give attention_mask as batch × tokens, 1 for real tokens and 0 for padding."
        )
    return mask.bool()


def _bias(addend: Tensor, keys: int) -> Bias:
    """A model's (B|1) H L S as a hook; queries are counted from S − L, as the last of the keys."""
    first = keys - addend.shape[2]

    def bias(q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        return addend[:, :, pos_q - first][..., pos_k]

    return bias


def visible(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: PreTrainedConfig | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Keep | None:
    """The mask function: the keys that may be seen (B S), or None where all may.

    Causality is the attention's own. S is less than `kv_length` where a static cache has places
    behind the last query.

    Raises:
        LongspanError: a mask of another form than causal or bidirectional, a model that looks no
            attention function up, an attention_mask of fewer tokens than there are keys.
    """
    if config is not None and not _looks_up(type(config)):
        raise LongspanError(
            f"the model of {type(config).__name__} looks up no attention function in transformers "
            f"{transformers.__version__}, so attn_implementation would change its masks alone: "
            "leave it as it is."
        )
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        what, how = "packed sequences, or a mask of its own", "unpack them, with an attention_mask"
        if local_size is not None:
            what, how = f"a window or chunks of {local_size} tokens", "turn it off in its config"
        raise LongspanError(
            f"the model asks for more than a causal or bidirectional mask ({what}), which no "
            f"longspan attention is told of: {how}, or use attn_implementation='sdpa'."
        )
    filled = kv_length
    if mask_function is causal_mask_function:
        filled = min(kv_length, int(q_offset) + q_length - int(kv_offset))
    if attention_mask is None:
        if filled == kv_length:
            return None
        return torch.ones(batch_size, filled, dtype=torch.bool, device=device)
    if attention_mask.shape[1] < filled:
        raise LongspanError(
            f"attention_mask has {attention_mask.shape[1]} tokens for {filled} keys: give one "
            "number for each, those in the cache included."
        )
    keep = attention_mask[:, :filled].bool()
    # Asking would make a GPU wait; on a CPU it is cheap and opens the unmasked, faster ways.
    whole = filled == kv_length and keep.device.type == "cpu" and bool(keep.all())
    return None if whole else keep


@functools.cache
def _looks_up(config: type) -> bool:
    """Whether the models of a config call what `attn_implementation` names."""
    model = transformers.MODEL_MAPPING.get(config, None)
    if not isinstance(model, type):
        return True
    return model._can_set_attn_implementation()  # pyright: ignore[reportAttributeAccessIssue]


for _card in registry.find(kind="attention"):
    if "flash" not in _card.id:
        _register(_card.id, {}, checked=False)
