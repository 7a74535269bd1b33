"""megatron-core 0.16.1 without Transformer Engine, on CPUs and GPUs alike.

`tests/distributed/test_workarounds.py` leaves each entry out in turn and goes red when megatron-core no longer needs it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed."""
    return importlib.util.find_spec("transformer_engine") is not None


def install() -> None:
    """Apply every work-around. Idempotent."""
    for apply in WORKAROUNDS.values():
        apply()


def _router_gemm() -> None:
    moe_utils.te_general_gemm = None


def _latent_projections() -> None:
    for name in ("TELinear", "TEColumnParallelLinear"):
        if not isinstance(getattr(multi_latent_attention, name), type):
            setattr(multi_latent_attention, name, type(name, (), {}))


WORKAROUNDS: dict[str, Callable[[], None]] = {
    "router_gemm": _router_gemm,
    "latent_projections": _latent_projections,
}
