"""``bounded``: admissible lower bounds of the step time and the memory of all choices of many groups at once.

A group with a mesh is a pair, and with a ZeRO a row (``table``). Pairs and rows whose mean stages alone take too long or hold too much get
no closer bound, nor do schedules whose bubble is too long then, and several stages a rank are cut only where any cut may be quick enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shardstage.planner.even import EvenCuts
from shardstage.planner.figures import Figures
from shardstage.planner.lattice import Lattice, Pairs, Rows
from shardstage.planner.room import lacks_room
from shardstage.planner.space import MAX_STAGES_PER_RANK, Choice
from shardstage.planner.table import LOOSE, Table
from shardstage.planner.terms import BoundSettings, Terms

__all__ = ["Bounds", "bounded"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bounds:
    """Lower bounds [row, schedule]: ``seconds``, and ``least_bytes`` of the fullest rank; infinite where the space has no such choice.

    Left out are ``num_slow`` choices that take ``least_slow_s`` at least, and ``num_large`` ones that hold ``least_large_bytes``.
    """

    lattice: Lattice
    rows: Rows
    seconds: Array
    least_bytes: Array
    num_slow: int
    num_large: int
    least_slow_s: float
    least_large_bytes: float

    def choice(self, index: int) -> Choice:
        row, schedule = divmod(index, self.seconds.shape[1])
        lattice = self.lattice
        return Choice(
            mesh=lattice.meshes.sizes[self.rows.mesh[row]],
            group=lattice.groups[self.rows.group[row]],
            zero=lattice.zeros[self.rows.zero[row]],
            schedule=lattice.schedules[schedule],
        )


def bounded(
    lattice: Lattice,
    figures: Figures,
    groups: Any,
    settings: BoundSettings,
    even: EvenCuts,
    below_s: float = math.inf,
    most_per_rank: float = math.inf,
) -> Bounds:
    """Bounds of all choices of groups (their numbers) that may take less than ``below_s`` and fit. ``figures`` are of all groups,
    ``even`` the cuts of schedules with several stages a rank. Schedules of more than ``most_per_rank`` stages a rank are not looked at."""
    terms = Terms(lattice, figures.at(groups), groups, settings, even)
    pairs = lattice.pairs(groups)
    pair_s = _loosest_s(terms, pairs)
    is_early = pair_s >= below_s
    rows = lattice.rows(pairs.at(np.flatnonzero(~is_early)))
    table = Table(terms, rows)
    is_large = (table.mean_bytes > settings.limit_bytes)[:, 0]
    mean_s, mean_bytes = table.mean_s[:, 0], table.mean_bytes[is_large]
    is_slow = ~is_large & (mean_s >= below_s)
    meshes = lattice.meshes
    num_schedules = meshes.has_schedule.sum(axis=1)[rows.mesh]
    still_open = np.flatnonzero(~is_large & ~is_slow)
    rows = rows.at(still_open)
    table = table.at(still_open).with_talk_of_experts()
    seconds, least_bytes = _of_schedules(lattice, rows, table, below_s, most_per_rank)
    return Bounds(
        lattice=lattice,
        rows=rows,
        seconds=seconds,
        least_bytes=least_bytes,
        num_slow=int(num_schedules[is_slow].sum() + meshes.num_choices[pairs.mesh[is_early]].sum()),
        num_large=int(num_schedules[is_large].sum()),
        least_slow_s=float(
            min(mean_s[is_slow].min(initial=math.inf), pair_s[is_early].min(initial=math.inf))
        ),
        least_large_bytes=float(mean_bytes.min(initial=math.inf)),
    )


def _loosest_s(terms: Terms, pairs: Pairs) -> Array:
    """[pair]: whatever the ZeRO and the schedule, all microbatches on the mean stage and the least bubble of all schedules."""
    meshes, group = terms.meshes, terms.number[pairs.group]
    p, m = meshes.pp[pairs.mesh], np.ceil(meshes.share[pairs.mesh] / terms.microbatch[group])
    forward = terms.forward[group] / p
    mean = forward + terms.backward[group] / p
    slowest = np.maximum(mean, terms.slowest_unit[group])
    bubble = (p - 1) * np.minimum(mean / MAX_STAGES_PER_RANK, forward / 2)
    found: Array = terms.settings.step_s(m * slowest + bubble, m * mean, 0.0)
    return found


def _of_schedules(
    lattice: Lattice, rows: Rows, table: Table, below_s: float, most_per_rank: float
) -> tuple[Array, Array]:
    """[row, schedule]: seconds and bytes."""
    seconds = np.full((len(rows.mesh), len(lattice.schedules)), np.inf)
    least_bytes = np.full_like(seconds, np.inf)
    has, mean_bytes = lattice.meshes.has_schedule[rows.mesh], table.mean_bytes[:, 0]
    for name in dict.fromkeys(schedule.name for schedule in lattice.schedules):
        columns = [
            (i, each.per_rank)
            for i, each in enumerate(lattice.schedules)
            if each.name == name and each.per_rank <= most_per_rank
        ]
        if not columns:
            continue
        places, numbers = np.array(columns).T
        row, number = np.nonzero(has[:, places])
        column, per_rank = places[number], numbers[number][:, None].astype(np.float64)
        loose_s = table.at(row, LOOSE).loose_s(name, per_rank)[:, 0]
        seconds[row, column], least_bytes[row, column] = loose_s, mean_bytes[row]
        still_open = np.flatnonzero(loose_s < below_s)
        row, column, per_rank = row[still_open], column[still_open], per_rank[still_open]
        if numbers.max() > 1 and len(row):
            uncut_s = table.at(row).uncut_s(name, per_rank)[:, 0]
            seconds[row, column] = np.maximum(loose_s[still_open], uncut_s)
            still_open = np.flatnonzero(uncut_s < below_s)
            row, column, per_rank = row[still_open], column[still_open], per_rank[still_open]
        if len(row):
            of_rows = table.at(row)
            found_s, found_bytes = of_rows.of(name, per_rank)
            seconds[row, column], least_bytes[row, column] = found_s[:, 0], found_bytes[:, 0]
            if name == "1f1b" and below_s < math.inf:
                is_open = (found_s < below_s) & (found_bytes <= table.settings.limit_bytes)
                still_open = np.flatnonzero(is_open)
                at = still_open[lacks_room(of_rows.at(still_open), below_s)]
                seconds[row[at], column[at]] = below_s
    return seconds, least_bytes
