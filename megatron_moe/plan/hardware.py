"""Peak speed of GPUs. Pure; imports no torch."""

from __future__ import annotations

import re

# Dense bf16, by words of the name that the driver gives, those of a variant before those of all.
# Source: NVIDIA's data sheets of A100, H100, H200 and HGX B200, half of what they give with sparsity; H800 is an H100
# with fewer links.
PEAK_TERAFLOPS = {
    "H100 PCIe": 756,
    "H800 PCIe": 756,
    "H100 NVL": 835,
    "H200 NVL": 835,
    "A100": 312,
    "H100": 989,
    "H800": 989,
    "H200": 989,
    "B200": 2250,
}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a GPU in bf16 without sparsity; None: not known, as of a slice of one (MIG)."""
    if "MIG" in device_name:
        return None
    found = (peak for words, peak in PEAK_TERAFLOPS.items() if re.search(rf"\b{words}\b", device_name))
    peak = next(found, None)
    return None if peak is None else peak * 1e12
