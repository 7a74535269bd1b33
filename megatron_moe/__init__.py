"""Pretraining of DeepSeekMoE-style models on megatron-core."""
