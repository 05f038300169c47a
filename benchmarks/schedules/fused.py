"""DualPipeV as its formula sees it: in the steady state a forward and a backward are one action, F&B, and end together."""

from __future__ import annotations

from shardstage.schedule import Action, Schedule

__all__ = ["fused_bubble_s"]

Group = tuple[Action, ...]


def fused_bubble_s(schedule: Schedule, f: float, i: float, w: float) -> float:
    """End of the last action less the seconds that a rank computes, when F&B takes F + B and starts when both have what they need."""
    took = {"F": f, "B": i + w, "I": i, "W": w}
    rows = [_groups(rank, schedule) for rank in range(schedule.num_ranks)]
    done: dict[tuple[int, bool, int], float] = {}
    free = [0.0] * len(rows)
    at = [0] * len(rows)
    ready = list(range(len(rows)))
    while ready:
        rank = ready.pop()
        began_at = at[rank]
        while at[rank] < len(rows[rank]):
            group = rows[rank][at[rank]]
            arrivals = [_arrival(schedule, done, action) for action in group]
            if None in arrivals:
                break
            start = max(free[rank], *(arrival for arrival in arrivals if arrival is not None))
            free[rank] = start + sum(took[action.kind] for action in group)
            for action in group:
                if action.kind != "W":
                    done[action.stage, action.kind == "F", action.microbatch] = free[rank]
            at[rank] += 1
        if at[rank] > began_at:
            ready += [neighbour for neighbour in (rank - 1, rank + 1) if 0 <= neighbour < len(rows)]
    assert all(place == len(row) for place, row in zip(at, rows, strict=True)), "every action ran"
    return max(free) - schedule.num_microbatches * 2 * (f + i + w)


def _groups(rank: int, schedule: Schedule) -> list[Group]:
    """The rank's actions, with F of one stage and the B of the other behind it as one; the last rank's first such pair stays apart."""
    row = schedule.actions[rank]
    groups: list[Group] = []
    is_first = rank == schedule.num_ranks - 1
    at = 0
    while at < len(row):
        is_pair = (
            row[at].kind == "F"
            and at + 1 < len(row)
            and row[at + 1].kind == "B"
            and row[at + 1].stage != row[at].stage
        )
        size = 2 if is_pair and not is_first else 1
        is_first = is_first and not is_pair
        groups.append(row[at : at + size])
        at += size
    return groups


def _arrival(schedule: Schedule, done: dict[tuple[int, bool, int], float], action: Action) -> float | None:
    if action.kind == "W" or (action.kind == "F" and action.stage == 0):
        return 0.0
    if action.kind == "F":
        return done.get((action.stage - 1, True, action.microbatch))
    if action.stage == schedule.num_stages - 1:
        return done.get((action.stage, True, action.microbatch))
    return done.get((action.stage + 1, False, action.microbatch))
