"""The plan file: readable TOML that round-trips exactly."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, get_args

from shardstage.cluster.table import to_toml
from shardstage.errors import PlanError
from shardstage.graph.recompute import Recompute, StageRecompute, parse_recompute
from shardstage.layout import AXES, Mesh
from shardstage.plan.plan import (
    PLAN_VERSION,
    GradientDtype,
    Offload,
    Plan,
    Precision,
    ScheduleName,
    StageRange,
)

__all__ = ["load_plan", "plan_from_toml", "plan_to_toml", "save_plan"]


def plan_to_toml(plan: Plan) -> str:
    """The text of a plan file; ``plan_from_toml`` reads the equal plan back."""
    batch: dict[str, Any] = {"global_batch": plan.global_batch, "microbatch": plan.microbatch}
    if plan.sequence is not None:
        batch["sequence"] = plan.sequence
    return to_toml(
        {
            "version": plan.version,
            "graph": plan.graph_fingerprint,
            "mesh": {
                "dp": plan.mesh.dp,
                "tp": plan.mesh.tp,
                "pp": plan.mesh.pp,
                **({"cp": plan.mesh.cp} if plan.mesh.cp > 1 else {}),
                **({"ep": plan.ep} if plan.ep > 1 else {}),
                **({"etp": plan.etp} if plan.etp else {}),
                **({"order": plan.mesh.order} if plan.mesh.order != AXES else {}),
            },
            "batch": {**batch, "shares": plan.shares},
            "memory": {
                "zero": plan.zero,
                **({"zero_ranks": plan.zero_ranks} if plan.zero_ranks else {}),
                "recompute": str(plan.recompute),
                **(
                    {"stage_recompute": tuple(map(str, plan.stage_recompute))} if plan.stage_recompute else {}
                ),
                **({"recompute_modules": plan.recompute_modules} if plan.recompute_modules else {}),
                "precision": plan.precision,
                **({"gradients": plan.gradient_dtype} if plan.gradient_dtype else {}),
                **({"offload": plan.offload} if plan.offload != "none" else {}),
                "bucket_bytes": plan.bucket_bytes,
            },
            "tensor": {"sequence_parallel": plan.is_sequence_parallel, "replicate": plan.replicate},
            "compute": {"compile": plan.is_compiled},
            "pipeline": {
                "schedule": plan.schedule,
                **({"actions": plan.actions} if plan.actions else {}),
                "stage": [{"first": stage.first, "last": stage.last} for stage in plan.stages],
            },
        }
    )


def plan_from_toml(text: str, *, where: str = "plan.toml") -> Plan:
    """The plan that the text of a plan file says; ``PlanError`` names the place of whatever is wrong in it."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(
            f"{where} is not TOML: {error}", hint="shardstage plan --out plan.toml writes a valid one"
        ) from error
    top = _Section(tables, where, ("version", "graph", *_SECTIONS))
    version = top.whole("version", least=1)
    if version != PLAN_VERSION:
        raise PlanError(
            f"{where}: version {version} of the plan file is unknown to this release, which reads {PLAN_VERSION}",
            hint="shardstage plan --out plan.toml writes it anew",
        )
    sections = {name: top.section(name, keys) for name, keys in _SECTIONS.items()}
    mesh, batch, memory = sections["mesh"], sections["batch"], sections["memory"]
    tensor, compute, pipeline = sections["tensor"], sections["compute"], sections["pipeline"]
    return Plan(
        mesh=_mesh(mesh),
        ep=mesh.whole("ep", least=1, default=1),
        etp=mesh.choice("etp", (1,), default=1) if mesh.has("etp") else None,
        zero_ranks=memory.whole("zero_ranks", least=1) if memory.has("zero_ranks") else None,
        stage_recompute=tuple(
            _recompute_named(name, "stage_recompute", where) for name in memory.texts("stage_recompute")
        ),
        recompute_modules=memory.texts("recompute_modules"),
        stages=tuple(
            StageRange(first=stage.text("first"), last=stage.text("last"))
            for stage in pipeline.sections("stage", ("first", "last"))
        ),
        global_batch=batch.whole("global_batch", least=1),
        sequence=batch.whole("sequence", least=1) if batch.has("sequence") else None,
        microbatch=batch.whole("microbatch", least=1),
        shares=batch.wholes("shares"),
        zero=memory.choice("zero", (0, 1, 2, 3), default=0),
        recompute=_recompute_named(memory.text("recompute", default="none"), "recompute", where),
        precision=memory.choice("precision", get_args(Precision), default="float32"),
        gradient_dtype=memory.choice("gradients", get_args(GradientDtype), default="float32")
        if memory.has("gradients")
        else None,
        offload=memory.choice("offload", get_args(Offload), default="none"),
        bucket_bytes=memory.whole("bucket_bytes", least=1, default=Plan.bucket_bytes),
        schedule=pipeline.choice("schedule", get_args(ScheduleName), default="1f1b"),
        actions=pipeline.texts("actions"),
        is_sequence_parallel=tensor.flag("sequence_parallel"),
        replicate=tensor.texts("replicate"),
        is_compiled=compute.flag("compile"),
        graph_fingerprint=top.text("graph", default=""),
    )


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Reads a plan file; ``PlanError`` when it cannot be read or says something wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise PlanError(
            f"the plan file {os.fspath(path)} cannot be read: {reason}",
            hint='--plan "dp=2", or --plan auto',
        ) from error
    return plan_from_toml(text, where=os.fspath(path))


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes a plan file; ``PlanError`` when it cannot be written."""
    try:
        Path(path).write_text(plan_to_toml(plan), encoding="utf-8")
    except OSError as error:
        raise PlanError(
            f"the plan file {os.fspath(path)} cannot be written: {error.strerror}", hint="--out another.toml"
        ) from error


_SECTIONS: Final[dict[str, tuple[str, ...]]] = {
    "mesh": ("dp", "tp", "pp", "cp", "ep", "etp", "order"),
    "batch": ("global_batch", "sequence", "microbatch", "shares"),
    "memory": (
        *("zero", "zero_ranks", "recompute", "stage_recompute", "recompute_modules"),
        *("precision", "gradients", "offload", "bucket_bytes"),
    ),
    "tensor": ("sequence_parallel", "replicate"),
    "compute": ("compile",),
    "pipeline": ("schedule", "actions", "stage"),
}


def _mesh(section: _Section) -> Mesh:
    order = section.texts("order") if section.has("order") else AXES
    if sorted(order) != sorted(AXES):
        raise PlanError(
            f"the mesh's order {list(order)} does not name each axis once",
            hint=f"order = {list(AXES)}",
        )
    return Mesh(
        dp=section.whole("dp", least=1),
        tp=section.whole("tp", least=1),
        pp=section.whole("pp", least=1),
        cp=section.whole("cp", least=1, default=1),
        order=tuple(axis for name in order for axis in AXES if axis == name),
    )


def _recompute_named(name: str, key: str, where: str) -> StageRecompute:
    found = parse_recompute(name)
    if found is None:
        raise PlanError(
            f"{where}: {key} has {name!r}, which is not one of {', '.join(get_args(Recompute))}, nor a number of layers such as 'full:3'",
            hint='recompute = "full:3"' if key == "recompute" else 'stage_recompute = ["full:3", "none"]',
        )
    return found


class _Section:
    """One table of the file, whose keys are all known; every reader says where a value stands that it refuses."""

    def __init__(self, entries: Mapping[str, Any], where: str, known: tuple[str, ...]) -> None:
        self._entries = entries
        self._where = where
        for key in entries:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                raise PlanError(
                    f"{where}: unknown key {key!r}",
                    hint=f"{near[0]} = ..." if near else f"known: {', '.join(known)}",
                )

    def has(self, key: str) -> bool:
        return key in self._entries

    def section(self, key: str, known: tuple[str, ...]) -> _Section:
        entries = self._entries.get(key, {})
        self._require(isinstance(entries, Mapping), key, entries, "a table", f"[{key}]")
        return _Section(entries, f"{self._where} [{key}]", known)

    def sections(self, key: str, known: tuple[str, ...]) -> Iterator[_Section]:
        entries = self._take(key, 'first = "first op"', None)
        is_list = isinstance(entries, list) and all(isinstance(entry, Mapping) for entry in entries)
        self._require(is_list, key, entries, "a list of tables", f"[[pipeline.{key}]]")
        return (_Section(entry, f"{self._where} {key} {n}", known) for n, entry in enumerate(entries))

    def whole(self, key: str, *, least: int, default: int | None = None) -> int:
        value: int = self._take(key, str(max(least, 2)), default)
        is_right = _is_whole(value) and value >= least
        self._require(is_right, key, value, f"a whole number of at least {least}", f"{key} = {max(least, 2)}")
        return value

    def wholes(self, key: str) -> tuple[int, ...]:
        values: Any = self._take(key, "[8, 8]", None)
        is_right = isinstance(values, list) and all(_is_whole(v) and v >= 0 for v in values)
        self._require(is_right, key, values, "a list of whole numbers", f"{key} = [8, 8]")
        return tuple(values)

    def text(self, key: str, *, default: str | None = None) -> str:
        value: str = self._take(key, '"..."', default)
        self._require(isinstance(value, str), key, value, "text", f'{key} = "..."')
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        values: Any = self._entries.get(key, [])
        is_right = isinstance(values, list) and all(isinstance(v, str) for v in values)
        self._require(is_right, key, values, "a list of texts", f'{key} = ["lm_head.*"]')
        return tuple(values)

    def flag(self, key: str) -> bool:
        value: bool = self._entries.get(key, False)
        self._require(isinstance(value, bool), key, value, "true or false", f"{key} = true")
        return value

    def choice(self, key: str, choices: tuple[Any, ...], *, default: Any) -> Any:
        value = self._entries.get(key, default)
        is_right = any(value == choice and type(value) is type(choice) for choice in choices)
        listed = ", ".join(map(_written, choices))
        self._require(is_right, key, value, f"one of {listed}", f"{key} = {_written(default)}")
        return value

    def _take(self, key: str, example: str, default: Any) -> Any:
        if key not in self._entries and default is None:
            raise PlanError(f"{self._where}: {key} is missing", hint=f"{key} = {example}")
        return self._entries.get(key, default)

    def _require(self, is_right: bool, key: str, value: Any, wanted: str, hint: str) -> None:
        if not is_right:
            raise PlanError(f"{self._where}: {key} must be {wanted}, not {value!r}", hint=hint)


def _written(value: str | int) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
