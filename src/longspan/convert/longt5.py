"""T5 and LongT5 of transformers into longspan's LongT5, local or with transient globals."""

from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from longspan.errors import LongspanError
from longspan.models.longt5 import LongT5Config, LongT5ForSeq2SeqLM, LongT5Stack, renamed


def longt5(
    model: PreTrainedModel,
    *,
    attention: Literal["local", "transient-global"] | None = None,
    radius: int | None = None,
    block: int | None = None,
) -> LongT5ForSeq2SeqLM | LongT5Stack:
    """A LongT5 with the weights of a T5 (v1.0 or v1.1) or LongT5, of transformers or of longspan.

    An encoder alone gives an encoder alone. Globals that the original lacks start with a gain of 1
    and a random bias table, as the paper's do before pre-training; those that are left out are
    dropped. A T5 becomes local with r = 127, and equals the original while r ≥ L.

    Args:
        attention: of the encoder, by default the original's.
        radius, block: r and k, by default the original's.

    Raises:
        LongspanError: another architecture.

    >>> model = longt5(T5ForConditionalGeneration.from_pretrained("google/t5-v1_1-base"))
    """
    config: Any = model.config
    if isinstance(config, LongT5Config):
        settings, weights = config.to_diff_dict(), model.state_dict()
        for derived in ("mixers", "encoder_mixers"):
            settings.pop(derived, None)
        alone = isinstance(model, LongT5Stack)
        if alone:
            weights = {f"encoder.{n}": t for n, t in weights.items()}
            settings["encoder_layers"] = None
    elif config.model_type in ("t5", "longt5"):
        settings, weights = _settings(config), renamed(model.state_dict())
        alone = not hasattr(model, "lm_head")
        if alone and hasattr(model, "decoder"):
            raise LongspanError(
                f"longt5 got a {type(model).__name__}, which has a decoder and no head: give the "
                "ForConditionalGeneration model, or the encoder alone."
            )
    else:
        raise LongspanError(
            f"longt5 converts t5 and longt5 models and got a {config.model_type}: use a checkpoint "
            "of one of these."
        )
    chosen = {"attention": attention, "radius": radius, "block": block}
    settings |= {name: value for name, value in chosen.items() if value is not None}
    with torch.random.fork_rng():
        made = LongT5ForSeq2SeqLM(LongT5Config(**settings))
    built = made.encoder if alone else made
    if alone:
        weights = {n.removeprefix("encoder."): t for n, t in weights.items() if n[:3] == "enc"}
    known = built.state_dict()
    fresh = (".far.", ".mixer.norm.")
    dropped = {n for n in weights if n not in known}
    if lost := {n for n in dropped if not any(part in n for part in fresh)}:
        raise LongspanError(f"longt5 has no place for {', '.join(sorted(lost))}.")
    missing = built.load_state_dict(
        {n: t for n, t in weights.items() if n in known}, strict=False
    ).missing_keys
    # A bias of a later layer is that of the first.
    needed = {n for n in missing if ".table." not in n and not any(part in n for part in fresh)}
    if needed:
        raise LongspanError(f"these are no complete T5 weights: they lack {sorted(needed)}.")
    return built.to(model.dtype).eval()  # pyright: ignore[reportArgumentType]


def _settings(config: Any) -> dict[str, Any]:
    """A LongT5Config's arguments from those of transformers."""
    long = config.model_type == "longt5"
    activation = {"gelu_new": "gelu"}.get(config.dense_act_fn, config.dense_act_fn)
    if activation != "relu" and config.dense_act_fn != "gelu_new":
        raise LongspanError(
            f"this checkpoint's feed-forward is {config.feed_forward_proj!r}; longt5 knows "
            "'relu', 'gated-relu' and 'gated-gelu'."
        )
    tied = config.scale_decoder_outputs
    return {
        "vocab_size": config.vocab_size,
        "width": config.d_model,
        "layers": config.num_decoder_layers,
        "encoder_layers": config.num_layers,
        "heads": config.num_heads,
        "head_width": config.d_kv,
        "inner": config.d_ff,
        "gated": config.is_gated_act,
        "activation": activation,
        "dropout": config.dropout_rate,
        "attention": config.encoder_attention_type if long else "local",
        "radius": config.local_radius if long else 127,
        "block": config.global_block_size if long else 16,
        "buckets": config.relative_attention_num_buckets,
        "distance": config.relative_attention_max_distance,
        "scale_outputs": tied,
        "tie_head": tied,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
    }
