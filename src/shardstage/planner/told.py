"""What is told of plans that were not chosen: another decision with its price and the reason, and points of the front."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from shardstage.cluster import Cluster
from shardstage.cost import Prediction
from shardstage.plan import Plan
from shardstage.planner.space import Schedule, Zero
from shardstage.units import format_bytes, format_ratio

__all__ = [
    "SHOWN_RATIO",
    "Alternative",
    "Point",
    "cause_text",
    "etp_change",
    "excess_text",
    "grown_most",
    "in_order",
    "leaving_text",
    "schedule_text",
    "slower_text",
    "zero_text",
]

CAUSES: Final = MappingProxyType(
    {
        "products": "matrix products do worse",
        "memory": "more memory traffic",
        "host": "launches hold the device up",
        "tp": "more waiting inside layers",
        "dp": "gradients and parameters are waited for",
        "pp": "a longer pipeline bubble",
        "uneven": "its stages are not equally long",
    }
)

SHOWN_RATIO: Final = 0.0005
"""Less than this is 0.0 % as ``format_ratio`` writes it."""


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A decision that was not taken: ``change`` says it (``tp 8 → 16``), ``reason`` why not; the price where it fits."""

    change: str
    reason: str
    prediction: Prediction | None


@dataclass(frozen=True, kw_only=True)
class Point:
    """A plan of the front: of those priced, nothing faster holds less.

    ``class_peaks`` are the bytes of the fullest rank of each class of devices, ``fill_ratio`` is the largest share of what a device can
    hold.
    """

    plan: Plan
    text: str
    prediction: Prediction
    class_peaks: tuple[int, ...]
    fill_ratio: float


def in_order(told: Iterable[Alternative]) -> tuple[Alternative, ...]:
    """Cheapest first, what does not fit last."""
    return tuple(
        sorted(told, key=lambda a: (a.prediction is None, a.prediction.step_time_s if a.prediction else 0.0))
    )


def slower_text(best: Prediction, other: Prediction, why: str) -> str:
    """By how much another plan is slower than the best, and why."""
    ratio = other.step_time_s / best.step_time_s - 1
    return "as fast" if ratio < SHOWN_RATIO else f"{format_ratio(ratio)} slower: {why}"


def cause_text(
    best: Prediction, other: Prediction, *, again_s: float, by_tp: str, uneven_s: float = 0.0
) -> str:
    """The cause that grew most. ``again_s`` are seconds that the other plan computes again beyond the best one, ``uneven_s`` those that its
    busiest rank computes more than the mean, beyond the best one's; ``by_tp`` follows where waiting inside layers is the cause."""
    if 2 * again_s > other.step_time_s - best.step_time_s:
        return "to fit, more is computed again"
    grown = _grown(best, other)
    computed_s = grown["products"] + grown["memory"]
    if 2 * uneven_s > computed_s:  # the busiest rank has other layers, not slower ones
        del grown["products"], grown["memory"]
        grown["uneven"] = computed_s
    cause = max(grown, key=grown.__getitem__)
    return CAUSES[cause] + (by_tp if cause == "tp" else "")


def grown_most(best: Prediction, other: Prediction) -> str:
    """The cause whose seconds grew most."""
    grown = _grown(best, other)
    return max(grown, key=grown.__getitem__)


def _grown(best: Prediction, other: Prediction) -> dict[str, float]:
    return {cause: other.parts[cause] - seconds for cause, seconds in best.parts.items()}


def excess_text(who: str, num_bytes: int, limit_bytes: int) -> str:
    """That ranks, named where there are several kinds, hold more than they may."""
    where = f"{who} at " if who else ""
    return f"does not fit: {where}{format_bytes(num_bytes)} of {format_bytes(limit_bytes)}"


def leaving_text(cluster: Cluster, tp: int) -> str:
    """What follows the waiting of so many tensor-parallel ranks, where they are no longer joined by the fastest links."""
    near = cluster.devices_per(cluster.levels[0])
    return f", which leaves the {cluster.levels[0].name} of {near}" if tp > near else ""


def zero_text(zero: Zero) -> str:
    return str(zero.level) if zero.num_ranks is None else f"{zero.level} over {zero.num_ranks}"


def schedule_text(schedule: Schedule) -> str:
    return schedule.name if schedule.per_rank == 1 else f"{schedule.name} v={schedule.per_rank}"


def etp_change(tp: int, *, is_whole: bool) -> str:
    """Between experts that are ``is_whole`` on each tensor-parallel rank and experts that all of them cut."""
    return f"etp 1 → {tp}" if is_whole else f"etp {tp} → 1"
