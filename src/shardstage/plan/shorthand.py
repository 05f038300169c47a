"""``Request``: the few decisions a person types (``dp=2,tp=2,zero=1``), each of them open where nothing was said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

from shardstage.errors import PlanError
from shardstage.graph.recompute import PartialRecompute, Recompute, StageRecompute, parse_recompute
from shardstage.plan.plan import GradientDtype, Offload, Plan, Precision, ScheduleName

__all__ = ["Request", "decision_named", "format_request", "named_decisions", "parse_request", "shorthand"]

EXAMPLE: Final = '--plan "dp=2,tp=2"'


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What somebody asked of a plan; ``None`` leaves a decision to ``complete``.

    ``shares`` are relative: 5/3 gives the first data-parallel rank five samples for the second's three. ``stage_recompute`` may name runs
    of stages, ``full:2*3/none``; ``recompute_modules`` says what of a layer selective computes again.
    ``dp_outside`` puts data parallelism outside the pipeline. ``etp`` tensor-parallel ranks cut one expert (None: all).
    """

    dp: int | None = None
    tp: int = 1
    pp: int = 1
    is_sequence_parallel: bool = False
    zero: Literal[0, 1, 2, 3] = 0
    microbatch: int | None = None
    recompute: StageRecompute = "none"
    stage_recompute: tuple[StageRecompute, ...] = ()
    recompute_modules: tuple[str, ...] = ()
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    zero_ranks: int | None = None
    dp_outside: bool = False
    schedule: ScheduleName | Literal["optimal"] = "1f1b"
    stages_per_rank: int | None = None
    precision: Precision | None = None
    gradient_dtype: GradientDtype | None = None
    offload: Offload = "none"
    shares: tuple[int, ...] | None = None
    replicate: tuple[str, ...] = ()
    is_compiled: bool = False


def parse_request(text: str) -> Request:
    """The request that a shorthand such as ``"dp=2,tp=2,sp,zero=1,mb=4,shares=5/3"`` writes.

    A flag may stand alone: ``sp`` is ``sp=1``. Several stages a rank (``v=2``) run as ``interleaved-1f1b`` where nothing else is said.
    Raises ``PlanError`` with the offending part, and the nearest key for an unknown one.
    """
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, has_value, value = (piece.strip() for piece in part.partition("="))
        if key not in _KEYS:
            raise _unknown_key(key, text)
        name, read = _KEYS[key]
        if name in found:
            raise PlanError(f"plan {text!r} says {key} twice", hint=f"keep one of them: {part}")
        found[name] = read(key, value if has_value else None)
    if found.get("stages_per_rank", 1) > 1 and "schedule" not in found:
        found["schedule"] = "interleaved-1f1b"
    return Request(**found)


def named_decisions(text: str) -> frozenset[str]:
    """Which fields of a ``Request`` a shorthand names."""
    keys = (part.partition("=")[0].strip() for part in text.split(",") if part.strip())
    return frozenset(_KEYS[key][0] for key in keys if key in _KEYS)


def decision_named(field: str) -> str:
    """How a shorthand calls a field of a ``Request``: ``mb`` for ``microbatch``."""
    return next(key for key, (name, _) in _KEYS.items() if name == field and key not in _ALIASES)


def format_request(request: Request) -> str:
    """The shortest text that ``parse_request`` reads as ``request``."""
    default = Request()
    parts = []
    for key, (name, _) in _KEYS.items():
        value = getattr(request, name)
        if key in _ALIASES or value == getattr(default, name):
            continue
        parts.append(key if value is True else f"{key}={_as_text(value)}")
    return ",".join(parts)


def shorthand(plan: Plan, *, default_precision: Precision | None = None) -> str:
    """A plan as one could type it, without what follows from it; ``default_precision`` is one that need not be said."""
    return format_request(
        Request(
            dp=plan.mesh.dp,
            tp=plan.mesh.tp,
            pp=plan.mesh.pp,
            is_sequence_parallel=plan.is_sequence_parallel,
            zero=plan.zero,
            microbatch=plan.microbatch,
            recompute=plan.recompute,
            stage_recompute=plan.stage_recompute,
            recompute_modules=plan.recompute_modules,
            cp=plan.mesh.cp,
            ep=plan.ep,
            etp=plan.etp,
            zero_ranks=plan.zero_ranks,
            dp_outside=plan.mesh.order[0] == "dp",
            schedule=plan.schedule,
            stages_per_rank=None if plan.stages_per_rank == 1 else plan.stages_per_rank,
            precision=None if plan.precision == default_precision else plan.precision,
            gradient_dtype=plan.gradient_dtype,
            offload=plan.offload,
            replicate=plan.replicate,
            is_compiled=plan.is_compiled,
        )
    )


def _as_text(value: Any) -> str:
    if isinstance(value, tuple) and value and all(map(_is_recompute, value)):
        runs = [(str(mode), len(list(same))) for mode, same in groupby(value)]
        return "/".join(name if times == 1 else f"{name}*{times}" for name, times in runs)
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _is_recompute(value: Any) -> bool:
    return isinstance(value, PartialRecompute) or value in get_args(Recompute)


def _unknown_key(key: str, text: str) -> PlanError:
    near = get_close_matches(key.lower(), _KEYS, n=1, cutoff=0.5)
    known = ", ".join(name for name in _KEYS if name not in _ALIASES)
    return PlanError(
        f"plan {text!r}: {key!r} is not a key of a plan (known: {known})",
        hint=f'--plan "{near[0]}=..."' if near else EXAMPLE,
    )


