"""No configuration names code to be run: Hydra's own part neither. Imports no torch.

We read options only, but Hydra itself calls what `hydra.callbacks` and its logging name, before it hands over what it
has composed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf

from megatron_moe.config.errors import ConfigError

TARGET = "_target_"
# Hydra's own plugins, which it looks up among those that are installed.
PLUGINS = ("hydra.launcher", "hydra.sweeper")


def refuse_instantiation() -> None:
    """From here on Hydra composes nothing that would have it run what a file or an override names."""
    load = ConfigLoaderImpl.load_configuration
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def checked(self: ConfigLoaderImpl, *args: Any, **options: Any) -> DictConfig:
        composed = load(self, *args, **options)
        if problems := list(named_code(OmegaConf.to_container(composed, resolve=False))):
            raise ConfigError(*problems)
        return composed

    ConfigLoaderImpl.load_configuration = checked


def named_code(composed: dict[str, Any]) -> Iterator[str]:
    """What would be called, a line each.

    Args:
        composed: with Hydra's part, interpolations as they stand.
    """
    for option, value in leaves(composed):
        plugin, _, name = option.rpartition(".")
        if name == TARGET and plugin not in PLUGINS:
            yield f"{option}={value}: options are values; nothing is called by name; remove it"
        elif option.startswith(PLUGINS) and "${" in str(value):
            yield f"{option}={value}: must be a plain value"
    hydra = composed.get("hydra", {})
    if hydra.get("callbacks"):
        yield f"hydra.callbacks={hydra['callbacks']}: must be empty; Hydra would call them"
    if (hydra.get("job") or {}).get("env_set"):
        yield f"hydra.job.env_set={hydra['job']['env_set']}: must be empty; set variables in the shell"
    for name in ("hydra_logging", "job_logging"):
        if (hydra.get(name) or {}).get("root") is not None:
            yield f"hydra.{name}: must be none; Hydra would call the handlers it names"


def leaves(value: Any, option: str = "") -> Iterator[tuple[str, Any]]:
    """Options and their values in nested dicts and lists, as group.option."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield option, value
    else:
        for name, part in items:
            yield from leaves(part, f"{option}.{name}".lstrip("."))
