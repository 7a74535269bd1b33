"""Which number format is fastest here, for `precision=auto`. Imports torch only when asked."""

from __future__ import annotations

import os
import time

FASTEST_DTYPE = "MEGATRON_MOE_FASTEST_DTYPE"  # variable that tells it to the workers started here


def fastest_dtype(hidden_size: int) -> str:
    """`bf16` where a product of activations and a square weight takes at most half as long as in `fp32`, else that.

    Such are GPUs, and CPUs with AMX or AVX512-BF16. Measured once, on the GPU if there is one.
    """
    if FASTEST_DTYPE not in os.environ:
        os.environ[FASTEST_DTYPE] = "bf16" if _speedup_of_bf16(hidden_size) >= 2 else "fp32"
    return os.environ[FASTEST_DTYPE]


def _speedup_of_bf16(hidden_size: int) -> float:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        tokens = torch.ones(1024, hidden_size, dtype=dtype, device=device)
        weight = torch.ones(hidden_size, hidden_size, dtype=dtype, device=device)
        times = []
        for _ in range(10):
            begin = time.perf_counter()
            (tokens @ weight).sum().item()
            times.append(time.perf_counter() - begin)
        seconds.append(min(times))
    return seconds[0] / seconds[1]
