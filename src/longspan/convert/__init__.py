"""Changing the mechanism inside a pretrained model."""

from longspan.convert.longformer import longformer

__all__ = ["longformer"]
