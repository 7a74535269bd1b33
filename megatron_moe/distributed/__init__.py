"""Ranks: local workers, process groups, megatron-core on a CPU."""
