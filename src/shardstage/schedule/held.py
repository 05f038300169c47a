"""What a rank holds under a named schedule: microbatches whose forward is done and whose backward, both halves of it, is not."""

from __future__ import annotations

from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shardstage.schedule.action import Action
from shardstage.schedule.places import Places, place_stages
from shardstage.schedule.registry import SCHEDULES, make_schedule

__all__ = ["held_by_stage", "held_in_rounds", "held_together", "stages_of_rank", "steady_microbatches"]

STEADY_ROUNDS: Final = 3
"""After so many rounds of microbatches over all ranks every schedule of ours has held as much as it ever will; what does not fill a round
makes one longer."""


_HELD_MORE: Final = MappingProxyType({"F": 1, "B": -1, "W": -1})


def steady_microbatches(num_microbatches: int, num_ranks: int) -> int:
    """So few that are held as so many are, by any schedule but those that hold all."""
    return min(num_microbatches, STEADY_ROUNDS * num_ranks + num_microbatches % num_ranks)


def stages_of_rank(name: str, num_stages: int, num_ranks: int, rank: int) -> tuple[int, ...]:
    """The stages that a rank runs under the named schedule, in order."""
    return _stages_of_ranks(SCHEDULES[name].places, num_ranks, num_stages // num_ranks)[rank]


@lru_cache(maxsize=1024)
def _stages_of_ranks(places: Places, num_ranks: int, stages_per_rank: int) -> tuple[tuple[int, ...], ...]:
    found: list[list[int]] = [[] for _ in range(num_ranks)]
    for stage, rank in enumerate(place_stages(places, num_ranks, stages_per_rank)):
        found[rank].append(stage)
    return tuple(map(tuple, found))


def held_by_stage(name: str, *, num_stages: int, num_ranks: int, num_microbatches: int, stage: int) -> int:
    """Most microbatches that a stage holds at a time.

    gpipe                      m                        all forwards come first
    1f1b, zb-v, dualpipe-v     min(stages - stage, m)   until the first one is back from the last stage
    zb-h1                      min(p, m)                the W of a microbatch waits as long as on the first rank
    others                     counted along the rank's row
    """
    if name == "gpipe":
        return num_microbatches
    if name in ("1f1b", "zb-v", "dualpipe-v"):
        return min(num_stages - stage, num_microbatches)
    if name == "zb-h1":
        return min(num_ranks, num_microbatches)
    rank = place_stages(SCHEDULES[name].places, num_ranks, num_stages // num_ranks)[stage]
    together = held_together(
        name, num_stages=num_stages, num_ranks=num_ranks, num_microbatches=num_microbatches, rank=rank
    )
    place = stages_of_rank(name, num_stages, num_ranks, rank).index(stage)
    return max(held[place] for held in together)


def held_together(
    name: str, *, num_stages: int, num_ranks: int, num_microbatches: int, rank: int
) -> tuple[tuple[int, ...], ...]:
    """Microbatches that a rank holds on each of its stages at once: each moment that no other one exceeds on all stages.

    Those of a V are known: it is full once a microbatch has gone down and up. Others are counted along the rank's row.
    """
    p, m = num_ranks, num_microbatches
    if name == "looped-bfs":  # all forwards come first
        return ((m,) * (num_stages // p),)
    if name == "dualpipe-v":
        return ((min(m, 2 * p - rank), min(m, rank + 1)),)
    if name == "zb-v":
        before, after = (min(m, 2 * p - rank - 1), min(m, rank + 1)), (min(m, 2 * p - rank), min(m, rank))
        return (before, after) if after[0] > before[0] else (before,)
    if name != "gpipe":  # which holds all
        m = steady_microbatches(m, p)
    return _held_together(name, num_stages, p, m, rank)


@lru_cache(maxsize=4096)
def _held_together(name: str, num_stages: int, p: int, m: int, rank: int) -> tuple[tuple[int, ...], ...]:
    stages = stages_of_rank(name, num_stages, p, rank)
    steps = [(a.stage, _HELD_MORE[a.kind]) for a in _row(name, num_stages, p, m, rank) if a.kind != "I"]
    stage, more = np.array(steps, dtype=np.int64).T
    now = ((stage[:, None] == np.array(stages)) * more[:, None]).cumsum(axis=0)
    if now[-1].any():  # forwards only, of which one at a time holds anything
        return tuple(tuple(int(i == j) for j in range(len(stages))) for i in range(len(stages)))
    is_peak = (more[:-1] > 0) & (more[1:] < 0)
    return _largest(now[:-1][is_peak])


def held_in_rounds(num_ranks: Any, num_microbatches: Any, stages_per_rank: Any, rank: Any, stage: Any) -> Any:
    """Microbatches that a rank of interleaved 1F1B holds on one of its stages (from 0) just before its first backward.

    At that moment it is as full as it gets. All may be arrays.
    """
    p, v = num_ranks, stages_per_rank
    m = np.minimum(num_microbatches, STEADY_ROUNDS * p + num_microbatches % p)
    rounds = np.maximum(1, np.floor(m / p))
    done = np.minimum(m * v, 2 * (p - 1 - rank) + (v - 1) * np.ceil(m / rounds) + 1)
    full = np.floor(done * rounds / (m * v))
    full = full + ((full < rounds) & (v * np.floor(m * (full + 1) / rounds) <= done))
    start, stop = (np.floor(m * np.minimum(number, rounds) / rounds) for number in (full, full + 1))
    return start + np.clip(done - v * start - stage * (stop - start), 0, stop - start)


def _row(name: str, num_stages: int, p: int, m: int, rank: int) -> tuple[Action, ...]:
    kind = SCHEDULES[name]
    if kind.row is not None:
        return kind.row(rank, p, m, num_stages // p)
    return make_schedule(name, num_stages=num_stages, num_ranks=p, num_microbatches=m).actions[rank]


def _largest(moments: npt.NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
    """Those that no other one is at least as large as on all stages; of the fullest in all, none is."""
    total = moments.sum(axis=1)
    kept = {*map(tuple, moments[total == total.max()].tolist())}
    for each in sorted({*map(tuple, moments[total < total.max()].tolist())}, key=sum, reverse=True):
        if not (np.array([*kept]) >= each).all(axis=1).any():
            kept.add(each)
    return tuple(kept)
