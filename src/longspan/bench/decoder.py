"""The decoder of a comparison: the same for every row but for its mixer."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from longspan.bench.settings import Settings, Spec
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.nn import state_bytes
from longspan.registry import options, show
from longspan.testing.counting import flops

IGNORED = -100


class InSegments(nn.Module):
    """A causal language model that reads its input a segment at a time, its state carried.

    What a mechanism of kind memory is made for: read whole, a window would be one segment, and
    its memory empty throughout.
    """

    def __init__(self, model: LongspanForCausalLM, *, segment: int) -> None:
        super().__init__()
        self.model, self.segment = model, segment

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> CausalLMOutputWithPast:
        logits: list[Tensor] = []
        cache = past_key_values
        for part in input_ids.split(self.segment, dim=1):
            output = self.model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        whole, loss = torch.cat(logits, dim=1), None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                whole[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
            )
        return CausalLMOutputWithPast(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=whole,
            past_key_values=cache if use_cache else None,
        )


def decoder(
    spec: Spec, settings: Settings, *, inner: int | None = None, **changes: Any
) -> nn.Module:
    """The decoder with this mixer; `changes` set fields of its config.

    A mechanism of kind memory reads segments as long as its memory, and at most a quarter of the
    window.
    """
    fields: dict[str, Any] = {
        "vocab_size": 256,
        "width": settings.width,
        "layers": settings.layers,
        "heads": settings.heads,
        "length": settings.length,
        "position": "rope",
        "allow_leaks": settings.allow_leaks,
        **changes,
    }
    fields["inner"] = inner or 4 * fields["width"]
    known, remembers = options(spec.id), show(spec.id).kind == "memory"
    mixers = [{"id": spec.id, **spec.arguments}]
    model = LongspanForCausalLM(LongspanConfig(mixers=mixers, **fields))
    if not remembers:
        return model
    memory = spec.arguments.get("memory") or (known["memory"].default if "memory" in known else 0)
    segment = max(1, fields["length"] // 4)
    return InSegments(model, segment=min(memory, segment) if memory else segment)


def parameters(model: nn.Module) -> int:
    """Learnt numbers, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())


def training_flops(model: nn.Module, length: int) -> int:
    """Counted FLOPs of one token's forward and backward pass in a window of `length`."""
    tokens = torch.zeros(1, length, dtype=torch.long, device=next(model.parameters()).device)

    def run() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    total = flops(run)
    model.zero_grad(set_to_none=True)
    return total // length


def carried_bytes(model: nn.Module, length: int) -> int:
    """Bytes of the state after `length` tokens of one row."""
    tokens = torch.zeros(1, length, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        cache = model.eval()(input_ids=tokens, use_cache=True).past_key_values
    return state_bytes(cache.states)
