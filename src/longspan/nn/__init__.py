"""What all mechanisms share: the protocols, MultiHead, Block, and generic states."""

from longspan.nn.blocks import Block, FeedForward, norm
from longspan.nn.heads import MultiHead, MultiHeadState
from longspan.nn.memory import Remember
from longspan.nn.protocols import Attention, Bias, Mixer, Position, Spread, Turn
from longspan.nn.state import (
    State,
    detach,
    fork,
    load_state,
    map_tensors,
    reset,
    save_state,
    select,
    state_bytes,
    tensors,
    to,
)

__all__ = [
    "Attention",
    "Bias",
    "Block",
    "FeedForward",
    "Mixer",
    "MultiHead",
    "MultiHeadState",
    "Position",
    "Remember",
    "Spread",
    "State",
    "Turn",
    "detach",
    "fork",
    "load_state",
    "map_tensors",
    "norm",
    "reset",
    "save_state",
    "select",
    "state_bytes",
    "tensors",
    "to",
]
