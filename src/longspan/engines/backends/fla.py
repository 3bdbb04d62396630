"""`scan.outer` by flash-linear-attention, where it is installed; not yet run on a GPU."""

import torch
from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]
from torch import Tensor


@torch.compiler.disable
def outer(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `triton_scan.outer`; heads stand behind tokens there."""
    kind = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    tokens_first = [t.to(kind).transpose(1, 2).contiguous() for t in (q, k, v)]
    o, last = chunk_simple_gla(
        *tokens_first,
        g=None if decay is None else decay.transpose(1, 2).contiguous(),
        scale=1.0,
        initial_state=state,
        output_final_state=True,
    )
    return o.transpose(1, 2).to(dtype), last
