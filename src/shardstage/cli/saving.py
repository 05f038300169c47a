"""Savers of last resort that would be faster, though the plan fits without them: said with what to type for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from shardstage.cli.choosing import Chosen, KnownModel, Question, choose_plan
from shardstage.cli.fixing import Fixed
from shardstage.cli.told import Fact
from shardstage.errors import PlanError
from shardstage.plan import shorthand
from shardstage.units import format_bytes, format_ratio

if TYPE_CHECKING:
    from shardstage.cluster import Cluster
    from shardstage.planner import Saving

__all__ = ["less_with_facts", "saving_facts", "searched_savings"]

WORTH_TELLING: Final = 0.01
"""Of a step: what is told spares at least so much, beyond what was told before it."""

SHOWN: Final = 0.0005
"""Less is 0.0 % as it is written."""


def searched_savings(
    question: Question, known: KnownModel, machine: Cluster, chosen: Chosen, savings: Sequence[Saving]
) -> Iterator[Saving]:
    """Each saving by the best plan with its savers, by a search of its own, in place of the chosen plan's mesh."""
    for saving in savings:
        decisions = ",".join(filter(None, (question.fixed.decisions, str(saving.savers))))
        fixed = Fixed(decisions=decisions, is_runnable=question.fixed.is_runnable)
        asked = replace(question, fixed=fixed, num_ranks=min(question.num_ranks, machine.num_devices))
        try:
            other = choose_plan(asked, known.graph, machine, known.readings)
        except PlanError:  # in whole blocks it does not fit, say
            continue
        gain = 1 - other.prediction.step_time_s / chosen.prediction.step_time_s
        yield replace(saving, prediction=other.prediction, gain=gain, plan=shorthand(other.plan))


def saving_facts(savings: Sequence[Saving]) -> Iterator[Fact]:
    """What is faster, each beyond those before it; all of it where the best plans with them were searched for."""
    told = 0.0
    for saving in savings:
        if not saving.plan and saving.gain < told + WORTH_TELLING:
            continue
        told = max(told, saving.gain)
        peak = format_bytes(saving.prediction.peak_bytes)
        of = (
            f": {saving.plan}"
            if saving.plan
            else f" on the same mesh: --fix {saving.savers} searches with that"
        )
        text = f"{saving.savers}: {_compared(saving.gain)}, fits with {peak}{of}"
        yield Fact("what if", text, is_pasted=True)


def less_with_facts(savings: Sequence[Saving]) -> Iterator[Fact]:
    """Where the least memory was asked for: that savers are left out of that, too."""
    if savings:
        most = savings[-1].savers
        text = f"{most} may hold less, and is left out where anything fits without: --fix {most} searches with that"
        yield Fact("what if", text, is_pasted=True)


def _compared(gain: float) -> str:
    if abs(gain) < SHOWN:
        return "as fast"
    return f"{format_ratio(gain)} faster" if gain > 0 else f"{format_ratio(-gain)} slower"
