"""Parts of `tools/plan.py`."""
