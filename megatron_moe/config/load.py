"""From the command line to a typed `Config`, and every mistake at once. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_moe.config.cluster import PlanConfig
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.instantiation import leaves, refuse_instantiation
from megatron_moe.config.schema import Config, RecomputeConfig
from megatron_moe.config.validate import validate
from megatron_moe.precision import fastest_dtype

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
PRIMARY = {Config: "pretrain", PlanConfig: "plan"}  # files of conf, by what they are composed to
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)
T = TypeVar("T", bound=Config)


def register_schema(schema: type[Config] = Config) -> None:
    """Make the typed schema known to Hydra as `schema`, and let it compose values only."""
    refuse_instantiation()
    OmegaConf.register_new_resolver("fastest_dtype", fastest_dtype, replace=True)
    ConfigStore.instance().store(name="schema", node=schema)


def to_config(composed: DictConfig, schema: type[T] = Config) -> T:
    """A typed `Config`, or `ConfigError` for an option that does not exist or is missing.

    Merged into a fresh schema, because Hydra's `+key=value` opens the composed one.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True)
        plain.pop("hydra", None)
        return from_plain(plain, schema)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from None


def from_plain(saved: dict[str, Any], schema: type[T] = Config) -> T:
    """A typed `Config` of JSON values, such as a run left; options it does not name have their defaults.

    Raises:
        ConfigError: an option does not exist, or has the wrong type.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), saved))
    except OmegaConfBaseException as error:
        raise ConfigError(*(_unknown_options(saved, schema) or [_first_line(error)])) from None


def _unknown_options(saved: dict[str, Any], schema: type[Config]) -> list[str]:
    known = option_names(schema)
    return [
        f"{option}={value}: there is no such option"
        for option, value in leaves(saved)
        if not any(option == name or option.startswith(f"{name}.") for name in known)
    ]


def compose_config(overrides: Sequence[str]) -> Config:
    """Compose `conf/pretrain.yaml` with overrides, as `pretrain.py` does.

    Raises:
        ConfigError: with one line for each override that is wrong.
    """
    return _composed(overrides, Config)


def compose_plan(overrides: Sequence[str]) -> PlanConfig:
    """Compose `conf/plan.yaml` with overrides.

    Raises:
        ConfigError: with one line for each override that is wrong.
    """
    return _composed(overrides, PlanConfig)


def recompute_choice(name: str) -> RecomputeConfig:
    """A file of `conf/recompute`."""
    schema = OmegaConf.structured(RecomputeConfig)
    return OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.load(CONF_DIR / "recompute" / f"{name}.yaml")))


def _composed(overrides: Sequence[str], schema: type[T]) -> T:
    try:
        return _compose(overrides, schema)
    except (ConfigError, *COMPOSITION_ERRORS) as error:
        raise explain(overrides, error, schema) from None


def explain(arguments: Sequence[str], cause: Exception, schema: type[Config] = Config) -> ConfigError:
    """Everything that is wrong with a command line that did not compose.

    Each override is tried on top of those that work, config groups first, and the rules between options are checked
    on what is left, so that the user sees all of it at once; `cause` is told if that finds nothing.
    """
    parsed = get_args_parser().parse_args(list(arguments))
    folder = parsed.config_dir and Path(parsed.config_dir).resolve()
    accepted = [f"hydra.searchpath=['file://{folder}']"] if folder else []
    problems = []
    for override in sorted(parsed.overrides, key=lambda o: not _is_group(o)):
        try:
            _compose([*accepted, override], schema)
            accepted.append(override)
        except (ConfigError, *COMPOSITION_ERRORS) as error:
            problems.append(f"{override}: {_first_line(error)}{_suggestion(override, schema)}")
    if schema is Config:
        problems += _rule_problems(accepted)
    return ConfigError(*(problems or [_first_line(cause)]))


def _rule_problems(overrides: list[str]) -> tuple[str, ...]:
    try:
        config = _compose(overrides, Config)
        validate(config, None)
    except ConfigError as error:
        return error.problems
    return ()


def _suggestion(override: str, schema: type[Config]) -> str:
    """What exists under a similar name."""
    name = override.lstrip("+~").split("=", 1)[0]
    if (CONF_DIR / name).is_dir():
        choices = sorted(path.stem for path in (CONF_DIR / name).glob("*.yaml"))
        return f"; {name} is one of: {', '.join(choices)}"
    if name in ("data.train", "data.valid", "data.test"):
        return (
            "; in quotes for the shell: 'data.train=[{path: PREFIX, weight: 1.0, name: NAME}]', the last two optional"
        )
    options = [*option_names(schema), *(path.name for path in CONF_DIR.iterdir() if path.is_dir())]
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close and close[0] != name else ""


def option_names(schema: type, prefix: str = "") -> list[str]:
    """Every option of a schema, as group.option."""
    names = []
    for option in fields(schema):
        nested = option.default_factory
        is_group = isinstance(nested, type) and is_dataclass(nested)
        names += option_names(nested, f"{prefix}{option.name}.") if is_group else [f"{prefix}{option.name}"]
    return names


def _is_group(override: str) -> bool:
    name = override.lstrip("+~").split("=", 1)[0].split("@")[0]
    return (CONF_DIR / name).is_dir()


def _compose(overrides: Sequence[str], schema: type[T]) -> T:
    register_schema(schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = compose(PRIMARY[schema], list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(composed)
        return to_config(composed, schema)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_own_runs(arguments: Sequence[str]) -> None:
    """Refuse a sweep whose jobs would share a run.

    Raises:
        ConfigError: neither its name nor its folder differs between them.
    """
    named = [argument for argument in arguments if argument.startswith(("run.name=", "run.dir="))]
    parsed = OverridesParser.create().parse_overrides(named)
    if not any(override.is_sweep_override() or "${" in override.input_line for override in parsed):
        raise ConfigError("run.name: each job of a sweep needs its own, such as run.name='lr-${optimizer.lr}'")
