"""Only kernels and reductions that give the same bits every time."""

from __future__ import annotations

import os

import torch

# NVIDIA's choices: https://docs.nvidia.com/megatron-core/developer-guide/0.20.0/user-guide/deterministic-training.html
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


def switch_on() -> None:
    """Before CUDA and NCCL start, which read the environment. megatron-core has its own switch, `deterministic_mode`.

    PyTorch also raises where it has no such kernel, and fills new memory, so that reading it early shows.
    """
    os.environ.update(ENVIRONMENT)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def is_on() -> bool:
    """Whether PyTorch raises rather than compute other bits another time."""
    return torch.are_deterministic_algorithms_enabled()


def describe() -> str:
    """What `switch_on` has switched."""
    variables = ", ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
    return (
        "deterministic: torch.use_deterministic_algorithms, cuDNN without autotuning, megatron-core's "
        f"deterministic_mode, {variables}"
    )
