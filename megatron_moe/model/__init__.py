"""The DeepSeekMoE model on megatron-core."""