def _count(key: str, value: str | None) -> int:
    if value is None or not value.isascii() or not value.isdigit() or int(value) < 1:
        raise PlanError(f"{key}={value or ''} must be a whole number of at least 1", hint=f'--plan "{key}=2"')
    return int(value)


def _flag(key: str, value: str | None) -> bool:
    meanings = {None: True, "1": True, "true": True, "0": False, "false": False}
    if value not in meanings:
        raise PlanError(f"{key}={value} must be 0 or 1", hint=f'--plan "...,{key}=1"')
    return meanings[value]


def _level(key: str, value: str | None) -> int:
    if value not in ("0", "1", "2", "3"):
        raise PlanError(
            f"{key}={value or ''} is not a level of ZeRO: 0 shards nothing over dp, 1 the optimizer's state, "
            "2 gradients too, 3 parameters too",
            hint=f'--plan "{key}=3"',
        )
    return int(value)


def _counts(key: str, value: str | None) -> tuple[int, ...]:
    parts = (value or "").split("/")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise PlanError(
            f"{key}={value or ''} must be whole numbers, one for each data-parallel rank",
            hint=f'--plan "dp=2,{key}=5/3"',
        )
    return tuple(int(part) for part in parts)


def _mode(key: str, value: str | None) -> StageRecompute:
    """What every stage recomputes: ``full``, or a part of its layers, ``full:3``."""
    found = parse_recompute({"1": "full", "0": "none"}.get(value or "", value or ""))
    if found is None:
        near = get_close_matches(value or "", get_args(Recompute), n=1) or get_args(Recompute)[:1]
        raise PlanError(
            f"{key}={value or ''} is not one of {', '.join(get_args(Recompute))}, nor a number of layers such as full:3, "
            "selective:3 or full:3+selective",
            hint=f'--plan "...,{key}={near[0]}"',
        )
    return found


def _modes(key: str, value: str | None) -> tuple[StageRecompute, ...]:
    """What each stage recomputes: ``full*3/full:2/none``."""
    found: list[StageRecompute] = []
    for part in (value or "").split("/"):
        name, _, times = part.partition("*")
        mode = parse_recompute(name)
        if mode is None or (times and not times.isdigit()):
            raise PlanError(
                f"{key}={value or ''} must be {', '.join(get_args(Recompute))}, or a number of layers such as full:3, for each stage, "
                "a run of equal ones as full*3",
                hint=f'--plan "pp=4,{key}=full:2*3/none"',
            )
        found += [mode] * int(times or 1)
    return tuple(found)


def _globs(key: str, value: str | None) -> tuple[str, ...]:
    if not value:
        raise PlanError(f"{key}= names no parameter", hint=f'--plan "tp=2,{key}=lm_head.*"')
    return tuple(value.split("/"))


def _modules(key: str, value: str | None) -> tuple[str, ...]:
    found = tuple((value or "").split("/"))
    if not all(found):
        raise PlanError(
            f"{key}={value or ''} names no module", hint=f'--plan "...,recompute=selective,{key}=*.mlp/*norm"'
        )
    return found


def _choice(choices: tuple[str, ...], aliases: Mapping[str, str]) -> Callable[[str, str | None], str]:
    def read(key: str, value: str | None) -> str:
        meant = aliases.get(value or "", value)
        if meant not in choices:
            near = get_close_matches(value or "", choices, n=1) or choices[:1]
            raise PlanError(
                f"{key}={value or ''} is not one of {', '.join(choices)}",
                hint=f'--plan "...,{key}={near[0]}"',
            )
        return meant

    return read


_SHORT_DTYPES: Final = MappingProxyType(
    {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
)
_PRECISIONS: Final = _choice(get_args(Precision), _SHORT_DTYPES)

_SCHEDULES: Final = (*(name for name in get_args(ScheduleName) if name != "custom"), "optimal")
"""Those that can be typed; ``optimal`` is searched, and written out as a custom one."""

_KEYS: Final[Mapping[str, tuple[str, Callable[[str, str | None], Any]]]] = MappingProxyType(
    {
        "dp": ("dp", _count),
        "tp": ("tp", _count),
        "pp": ("pp", _count),
        "sp": ("is_sequence_parallel", _flag),
        "zero": ("zero", _level),
        "mb": ("microbatch", _count),
        "microbatch": ("microbatch", _count),
        "recompute": ("recompute", _mode),
        "stages": ("stage_recompute", _modes),
        "modules": ("recompute_modules", _modules),
        "cp": ("cp", _count),
        "ep": ("ep", _count),
        "etp": ("etp", _count),
        "zr": ("zero_ranks", _count),
        "outer": ("dp_outside", _flag),
        "schedule": ("schedule", _choice(_SCHEDULES, {"one_f_one_b": "1f1b"})),
        "v": ("stages_per_rank", _count),
        "dtype": ("precision", _PRECISIONS),
        "precision": ("precision", _PRECISIONS),
        "grads": ("gradient_dtype", _choice(get_args(GradientDtype), _SHORT_DTYPES)),
        "offload": ("offload", _choice(get_args(Offload), {})),
        "shares": ("shares", _counts),
        "replicate": ("replicate", _globs),
        "compile": ("is_compiled", _flag),
    }
)
_ALIASES: Final = frozenset({"microbatch", "precision"})
