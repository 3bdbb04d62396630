"""Llama and the models that name their parts as it does: Mistral, Qwen2, Qwen3."""

from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from longspan.convert.swapped import Origin, Sizes, Swapped
from longspan.shapes import Inputs


class Llama(Swapped):
    """Rotary positions are the model's own, whatever scales them; Qwen3 norms heads before."""

    types = frozenset({"llama", "mistral", "qwen2", "qwen3"})
    place = "layers.{}.self_attn"
    drops = "attention_dropout"
    known = frozenset(
        {
            *("attention_bias", "attention_dropout", "head_dim", "hidden_act", "hidden_size"),
            *("initializer_range", "intermediate_size", "max_position_embeddings"),
            *("max_window_layers", "mlp_bias", "num_attention_heads", "num_hidden_layers"),
            *("num_key_value_heads", "rms_norm_eps", "rope_parameters"),
        }
    )
    neutral = {  # noqa: RUF012
        "layer_types": "full_attention",
        "partial_rotary_factor": 1.0,
        "pretraining_tp": 1,
    }

    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any

    @classmethod
    def measure(cls, original: Any) -> Sizes:
        width, head_width = original.q_proj.in_features, original.head_dim
        heads, kv_heads = (
            linear.out_features // head_width for linear in (original.q_proj, original.k_proj)
        )
        return Sizes(width, heads, kv_heads, head_width)

    def project(self, x: Inputs) -> dict[Origin, Tensor]:
        return {"q": self.q_proj(x), "k": self.k_proj(x), "v": self.v_proj(x)}

    def copied(self, origin: Origin) -> nn.Linear:
        return deepcopy(getattr(self, f"{origin}_proj"))

    def normed(self, t: Tensor, origin: Origin) -> Tensor:
        norm = getattr(self, f"{origin}_norm", None)
        return t if norm is None else norm(t)

    def turned(self, t: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """t cos + (−t₂; t₁) sin, cos and sin being B L D and t₁, t₂ the halves of t."""
        cos, sin = (p[:, None] for p in positions)
        first, second = t.chunk(2, dim=-1)
        return t * cos + torch.cat([-second, first], dim=-1) * sin

    def output(self, o: Float[Tensor, "B L HD"]) -> Inputs:
        return self.o_proj(o)
