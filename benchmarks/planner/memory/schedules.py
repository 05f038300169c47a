"""Schedules of published runs that the library has no name for."""

from __future__ import annotations

from shardstage.schedule import Action, Schedule

__all__ = ["zb_2p"]


def zb_2p(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-H2 of Qi et al. 2023, figure 3 bottom: rank r begins with 2 (p - r) - 1 forwards and puts off W until 2 p - 1 are held."""
    return Schedule(
        name="zb-2p",
        num_microbatches=num_microbatches,
        stage_ranks=tuple(range(num_ranks)),
        actions=tuple(_row(rank, num_ranks, num_microbatches) for rank in range(num_ranks)),
    )


def _row(rank: int, num_ranks: int, num_microbatches: int) -> tuple[Action, ...]:
    limit = 2 * num_ranks - 1
    done = {"F": min(2 * (num_ranks - rank) - 1, num_microbatches), "I": 0, "W": 0}
    row = [Action(rank, "F", number) for number in range(done["F"])]

    def act(kind: str) -> None:
        row.append(Action(rank, kind, done[kind]))  # type: ignore[arg-type]
        done[kind] += 1

    while done["I"] < num_microbatches:
        act("I")
        if done["F"] < num_microbatches:
            if done["F"] - done["W"] == limit:
                act("W")
            act("F")
    while done["W"] < num_microbatches:
        act("W")
    return tuple(row)
