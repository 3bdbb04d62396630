"""Measuring mechanisms: `compare` (quality, speed, memory of a model) and `speed` (cost alone)."""
