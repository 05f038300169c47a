"""``schedule_of``: the order in which a plan's pipeline ranks act."""

from __future__ import annotations

from shardstage.errors import PlanError, ProgramError
from shardstage.plan.plan import Plan
from shardstage.schedule import SCHEDULES, Schedule, check_schedule, make_schedule, parse_schedule

__all__ = ["schedule_of"]


def schedule_of(plan: Plan) -> Schedule:
    """The named schedule at the plan's sizes, or the one that it writes out; ``PlanError`` for one that cannot be."""
    try:
        if plan.schedule == "custom":
            schedule = parse_schedule("\n".join(plan.actions))
            check_schedule(schedule)
        else:
            schedule = make_schedule(
                plan.schedule,
                num_stages=len(plan.stages),
                num_ranks=plan.mesh.pp,
                num_microbatches=plan.num_microbatches,
            )
    except ProgramError as error:
        raise PlanError(
            f"schedule {plan.schedule}: {error.message}", hint=_hint(plan) or error.hint
        ) from error
    found = (schedule.num_ranks, schedule.num_stages, schedule.num_microbatches)
    if found != (plan.mesh.pp, len(plan.stages), plan.num_microbatches):
        raise PlanError(
            f"the plan's actions are for {found[0]} ranks, {found[1]} stages and {found[2]} microbatches, "
            f"and the plan has {plan.mesh.pp}, {len(plan.stages)} and {plan.num_microbatches}",
            hint='schedule = "1f1b" without actions',
        )
    return schedule


def _hint(plan: Plan) -> str:
    """How many stages a rank the named schedule takes, where it does not take the plan's."""
    kind = SCHEDULES.get(plan.schedule)
    if kind is None or kind.takes(plan.stages_per_rank):
        return ""
    fitting = next(v for v in (1, 2) if kind.takes(v))
    return f'--plan "pp={plan.mesh.pp},schedule={plan.schedule},v={fitting}"'
