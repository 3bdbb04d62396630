"""NAT, DiNAT and DiNAT_s: hierarchical vision models of neighborhood attention.

The names and shapes of the weights are those of transformers' DinatModel.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DinatConfig
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
)

from longspan import hub
from longspan.engines import grid
from longspan.errors import LongspanError, nearest

Images = Float[Tensor, "B channels height width"]
Maps = Float[Tensor, "B rows columns E"]


class NeighborhoodConfig(DinatConfig):
    """transformers' DinatConfig, with the tokenizer of DiNAT_s and dilations of "max".

    Args:
        dilations: one a block, level by level; "max" is ⌊shorter side / kernel_size⌋ of the map
            at hand.
        tokenizer: two overlapping 3×3 convolutions of stride 2 and one between levels, or
            patches of 4×4 and merging of 2×2 (Swin's layout, DiNAT_s).
    """

    model_type = "longspan-neighborhood"
    __no_type_check__ = True

    tokenizer: Literal["overlap", "patch"] = "overlap"


_NAT = {"depths": (3, 4, 18, 5)}
_SIZES: dict[str, dict[str, Any]] = {
    "mini": {"depths": (3, 4, 6, 5), "embed_dim": 64, "mlp_ratio": 3.0, "drop_path_rate": 0.1},
    "tiny": {**_NAT, "embed_dim": 64, "mlp_ratio": 3.0, "drop_path_rate": 0.2},
    "small": {**_NAT, "embed_dim": 96, "mlp_ratio": 2.0, "drop_path_rate": 0.3},
    "base": {**_NAT, "embed_dim": 128, "mlp_ratio": 2.0, "drop_path_rate": 0.5},
    "large": {**_NAT, "embed_dim": 192, "mlp_ratio": 2.0, "drop_path_rate": 0.35},
}
_SCALED = {"small", "base", "large"}
_SWIN: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (2, 2, 6, 2), "embed_dim": 96, "drop_path_rate": 0.2},
    "small": {"depths": (2, 2, 18, 2), "embed_dim": 96, "drop_path_rate": 0.3},
    "base": {"depths": (2, 2, 18, 2), "embed_dim": 128, "drop_path_rate": 0.5},
    "large": {"depths": (2, 2, 18, 2), "embed_dim": 192, "drop_path_rate": 0.35},
}


def alternating(
    depths: Sequence[int], largest: Sequence[int | Literal["max"]]
) -> list[list[int | Literal["max"]]]:
    """Per level, blocks of dilation 1 and the level's largest in turn (DiNAT, Sec. 3.3).

    >>> alternating((3, 2), (8, "max"))
    [[1, 8, 1], [1, 'max']]
    """
    return [
        [1 if i % 2 == 0 else most for i in range(n)]
        for n, most in zip(depths, largest, strict=True)
    ]


def neighborhood_config(
    name: str, *, largest: Sequence[int | Literal["max"]] = (8, 4, 2, 1), **fields: Any
) -> NeighborhoodConfig:
    """The published config of `nat-mini`, `dinat-large`, `dinat_s-tiny` and so on.

    Args:
        largest: dilation of every second block of each level; the papers' for 224 pixels.

    Raises:
        LongspanError: no such model.
    """
    family, _, size = name.partition("-")
    sizes = {"nat": _SIZES, "dinat": _SIZES, "dinat_s": _SWIN}.get(family, {})
    if size not in sizes or name == "nat-large":
        known = [f"{f}-{s}" for f in ("nat", "dinat") for s in _SIZES if (f, s) != ("nat", "large")]
        known += [f"dinat_s-{s}" for s in _SWIN]
        raise LongspanError(f"no model '{name}'{nearest(name, known)} Known: {', '.join(known)}.")
    chosen = dict(sizes[size])
    depths = chosen["depths"]
    if family == "dinat_s":
        chosen |= {"tokenizer": "patch", "mlp_ratio": 4.0}
    else:
        chosen["layer_scale_init_value"] = 1e-5 if size in _SCALED else 0.0
    chosen["num_heads"] = tuple(chosen["embed_dim"] // 32 * 2**i for i in range(len(depths)))
    steps = (1,) * len(depths) if family == "nat" else largest
    chosen["dilations"] = alternating(depths, steps)
    return NeighborhoodConfig(**(chosen | fields))


class _Neighborhood(nn.Module):
    def __init__(self, config: DinatConfig, width: int, heads: int, dilation: Any) -> None:
        super().__init__()
        side = 2 * config.kernel_size - 1
        self.heads, self.window, self.dilation = heads, config.kernel_size, dilation
        self.query, self.key, self.value = (
            nn.Linear(width, width, bias=config.qkv_bias) for _ in range(3)
        )
        self.rpb = nn.Parameter(torch.empty(heads, side, side))
        nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Maps) -> Maps:
        rows, columns = x.shape[1:3]
        step = self.dilation
        if step == "max":
            step = grid.widest(self.window, min(rows, columns))
        # Maps smaller than a window are filled up with zeros, which are seen (official code).
        least = self.window * step
        x = F.pad(x, (0, 0, 0, max(0, least - columns), 0, max(0, least - rows)))
        q, k, v = (
            rearrange(project(x), "B r c (H D) -> B H r c D", H=self.heads)
            for project in (self.query, self.key, self.value)
        )
        o = grid.neighbours(q, k, v, [grid.Axis(self.window, step)] * 2, table=self.rpb)
        return rearrange(o, "B H r c D -> B r c (H D)")[:, :rows, :columns]


class _Layer(nn.Module):
    def __init__(
        self, config: DinatConfig, width: int, heads: int, dilation: Any, drop: float
    ) -> None:
        super().__init__()
        inner, eps = int(config.mlp_ratio * width), config.layer_norm_eps
        self.layernorm_before = nn.LayerNorm(width, eps=eps)
        self.attention = nn.ModuleDict(
            {
                "self": _Neighborhood(config, width, heads, dilation),
                "output": nn.ModuleDict({"dense": nn.Linear(width, width)}),
            }
        )
        self.layernorm_after = nn.LayerNorm(width, eps=eps)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = nn.ModuleDict({"dense": nn.Linear(inner, width)})
        scale, self.drop = config.layer_scale_init_value, drop
        self.layer_scale_parameters = (
            nn.Parameter(torch.full((2, width), scale)) if scale > 0 else None
        )

    def _added(self, x: Tensor, y: Tensor, part: int) -> Tensor:
        if self.layer_scale_parameters is not None:
            y = self.layer_scale_parameters[part] * y
        if self.drop and self.training:  # stochastic depth, a whole image at a time
            alive = torch.rand(len(y), 1, 1, 1, device=y.device) >= self.drop
            y = y * alive / (1 - self.drop)
        return x + y

    def forward(self, x: Maps) -> Maps:
        y = self.attention["self"](self.layernorm_before(x))
        output: Any = self.attention["output"]
        x = self._added(x, output["dense"](y), 0)
        y = F.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        return self._added(x, self.output["dense"](y), 1)


class _Tokenizer(nn.Module):
    def __init__(self, config: NeighborhoodConfig) -> None:
        super().__init__()
        width, channels = config.embed_dim, config.num_channels
        self.patch_embeddings = nn.ModuleDict(
            {
                "projection": nn.Sequential(
                    nn.Conv2d(channels, width // 2, 3, stride=2, padding=1),
                    nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
                )
                if config.tokenizer == "overlap"
                else nn.Conv2d(channels, width, 4, stride=4)
            }
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Images) -> Maps:
        if isinstance(self.patch_embeddings["projection"], nn.Conv2d):
            height, width = images.shape[2:]
            images = F.pad(images, (0, -width % 4, 0, -height % 4))
        maps = self.patch_embeddings["projection"](images)
        return self.norm(rearrange(maps, "B E r c -> B r c E"))


class _Downsample(nn.Module):
    """Half the rows and columns at twice the width: a convolution, or merging of 2×2 cells."""

    def __init__(self, config: NeighborhoodConfig, width: int) -> None:
        super().__init__()
        self.overlaps = config.tokenizer == "overlap"
        self.reduction = (
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
            if self.overlaps
            else nn.Linear(4 * width, 2 * width, bias=False)
        )
        self.norm = nn.LayerNorm(2 * width if self.overlaps else 4 * width)

    def forward(self, x: Maps) -> Float[Tensor, "B half_rows half_columns 2*E"]:
        if self.overlaps:
            x = self.reduction(rearrange(x, "B r c E -> B E r c"))
            return self.norm(rearrange(x, "B E r c -> B r c E"))
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = rearrange(x, "B (r y) (c x) E -> B r c (x y E)", y=2, x=2)
        return self.reduction(self.norm(x))


class _Level(nn.Module):
    def __init__(self, config: NeighborhoodConfig, level: int) -> None:
        super().__init__()
        width, before = config.embed_dim * 2**level, sum(config.depths[:level])
        total = sum(config.depths)
        dilations: Any = config.dilations
        self.layers = nn.ModuleList(
            _Layer(
                config,
                width,
                config.num_heads[level],
                dilation,
                config.drop_path_rate * (before + i) / max(total - 1, 1),
            )
            for i, dilation in enumerate(dilations[level])
        )
        last = level == len(config.depths) - 1
        self.downsample = None if last else _Downsample(config, width)

    def forward(self, x: Maps) -> Maps:
        for layer in self.layers:
            x = layer(x)
        return x


class _Pretrained(hub.Pretrained):
    config: NeighborhoodConfig
    config_class = NeighborhoodConfig
    base_model_prefix = "dinat"
    main_input_name = "pixel_values"
    _is_stateful = False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class _Trunk(_Pretrained):
    def __init__(self, config: NeighborhoodConfig) -> None:
        super().__init__(config)
        if [len(d) for d in config.dilations or ()] != list(config.depths):
            raise LongspanError(
                f"dilations are {config.dilations} for depths {config.depths}: give one a block."
            )
        self.embeddings = _Tokenizer(config)
        levels = nn.ModuleList(_Level(config, i) for i in range(len(config.depths)))
        self.encoder = nn.ModuleDict({"levels": levels})

    def pyramid(self, pixel_values: Images) -> list[Maps]:
        """The tokenizer's output, then each level's, before it is halved."""
        x = self.embeddings(pixel_values)
        maps = [x]
        levels: Any = self.encoder["levels"]
        for level in levels:
            maps.append(level(x))
            x = maps[-1] if level.downsample is None else level.downsample(maps[-1])
        return maps


class NeighborhoodModel(_Trunk):
    """The last level's cells, normalised, and their mean.

    `hidden_states` are the maps of `pyramid`, B E rows columns.
    """

    def __init__(self, config: NeighborhoodConfig) -> None:
        super().__init__(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(self, pixel_values: Images) -> BaseModelOutputWithPooling:
        maps = self.pyramid(pixel_values)
        last = self.layernorm(maps[-1])
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=last.mean((1, 2)),
            hidden_states=tuple(rearrange(m, "B r c E -> B E r c") for m in maps),  # pyright: ignore[reportArgumentType]
        )


class NeighborhoodBackbone(_Trunk):
    """The feature maps of the levels in `config.out_features`, each under a norm of its own."""

    def __init__(self, config: NeighborhoodConfig) -> None:
        super().__init__(config)
        widths = [config.embed_dim, *(config.embed_dim * 2**i for i in range(len(config.depths)))]
        self.hidden_states_norms = nn.ModuleDict(
            {
                name: nn.LayerNorm(width)
                for name, width in zip(config.stage_names, widths, strict=True)
                if name in (config.out_features or ())
            }
        )
        self.post_init()

    def forward(self, pixel_values: Images) -> BackboneOutput:
        stages = zip(self.config.stage_names, self.pyramid(pixel_values), strict=True)
        norms = self.hidden_states_norms
        maps = [rearrange(norms[n](m), "B r c E -> B E r c") for n, m in stages if n in norms]
        return BackboneOutput(feature_maps=tuple(maps))  # pyright: ignore[reportArgumentType]


class NeighborhoodForImageClassification(_Pretrained):
    """A class from the mean of the last level's cells."""

    def __init__(self, config: NeighborhoodConfig) -> None:
        super().__init__(config)
        self.dinat = NeighborhoodModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 2)
        self.post_init()

    def forward(
        self, pixel_values: Images, labels: Int[Tensor, "B"] | None = None
    ) -> ImageClassifierOutput:
        logits = self.classifier(self.dinat(pixel_values).pooler_output)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]


hub.register(
    NeighborhoodConfig,
    {
        "AutoModel": NeighborhoodModel,
        "AutoBackbone": NeighborhoodBackbone,
        "AutoModelForImageClassification": NeighborhoodForImageClassification,
    },
)
