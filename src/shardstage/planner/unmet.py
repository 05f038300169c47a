"""``unmet``: why no choice keeps to what is fixed, where sizes alone say so."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from shardstage.errors import PlanError
from shardstage.plan import decision_named
from shardstage.planner.space import Space

__all__ = ["unmet"]

AXES: Final = ("dp", "tp", "pp", "cp")


def unmet(
    who: str, space: Space, fixed: frozenset[str], num_units: int, *, opening: tuple[str, ...] | None = None
) -> PlanError:
    """The refusal for ``who``, a batch on so many ranks. ``opening`` are decisions of which each, left out alone, leaves a choice,
    None where nobody tried."""
    if opening == () and len(fixed) <= 1 and space.uses_all_ranks:
        return PlanError(
            f"no plan for {who} leaves none of them idle, and this release runs no other",
            hint=f"--batch {space.num_ranks}, or leave runnable out of --fix",
        )
    names = [decision_named(name) for name in sorted(fixed)]
    left_out = " or ".join(map(decision_named, opening or (fixed if len(fixed) == 1 else ())))
    if not left_out:
        left_out = f"{'one or more' if opening is None else 'more than one'} of {', '.join(names)}"
    reason = next(_reasons(space, fixed, num_units), None)
    return PlanError(
        f"no plan for {who} keeps to all that is fixed: {', '.join(names)}"
        + (f"; {reason}" if reason else ""),
        hint=f"leave {left_out} out of --fix",
    )


def _reasons(space: Space, fixed: frozenset[str], num_units: int) -> Iterator[str]:
    """What experts, sequences and links add to these is not said."""
    sizes = {axis: getattr(space, f"{axis}s")[0] for axis in AXES if axis in fixed}
    product = " × ".join(f"{axis}={size}" for axis, size in sizes.items())
    needed, num_ranks = math.prod(sizes.values()), space.num_ranks
    if needed > num_ranks:
        yield f"{product} needs {needed} ranks, and there are {num_ranks}"
    elif space.uses_all_ranks and num_ranks % needed:
        yield f"{product} needs a multiple of {needed} ranks, and there are {num_ranks}"
    dp = sizes.get("dp", 1)
    if dp > space.global_batch:
        yield f"dp={dp} leaves ranks without any of {space.global_batch} samples"
    share = -(-space.global_batch // dp)
    if "microbatch" in fixed and space.microbatches[0] > share:
        yield f"mb={space.microbatches[0]} is more than the {share} samples of a data-parallel rank"
    if not space.schedules:
        yield "the schedule does not run so many stages on a rank"
        return
    per_rank = min(schedule.per_rank for schedule in space.schedules)
    num_stages = per_rank * sizes.get("pp", 1)
    if num_stages > num_units:
        yield f"{num_stages} stages are more than the {num_units} parts that a search cuts the model into"
