"""Changing the mechanism inside a pretrained model."""

from longspan.convert.bigbird import bigbird
from longspan.convert.longformer import longformer
from longspan.convert.nystromformer import nystromformer
from longspan.convert.smyrf import smyrf

__all__ = ["bigbird", "longformer", "nystromformer", "smyrf"]
