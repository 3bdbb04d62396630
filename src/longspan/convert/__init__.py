"""Changing the mechanism inside a pretrained model."""

from longspan.convert.longformer import longformer
from longspan.convert.nystromformer import nystromformer

__all__ = ["longformer", "nystromformer"]
