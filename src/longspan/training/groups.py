"""Which parameters decay, and which learn at a rate of their own."""

from typing import Any

from torch import nn

from longspan.nn import Position


def parameter_groups(model: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for a torch optimizer.

    Decay spares vectors (norms, biases), positions, and parameters that ask for it: a parameter
    with an attribute `_optim = {"lr": 1e-3, "weight_decay": 0.0}` gets that decay, and at most
    that learning rate (Gu et al., 2022, App. E, and the official code).

    >>> torch.optim.AdamW(parameter_groups(model, lr=3e-4, weight_decay=0.1))
    """
    positions = {
        id(p)
        for module in model.modules()
        if isinstance(module, Position)
        for p in module.parameters()
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim < 2 or id(parameter) in positions
        own = getattr(parameter, "_optim", None) or {}
        rate = min(lr, own.get("lr", lr))
        decay = own.get("weight_decay", 0.0 if spared else weight_decay)
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
