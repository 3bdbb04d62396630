"""Token Turing Machines for video and other sequences of frames (Ryoo et al., 2022)."""

from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import ModelOutput  # pyright: ignore[reportPrivateImportUsage]

from longspan import hub, registry
from longspan.errors import LongspanError
from longspan.shapes import Keep

Labels = Int[Tensor, "B T"] | Float[Tensor, "B T _"]


class TokenTuringConfig(PreTrainedConfig):
    """A model of a class, or of several, for each step of a sequence of frames.

    Args:
        channels, size, patch: of the frames, square and cut into square patches.
        machine: options of `token-turing-machine`.
        loss: `one` class a step, or `many`, each 0 or 1.
    """

    model_type = "longspan-token-turing"
    __no_type_check__ = True

    width: int = 512
    heads: int = 8
    channels: int = 3
    size: int = 224
    patch: int = 16
    classes: int = 2
    loss: Literal["one", "many"] = "one"
    machine: dict[str, Any] | None = None


class Patches(nn.Module):
    """(frames, channels, size, size) → (frames, patches, width), with learned positions."""

    def __init__(self, config: TokenTuringConfig) -> None:
        super().__init__()
        self.cut = nn.Conv2d(config.channels, config.width, config.patch, config.patch)
        count = (config.size // config.patch) ** 2
        self.place = nn.Embedding(count, config.width)

    def forward(self, frames: Float[Tensor, "N channels h w"]) -> Float[Tensor, "N n E"]:
        return self.cut(frames).flatten(2).mT + self.place.weight


class TokenTuringModel(hub.Pretrained):
    """Frames → tokens → the machine → the mean of its outputs → classes, at every step.

    Args:
        encoder: any module (N, …) → (N, n, width) in place of patches; it is saved with the model,
            and given again to `from_pretrained`.

    Raises:
        LongspanError: patches that do not cut the frames, or frames of too few axes.
    """

    config: TokenTuringConfig
    config_class = TokenTuringConfig
    _is_stateful = False
    supports_gradient_checkpointing = False

    def __init__(self, config: TokenTuringConfig, encoder: nn.Module | None = None) -> None:
        super().__init__(config)
        if encoder is None and config.size % config.patch:
            raise LongspanError(
                f"frames of {config.size} do not divide into patches of {config.patch}: change one."
            )
        self.encoder = Patches(config) if encoder is None else encoder
        self.machine = registry.build(
            "token-turing-machine", width=config.width, heads=config.heads, **(config.machine or {})
        )
        self.score = nn.Linear(config.width, config.classes)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the constructor has initialised everything."""

    def forward(
        self,
        frames: Float[Tensor, "B T *frame"],
        state: Tensor | None = None,
        *,
        keep: Keep | None = None,
        labels: Labels | None = None,
    ) -> ModelOutput:
        """`logits` B T classes, the `state` after the last frame, and the mean `loss` in nats.

        Args:
            state: what an earlier call returned, to go on from; detach it to cut gradients.
            keep: B T; masked frames neither count in the loss nor change the memory.
        """
        if frames.dim() < 3:
            raise LongspanError(
                f"frames are {tuple(frames.shape)}; expected batch × time × one frame's axes."
            )
        tokens = self.encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        o, state = self.machine.sequence(tokens, state, keep=keep)
        logits = self.score(o.mean(2))
        loss = None
        if labels is not None:
            many = self.config.loss == "many"
            each = (
                F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
                if many
                else F.cross_entropy(logits.mT, labels, reduction="none")
            )
            seen = each.new_ones(each.shape) if keep is None else keep.to(each.dtype)
            loss = (each * seen).sum() / seen.sum().clamp(min=1)
        found = {"loss": loss, "logits": logits, "state": state}
        return ModelOutput({n: t for n, t in found.items() if t is not None})


hub.register(TokenTuringConfig, {"AutoModel": TokenTuringModel})
