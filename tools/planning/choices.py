"""Files that tools/plan.py writes for `--config-dir`."""

from pathlib import Path

from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import CONF_DIR


def new_choice(config_dir: Path, group: str, name: str) -> Path:
    """The file of a choice of a group, in a folder that exists.

    Raises:
        ConfigError: ours has one of that name, which would be taken.
    """
    path = config_dir / group / f"{name}.yaml"
    if (CONF_DIR / group / path.name).exists():
        raise ConfigError(f"--emit {name}: conf/{group} has a {path.name}, which would be taken; choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
