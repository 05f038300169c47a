"""``RunConfig``: everything that a training run was asked for, and its readable file ``run.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from shardstage.cluster.table import to_toml
from shardstage.data import DataConfig
from shardstage.errors import ConfigError
from shardstage.plan.plan import Precision
from shardstage.runtime.optimizer import OptimizerConfig

__all__ = ["RunConfig", "load_run_config", "run_config_from_toml", "run_config_to_toml"]

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run.

    ``model`` is a built-in name, a Hugging Face config or folder, or ``package.module:factory``; ``weights`` a safetensors folder to start
    from (empty: drawn from ``seed``). ``plan`` is ``auto``, a shorthand such as ``dp=2,tp=2``, or a plan file. ``ranks`` are started
    on this host unless torchrun or Slurm started them. A step trains on ``global_batch`` samples. ``checkpoint_every`` counts steps; 0
    saves only at the end. ``timeout_s`` ends a job whose ranks wait for each other that long.
    """

    model: str = "llama-tiny"
    weights: str = ""
    plan: str = "auto"
    cluster: str = "local"
    ranks: int = 1
    steps: int = 20
    global_batch: int = 16
    precision: Precision = "float32"
    seed: int = 0
    device: Device = "auto"
    out: str = ""
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    resume: bool = False
    export_hf: str = ""
    timeout_s: float = 600.0
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        for name, least in (
            ("ranks", 1),
            ("steps", 0),
            ("global_batch", 1),
            ("seed", 0),
            ("checkpoint_every", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name} = {getattr(self, name)} is too small", hint=f"{name} = {max(least, 1)}"
                )
        for name, choices in (("precision", get_args(Precision)), ("device", get_args(Device))):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} = {getattr(self, name)!r} is not one of {', '.join(choices)}",
                    hint=f'{name} = "{choices[0]}"',
                )

    def with_changes(self, **changes: Any) -> RunConfig:
        """This run with some fields replaced; keys of ``data`` and ``optimizer`` are written ``data.paths``."""
        nested: dict[str, dict[str, Any]] = {}
        flat: dict[str, Any] = {}
        for key, value in changes.items():
            section, _, name = key.rpartition(".")
            (nested.setdefault(section, {}) if section else flat)[name] = value
        for section, values in nested.items():
            flat[section] = replace(getattr(self, section), **values)
        return replace(self, **flat)


def load_run_config(path: str | Path) -> RunConfig:
    """Reads a run file; ``ConfigError`` names the file, an unknown key or a value of the wrong type."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the run file {path} cannot be read: {error.strerror}", hint="shardstage train --run run.toml"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the run file {path} is not text", hint="shardstage train --run run.toml"
        ) from error
    return run_config_from_toml(text, where=str(path))


def run_config_from_toml(text: str, *, where: str = "run.toml") -> RunConfig:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not TOML: {error}", hint='model = "llama-tiny"') from error
    data = _section(DataConfig, tables.pop("data", {}), f"{where} [data]")
    optimizer = _section(OptimizerConfig, tables.pop("optimizer", {}), f"{where} [optimizer]")
    config: RunConfig = _section(RunConfig, {**tables, "data": data, "optimizer": optimizer}, where)
    return config


def run_config_to_toml(config: RunConfig) -> str:
    """The text that ``run_config_from_toml`` reads back as the same run; a norm that is not limited is written 0."""
    tables = asdict(config)
    if tables["optimizer"]["max_grad_norm"] is None:
        tables["optimizer"]["max_grad_norm"] = 0.0
    return to_toml(tables)


def _section(kind: type[Any], table: Any, where: str) -> Any:
    if not isinstance(table, Mapping):
        raise ConfigError(
            f"{where} must be a table, not {table!r}", hint=f"[{where.split('[')[-1].rstrip(']')}]"
        )
    known = {f.name: f.default for f in fields(kind)}
    values = {}
    for key, value in table.items():
        if key not in known:
            near = get_close_matches(key, known, n=1)
            raise ConfigError(
                f"{where}: unknown key {key!r}",
                hint=f"{near[0]} = ..." if near else f"known: {', '.join(known)}",
            )
        values[key] = _typed(value, known[key], f"{where}: {key}")
    return kind(**values)


def _typed(value: Any, default: Any, where: str) -> Any:
    """The value in the type of the field's default; numbers may be written without a point, tuples as lists."""
    if where.endswith("max_grad_norm") and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) or None
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, bool | int | float | str) and type(value) is not type(default):
        raise ConfigError(
            f"{where} must be {type(default).__name__}, not {value!r}",
            hint=f"{where.split(': ')[-1]} = {default!r}".replace("'", '"'),
        )
    return value
