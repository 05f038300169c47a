"""``parse_schedule``: a schedule written by hand."""

from __future__ import annotations

from shardstage.errors import ProgramError
from shardstage.schedule.action import Action, Schedule

__all__ = ["parse_schedule"]


def parse_schedule(text: str, name: str = "custom") -> Schedule:
    """Reads a line of actions for each pipeline rank; ``#`` starts a comment, and empty lines do not count.

        0F0 0F1 0B0 0B1   # rank 0 runs stage 0
        1F0 1B0 1F1 1B1   # rank 1

    A rank runs the stages that its line names. ``ProgramError`` for what is not an action, a stage on two ranks or on none; whether the
    schedule is complete and can run is ``check_schedule``'s to say.
    """
    rows: list[tuple[Action, ...]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if words:
            rows.append(tuple(_parse(word, number) for word in words))
    if not rows:
        raise ProgramError("a schedule without any action", hint="0F0 0B0")
    return Schedule(
        name=name,
        num_microbatches=1 + max(action.microbatch for row in rows for action in row),
        stage_ranks=_stage_ranks(rows),
        actions=tuple(rows),
    )


def _parse(word: str, line: int) -> Action:
    try:
        return Action.parse(word)
    except ProgramError as error:
        raise ProgramError(f"line {line}: {error.message}", hint=error.hint) from error


def _stage_ranks(rows: list[tuple[Action, ...]]) -> tuple[int, ...]:
    holders: dict[int, int] = {}
    for rank, row in enumerate(rows):
        for action in row:
            holder = holders.setdefault(action.stage, rank)
            if holder != rank:
                raise ProgramError(
                    f"stage {action.stage} is on rank {holder}, and rank {rank} acts as {action}",
                    hint=f"move {action} to the line of rank {holder}",
                )
    num_stages = max(holders) + 1
    missing = [str(stage) for stage in range(num_stages) if stage not in holders]
    if missing:
        raise ProgramError(
            f"no rank runs stage {', '.join(missing[:6])}, and there is a stage {num_stages - 1}",
            hint=f"{missing[0]}F0 {missing[0]}B0",
        )
    return tuple(holders[stage] for stage in range(num_stages))
