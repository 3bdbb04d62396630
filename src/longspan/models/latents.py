"""Models that read a set through latents: the Set Transformer (Lee et al., 2019)."""

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from longspan import hub
from longspan.errors import LongspanError
from longspan.mechanisms.latent.set_transformer import PMA, Convention, SetTransformer
from longspan.models.stack import padding


class SetTransformerConfig(PreTrainedConfig):
    """A Set Transformer.

    Args:
        input_width, output_width: of the elements of a set, and of what is said of it.
        outputs: k, how many things are said.
        inducing: m of ISAB in the encoder; None for SAB.
        layers, decoder_layers: ISAB or SAB before pooling, SAB after it.
        convention: the paper's, or the released code's, which has neither W_o nor an rFF in PMA.
        layer_norm: the released code has none by default.
    """

    model_type = "longspan-set-transformer"
    __no_type_check__ = True

    input_width: int = 2
    output_width: int = 1
    outputs: int = 1
    width: int = 128
    heads: int = 4
    layers: int = 2
    decoder_layers: int = 1
    inducing: int | None = 32
    convention: Convention = "paper"
    layer_norm: bool = True


class SetTransformerModel(hub.Pretrained):
    """rFF(SAB(PMA_k(encoder(X)))): invariant to the order of the set (Sec. 3.3).

    >>> model = SetTransformerModel(SetTransformerConfig(input_width=3, output_width=40))
    """

    config: SetTransformerConfig
    config_class = SetTransformerConfig
    _is_stateful = False

    def __init__(self, config: SetTransformerConfig) -> None:
        super().__init__(config)
        width, heads = config.width, config.heads

        def block(inducing: int | None) -> SetTransformer:
            return SetTransformer(
                width=width,
                heads=heads,
                inducing=inducing,
                convention=config.convention,
                norm=config.layer_norm,
            )

        self.embed = nn.Linear(config.input_width, width)
        self.encoder = nn.ModuleList(block(config.inducing) for _ in range(config.layers))
        self.pool = PMA(
            width=width,
            heads=heads,
            outputs=config.outputs,
            convention=config.convention,
            norm=config.layer_norm,
        )
        self.decoder = nn.ModuleList(block(None) for _ in range(config.decoder_layers))
        self.output = nn.Linear(width, config.output_width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the constructor has initialised everything."""

    @hub.can_return_tuple
    def forward(
        self,
        points: Float[Tensor, "B S _"],
        attention_mask: Tensor | None = None,
    ) -> BaseModelOutput:
        """What is said of each set, B k output_width.

        Args:
            attention_mask: B S; sets of unequal size are padded anywhere.

        Raises:
            LongspanError: elements of another width.
        """
        if points.shape[2] != self.config.input_width:
            raise LongspanError(
                f"the elements have {points.shape[2]} numbers each and the model was built for "
                f"{self.config.input_width}: build it with input_width={points.shape[2]}."
            )
        keep = padding(attention_mask, points.shape[1])
        if keep is not None:
            points = points.masked_fill(~keep[..., None], 0)
        x = self.embed(points)
        for block in self.encoder:
            x, _ = block(x, keep=keep)
        x = self.pool(x, keep=keep)
        for block in self.decoder:
            x, _ = block(x)
        return BaseModelOutput(last_hidden_state=self.output(x))


hub.register(SetTransformerConfig, {"AutoModel": SetTransformerModel})
