"""What a LongspanConfig names, built: the layers' mechanisms, positions and memories."""

from typing import Any

from longspan import registry
from longspan.errors import LongspanError
from longspan.models.config import LongspanConfig, Spec, split
from longspan.nn import Mixer, MultiHead, Position


def mixer(spec: Spec, *, config: LongspanConfig, causal: bool) -> Mixer:
    """Build one layer's mechanism for a model of this config.

    An attention is put into `MultiHead`, with the config's position. A mechanism gets, of the
    config's width, heads, head_width, kv_heads, length and attention_dropout, causal and a position
    that rotates or biases, what its arguments name; the spec's own options come last.

    Raises:
        LongspanError: a mechanism without the form asked for, or whatever its builder refuses.
    """
    id_, options = split(spec)
    card = registry.show(id_)
    require_form(id_, causal=causal)
    position = position_of(config, causal=causal)
    if position is not None and position.acts <= {"embed", "enter"}:
        position = None
    dropout = config.attention_dropout or None
    if dropout and "dropout" not in registry.options(id_):
        raise LongspanError(f"'{id_}' has no dropout of its weights: give attention_dropout=0.")
    offered = {**sizes_of(config), "causal": causal, "position": position, "dropout": dropout}
    built = build_among(id_, offered, options)
    if card.kind != "attention":
        return built
    return MultiHead(
        built,
        width=config.width,
        heads=config.heads,
        head_width=config.head_width,
        kv_heads=config.kv_heads,
        position=position,
    )


def remembering(spec: Spec, *, config: LongspanConfig, causal: bool) -> Mixer:
    """`mixer`, or the mechanism that the config names as memory, in its place or around it.

    Raises:
        LongspanError: a memory of a bidirectional layer; one that brings attention of its own and
            was to stand around another mixer; positions or grouped heads, which it has not.
    """
    memory, _ = config.wrapping
    if memory is not None and not causal:
        raise LongspanError("a memory is of causal layers: give memory=None, or causal=True.")
    if memory is None or isinstance(memory, int):
        return mixer(spec, config=config, causal=causal)
    (id_, options), plain = split(memory), split(spec) == ("multi-head-attention", {})
    if not plain and "local" not in registry.options(id_):
        raise LongspanError(
            f"'{id_}' brings attention of its own and cannot stand around '{split(spec)[0]}': "
            "leave mixers=['multi-head-attention'], or give memory a number of inputs to keep."
        )
    position, grouped = (
        position_of(config, causal=causal),
        config.kv_heads not in (None, config.heads),
    )
    turned = position is not None and not position.acts <= {"embed", "enter"}
    if plain and (grouped or turned):
        raise LongspanError(
            f"'{id_}' brings attention of its own, with positions and as many heads of keys as of "
            "queries: give position=None or one that embeds, and kv_heads=None."
        )
    if not plain:
        options = {"local": mixer(spec, config=config, causal=causal), **options}
    return mixer({"id": id_, **options}, config=config, causal=causal)


def refuse_leaks(config: LongspanConfig) -> None:
    """Refuse mechanisms whose causal form is not strictly so, unless the config allows them."""
    if not config.allow_leaks:
        for id_ in ids(config):
            refuse_leak(id_)


def refuse_leak(id_: str) -> None:
    """Refuse a mechanism whose causal form is not strictly so."""
    card = registry.show(id_)
    if card.causality == "strict":
        return
    strict = f"{card.id}-causal"
    use = f"use '{strict}'" if strict in registry.cards() else "use a strictly causal mechanism"
    how = {
        "selection": "later tokens change whom earlier ones attend to",
        "numerical": "later tokens change earlier outputs by rounding",
    }[card.causality]
    raise LongspanError(
        f"'{card.id}' can see the future ({how}), which spoils a language model's figures: "
        f"{use}, or set allow_leaks=True."
    )


def sizes_of(config: LongspanConfig) -> dict[str, Any]:
    return {
        "width": config.width,
        "heads": config.heads,
        "head_width": config.head_width or config.width // config.heads,
        "kv_heads": config.kv_heads,
        "length": config.length,
    }


def require_form(id_: str, *, causal: bool) -> None:
    """Refuse a mechanism that lacks the form asked for."""
    form, modes = ("causal" if causal else "bidirectional"), registry.show(id_).modes
    if form not in modes:
        raise LongspanError(
            f"'{id_}' has no {form} form (modes: {', '.join(sorted(modes))}); "
            f'longspan.find(mode="{form}") lists those that have.'
        )


def build_among(id_: str, offered: dict[str, Any], options: dict[str, Any]) -> Any:
    """Build a mechanism of `options` and what it takes of `offered`, where that is not None."""
    known = registry.options(id_)
    fitting = {n: v for n, v in offered.items() if n in known and v is not None}
    return registry.build(id_, **(fitting | options))


def position_of(config: LongspanConfig, *, causal: bool) -> Position | None:
    if config.position is None:
        return None
    id_, options = split(config.position)
    return build_among(id_, sizes_of(config) | {"layers": config.layers, "causal": causal}, options)


def steps_on(config: LongspanConfig) -> bool:
    """Whether every mechanism of a stack carries a state from which to continue."""
    return config.wrapping[0] is not None or all(
        "step" in registry.show(id_).modes for id_ in ids(config)
    )


def ids(config: LongspanConfig) -> list[str]:
    memory, _ = config.wrapping
    own = [] if memory is None or isinstance(memory, int) else [split(memory)[0]]
    return [split(spec)[0] for spec in config.mixers] + own
