"""GPT-2, whose projections of queries, keys and values are one."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from longspan.convert.swapped import Origin, Sizes, Swapped
from longspan.shapes import Inputs


class GPT2(Swapped):
    """Scaled as the checkpoint says, by layer too; positions were added before the first layer."""

    types = frozenset({"gpt2"})
    place = "h.{}.attn"
    drops = "attn_pdrop"
    known = frozenset(
        {
            *("activation_function", "attn_pdrop", "embd_pdrop", "initializer_range"),
            *("layer_norm_epsilon", "n_ctx", "n_embd", "n_head", "n_inner", "n_layer"),
            *("n_positions", "reorder_and_upcast_attn", "resid_pdrop", "scale_attn_weights"),
            *("scale_attn_by_inverse_layer_idx", "summary_activation", "summary_first_dropout"),
            *("summary_proj_to_labels", "summary_type", "summary_use_proj"),
        }
    )

    c_attn: Any
    c_proj: Any
    resid_dropout: Any

    @classmethod
    def measure(cls, original: Any) -> Sizes:
        heads = original.num_heads
        return Sizes(original.embed_dim, heads, heads, original.head_dim)

    def project(self, x: Inputs) -> dict[Origin, Tensor]:
        q, k, v = self.c_attn(x).chunk(3, dim=-1)
        return {"q": q, "k": k, "v": v}

    def copied(self, origin: Origin) -> nn.Linear:
        width, part = self.sizes.width, "qkv".index(origin)
        with torch.device("meta"):  # its weights are replaced
            linear = nn.Linear(width, width)
        # A Conv1D has its weight the other way round.
        columns = slice(part * width, (part + 1) * width)
        linear.weight = nn.Parameter(self.c_attn.weight.detach()[:, columns].T.contiguous())
        linear.bias = nn.Parameter(self.c_attn.bias.detach()[columns].clone())
        return linear

    def output(self, o: Float[Tensor, "B L HD"]) -> Inputs:
        return self.resid_dropout(self.c_proj(o))
