"""Measurements of `tools/benchmark.py`."""
