"""Kernels for accelerators, chosen by device; the engines' plain forms serve everywhere else."""

from longspan.engines.backends.choice import choose, for_device, use

__all__ = ["choose", "for_device", "use"]
