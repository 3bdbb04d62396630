"""Decoding-time methods: calibration with guarantees, early exits."""
