"""Transformer-XL (Dai et al., 2019)."""

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn import MultiHead, Position, Remember
from longspan.nn.positions import WithinReach
from longspan.registry import build, mechanism


@mechanism(
    Card(
        id="transformer-xl",
        name="Transformer-XL",
        kind="memory",
        family="recurrent-memory",
        paper="Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context",
        cite="Dai et al., ACL 2019",
        link="https://arxiv.org/abs/1901.02860",
        what="Keeps each layer's last inputs as a memory that the next segment attends to, with "
        "positions relative to the query.",
        modes={"causal", "step"},
        time="L*L*E + L*M*E + L*E*E + M*E*E",
        memory="M*E",
        tiny={"width": 24, "heads": 3, "memory": 256},
        exact={"width": 24, "heads": 3, "memory": 0},
    )
)
def transformer_xl(
    *,
    width: int,
    heads: int,
    head_width: int | None = None,
    memory: int = 512,
    memory_eval: int | None = None,
    same_length: bool = False,
    clamp_len: int | None = None,
    dropout: float = 0.0,
    relative: Position | None = None,
) -> Remember:
    """Causal attention over [SG(memory) ; segment] with relative positions (Sec. 3.2 and 3.3).

        A_ij = q_i·k_j + q_i·r_{i−j} + u·k_j + v·r_{i−j},   j ≤ i + M

    The state is the layer's last M inputs. A stack reaches back O(layers · M).

    Args:
        memory, memory_eval: M in training and in evaluation.
        same_length: every query sees exactly the last M keys, itself among them.
        clamp_len: distances beyond it count as it.
        relative: a relative position shared with other layers; by default one of its own (untied
            u and v).

    Raises:
        LongspanError: a negative memory, or none with same_length.
    """
    position: Position = relative or build(
        "transformer-xl-relative-position",
        width=width,
        heads=heads,
        head_width=head_width or width // heads,
        clamp_len=clamp_len,
    )
    if same_length:
        reaches = memory, memory if memory_eval is None else memory_eval
        if min(reaches) < 1:
            raise LongspanError(
                f"transformer-xl got memory={memory}, memory_eval={memory_eval} with same_length, "
                "under which a query sees as many keys: give 1 or more."
            )
        position = WithinReach(position, *reaches)
    attention = build("multi-head-attention", causal=True, backend="tiled", dropout=dropout)
    mixer = MultiHead(
        attention,
        width=width,
        heads=heads,
        head_width=head_width,
        position=position,
        biases=False,
    )
    return Remember(mixer, memory=memory, memory_eval=memory_eval)
