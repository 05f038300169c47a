"""``--fix``: decisions that a search may not change; what it would not keep to is refused before anything takes time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shardstage.errors import PlanError
from shardstage.graph.recompute import is_selective
from shardstage.plan import Request, named_decisions, parse_request

__all__ = ["Fixed", "parse_fixed"]

RUNNABLE: Final = "runnable"

KEPT: Final = "dp, tp, pp, sp, zero, zr, mb, recompute, modules, cp, ep, etp, outer, schedule, v, dtype, grads, offload, compile"
"""What a search keeps to (``planner.space``, ``planner.mixed.space``)."""

ONLY_PRICED: Final = "cp, ep, etp, zr, outer"
"""What this release does not run (``plan.check.require_runnable``), as it does no float16."""


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Decisions as one types them; ``is_runnable`` leaves out what this release only prices."""

    decisions: str = ""
    is_runnable: bool = True

    @property
    def request(self) -> Request:
        return parse_request(self.decisions)

    @property
    def names(self) -> frozenset[str]:
        """The fields of the request that are decided."""
        return named_decisions(self.decisions)


def parse_fixed(text: str, *, plan: str) -> Fixed:
    """What ``--fix`` says. ``PlanError`` for what no search keeps to, and where ``plan`` leaves nothing to search."""
    parts = _parts(text)
    if parts and plan != "auto":
        raise PlanError(
            f"--fix {text} says what a search may not change, and --plan {plan} leaves nothing to search",
            hint=f'--plan auto --fix "{text}"',
        )
    decisions = ",".join(part for part in parts if part != RUNNABLE)
    fixed = Fixed(decisions=decisions, is_runnable=RUNNABLE in parts)
    _require_readable(fixed)
    _require_kept(decisions)
    _require_selective(fixed)
    if fixed.is_runnable:
        _require_runnable(fixed)
    return fixed


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _require_readable(fixed: Fixed) -> None:
    try:
        parse_request(fixed.decisions)
    except PlanError as error:
        hint = (error.hint or "").replace("--plan", "--fix")
        message = error.message.removeprefix(f"plan {fixed.decisions!r}: ")
        raise PlanError(f"--fix {fixed.decisions}: {message}", hint=hint) from error


def _require_kept(decisions: str) -> None:
    for part in _parts(decisions):
        if not named_decisions(part) <= named_decisions(KEPT) or part == "schedule=optimal":
            raise PlanError(
                f"--fix {part}: a search does not choose that, and would not keep to it; it keeps to {KEPT}",
                hint=f'--plan "{decisions}" is the whole plan, nothing is searched',
            )


def _require_selective(fixed: Fixed) -> None:
    request = fixed.request
    if request.recompute_modules and "recompute" in fixed.names and not is_selective(request.recompute):
        named = "/".join(request.recompute_modules)
        raise PlanError(
            f"--fix {fixed.decisions}: modules={named} says what selective recomputation means, and recompute={request.recompute} has none",
            hint=f'--fix "recompute=selective,modules={named}"',
        )


def _require_runnable(fixed: Fixed) -> None:
    for part in _parts(fixed.decisions):
        asked = parse_request(part)
        is_only_priced = named_decisions(part) <= named_decisions(ONLY_PRICED) and asked != Request()
        if is_only_priced or asked.precision == "float16":
            raise PlanError(
                f"--fix {RUNNABLE},{part}: {part} is planned and priced, but not run by this release",
                hint=f'--fix "{fixed.decisions}"',
            )
