"""Which optional GPU packages are installed. Imports none of them."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

from megatron_moe.config.errors import ConfigError


def quiet() -> None:
    """Hide megatron-core's warnings of what is absent and of its own deprecated calls, on every rank."""
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed."""
    return find_spec("transformer_engine") is not None


def has_fused_weight_gradient() -> bool:
    """Whether NVIDIA Apex is installed with the kernel that accumulates weight gradients in place."""
    return find_spec("fused_weight_gradient_mlp_cuda") is not None


def check_apex() -> None:
    """Refuse the web toolkit that PyPI distributes as `apex`, which megatron-core would take for NVIDIA's.

    Raises:
        ConfigError: it is installed.
    """
    spec = find_spec("apex")
    if spec is None:
        return
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        raise ConfigError(
            f"apex at {spec.origin}: is the web toolkit of PyPI, not NVIDIA Apex; `pip uninstall apex` "
            "(NVIDIA's is optional, for GPUs only, and not on PyPI)"
        )
