"""Which number format is fastest here, for `precision=auto`. Imports torch only when asked."""

from __future__ import annotations

import os
import time

FASTER = 1.5  # times, below AVX512-BF16's 2 and AMX's 7, above the 0.2 of CPUs without them
FASTEST_DTYPE = "MEGATRON_MOE_FASTEST_DTYPE"  # variable that tells it to the workers started here


def fastest_dtype(hidden_size: int) -> str:
    """`bf16` on GPUs, and on CPUs where a product of activations and a square weight is `FASTER` in it, else `fp32`.

    Such have AMX or AVX512-BF16. Measured once; nothing begins to use a GPU.
    """
    if FASTEST_DTYPE not in os.environ:
        is_faster = _num_gpus() > 0 or _speedup_of_bf16(hidden_size) >= FASTER
        os.environ[FASTEST_DTYPE] = "bf16" if is_faster else "fp32"
    return os.environ[FASTEST_DTYPE]


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _speedup_of_bf16(hidden_size: int) -> float:
    import torch

    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        tokens = torch.ones(1024, hidden_size, dtype=dtype)
        weight = torch.ones(hidden_size, hidden_size, dtype=dtype)
        times = []
        for _ in range(10):
            begin = time.perf_counter()
            (tokens @ weight).sum().item()
            times.append(time.perf_counter() - begin)
        seconds.append(min(times))
    return seconds[0] / seconds[1]
