"""``RunConfig``: everything that a training run was asked for, and its readable file ``run.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from shardstage.cluster.table import to_toml
from shardstage.data import DataConfig
from shardstage.errors import ConfigError
from shardstage.plan.plan import Precision
from shardstage.runtime.optimizer import OptimizerConfig

__all__ = ["RunConfig", "load_run_config", "run_config_from_toml", "run_config_to_toml"]

Device = Literal["auto", "cpu", "cuda"]


_LEAST = MappingProxyType(
    {
        "ranks": 1,
        "steps": 0,
        "global_batch": 1,
        "seed": 0,
        "checkpoint_every": 0,
        "keep_checkpoints": 1,
        "timeout_s": 0.1,
    }
)


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
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                default = RunConfig.__dataclass_fields__[name].default
                raise ConfigError(
                    f"{name} = {getattr(self, name)} is too small", hint=f"{name} = {default or least}"
                )
        if self.precision == "float16":
            raise ConfigError(
                "float16, whose losses want scaling, is planned and priced, but not run by this release",
                hint='precision = "float32", or "bfloat16"',
            )
        _check_choice("precision", self.precision, tuple(p for p in get_args(Precision) if p != "float16"))
        _check_choice("device", self.device, get_args(Device))
        _check_choice("kind", self.optimizer.kind, ("adamw", "sgd"))
        for optimizer_field in fields(OptimizerConfig):
            value = getattr(self.optimizer, optimizer_field.name)
            if isinstance(value, int | float) and value < 0:
                raise ConfigError(
                    f"[optimizer] {optimizer_field.name} = {value} is negative",
                    hint=f"{optimizer_field.name} = {optimizer_field.default}",
                )

    def is_checkpoint_due(self, num_steps: int) -> bool:
        """Whether a checkpoint is made after so many steps."""
        is_due = self.checkpoint_every > 0 and num_steps % self.checkpoint_every == 0
        return is_due or num_steps == self.steps

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


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = get_close_matches(value, choices, n=1, cutoff=0.5) or choices[:1]
        raise ConfigError(
            f"{name} = {value!r} is not one of {', '.join(choices)}", hint=f'{name} = "{near[0]}"'
        )


def _section(kind: type[Any], table: Any, where: str) -> Any:
    if not isinstance(table, Mapping):
        raise ConfigError(
            f"{where} must be a table, not {table!r}", hint=f"[{where.split('[')[-1].rstrip(']')}]"
        )
    known = {f.name: f.default for f in fields(kind)}
    values = {}
    for key, value in table.items():
        if key not in known:
            raise _unknown_key(key, value, known, where)
        values[key] = (
            value
            if isinstance(value, DataConfig | OptimizerConfig)
            else _typed(value, known[key], key, where)
        )
    return kind(**values)


def _unknown_key(key: str, value: Any, known: Collection[str], where: str) -> ConfigError:
    near = get_close_matches(key, known, n=1)
    example = (
        f"[{near[0]}]" if near and isinstance(value, Mapping) else "".join(f"{name} = ..." for name in near)
    )
    return ConfigError(f"{where}: unknown key {key!r}", hint=example or f"known: {', '.join(known)}")


def _typed(value: Any, default: Any, key: str, where: str) -> Any:
    """The value in the type of the field's default; numbers may be written without a point, tuples as lists."""
    if key == "max_grad_norm":
        default = 1.0
    wanted, read = _reader(default)
    found = read(value)
    if found is None:
        example = '["text"]' if default == () else _as_toml(default)
        raise ConfigError(f"{where}: {key} must be {wanted}, not {value!r}", hint=f"{key} = {example}")
    return None if key == "max_grad_norm" and found == 0 else found


def _reader(default: Any) -> tuple[str, Callable[[Any], Any]]:
    """What a field with this default takes, in words, and how it is read: None for what it does not take."""
    match default:
        case bool():
            return "true or false", lambda value: value if isinstance(value, bool) else None
        case int():
            return "a whole number", lambda value: value if type(value) is int else None
        case float():
            return "a number", _number
        case str():
            return "text", lambda value: value if isinstance(value, str) else None
        case ():
            return "a list of texts", _texts
        case _:
            return f"a list of {len(default)} numbers", lambda value: _numbers(value, len(default))


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) else None


def _texts(value: Any) -> tuple[str, ...] | None:
    is_right = isinstance(value, list) and all(isinstance(part, str) for part in value)
    return tuple(value) if is_right else None


def _numbers(value: Any, length: int) -> tuple[float, ...] | None:
    numbers = tuple(map(_number, value)) if isinstance(value, list) else ()
    return None if len(numbers) != length or None in numbers else numbers  # type: ignore[return-value]


def _as_toml(value: Any) -> str:
    return to_toml({"x": value}).removeprefix("x = ").strip()
