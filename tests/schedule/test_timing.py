"""When actions run: the recurrence by hand, against a slower one, and what it holds of memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstage.errors import ProgramError
from shardstage.schedule import (
    SCHEDULES,
    Action,
    Schedule,
    ScheduleRun,
    StageBytes,
    StageTimes,
    make_schedule,
    one_f_one_b,
    parse_schedule,
    run_schedule,
    zb_v,
)

SECONDS = st.floats(0.0, 4.0)
TIMES = st.builds(
    StageTimes,
    forward_s=SECONDS,
    input_s=SECONDS,
    weight_s=SECONDS,
    backward_s=st.one_of(st.none(), SECONDS),
    receive_s=SECONDS,
)


def slow_run(schedule: Schedule, times: list[StageTimes]) -> dict[Action, float]:
    """Ends of all actions by asking again and again which can run."""
    ends: dict[Action, float] = {}
    while len(ends) < sum(map(len, schedule.actions)):
        for row in schedule.actions:
            free = 0.0
            for action in row:
                if action not in ends:
                    arrival = slow_arrival(schedule, times, ends, action)
                    if arrival is not None:
                        ends[action] = max(free, arrival) + seconds(times[action.stage], action.kind)
                    break
                free = ends[action]
    return ends


def seconds(time: StageTimes, kind: str) -> float:
    return {
        "F": time.forward_s,
        "I": time.input_s,
        "W": time.weight_s,
        "B": time.input_s + time.weight_s if time.backward_s is None else time.backward_s,
    }[kind]


def slow_arrival(
    schedule: Schedule, times: list[StageTimes], ends: dict[Action, float], action: Action
) -> float | None:
    stage, kind, m = action.stage, action.kind, action.microbatch
    if kind == "W":
        return 0.0
    if kind == "F" and stage == 0:
        return 0.0
    source = stage - 1 if kind == "F" else stage + 1
    if source == schedule.num_stages:
        return ends.get(Action(stage, "F", m))
    kinds = "F" if kind == "F" else "BI"
    made = [ends[a] for a in (Action(source, k, m) for k in kinds) if a in ends]  # type: ignore[arg-type]
    is_near = schedule.stage_ranks[source] == schedule.stage_ranks[stage]
    transfer_s = 0.0 if is_near else times[max(stage, source)].receive_s
    return made[0] + transfer_s if made else None


@pytest.mark.parametrize("name", SCHEDULES)
@given(data=st.data(), num_ranks=st.integers(1, 4), num_microbatches=st.integers(1, 6))
def test_every_action_runs_as_soon_as_it_can(
    name: str, data: st.DataObject, num_ranks: int, num_microbatches: int
) -> None:
    num_stages = num_ranks * (2 if SCHEDULES[name].takes(2) else 1)
    schedule = make_schedule(
        name, num_stages=num_stages, num_ranks=num_ranks, num_microbatches=num_microbatches
    )
    times = data.draw(st.lists(TIMES, min_size=num_stages, max_size=num_stages))
    run, slow = run_schedule(schedule, times), slow_run(schedule, times)
    for row, ends in zip(schedule.actions, run.ends_s, strict=True):
        assert ends == pytest.approx([slow[action] for action in row])


def test_transfers_delay_both_ways_but_not_within_a_rank() -> None:
    times = [StageTimes(forward_s=1.0, input_s=1.0, weight_s=1.0, receive_s=s) for s in (9.0, 0.5, 7.0, 0.25)]
    run = run_schedule(zb_v(2, 1), times)
    assert run.starts_s == ((0.0, 3.75, 4.75, 5.75, 9.5, 10.5), (1.5, 2.5, 6.0, 7.0, 8.0, 9.0))


def test_a_whole_backward_takes_as_long_as_its_halves_unless_said_otherwise() -> None:
    schedule = one_f_one_b(1, 1)
    halves = StageTimes(forward_s=1.0, input_s=2.0, weight_s=3.0)
    assert run_schedule(schedule, [halves]).makespan_s == 6.0
    fused = StageTimes(forward_s=1.0, input_s=2.0, weight_s=3.0, backward_s=4.0)
    assert run_schedule(schedule, [fused]).makespan_s == 5.0


def test_a_run_says_how_long_ranks_compute_and_wait() -> None:
    unit = StageTimes(forward_s=1.0, input_s=1.0, weight_s=1.0)
    run = run_schedule(one_f_one_b(2, 2), [unit, unit])
    assert run.rank_ends_s == (9.0, 7.0)
    assert run.makespan_s == 9.0
    assert run.busy_s == (6.0, 6.0)
    assert run.bubbles_s == (3.0, 0.0)


def test_memory_is_held_from_the_start_of_f_and_given_back_by_halves() -> None:
    unit = StageTimes(forward_s=1.0, input_s=1.0, weight_s=1.0)
    late = parse_schedule("0F0 0I0 0F1 0I1 0W0 0W1")
    whole = parse_schedule("0F0 0B0 0F1 0B1")
    for freed, peak in ((0, 20), (4, 16), (10, 10), (-5, 30)):
        part = StageBytes(held_bytes=10, freed_by_input_bytes=freed)
        assert run_schedule(late, [unit], [part]).peak_bytes == (peak,)
        assert run_schedule(whole, [unit], [part]).peak_bytes == (10,)


def test_without_backwards_a_forward_holds_its_own_only() -> None:
    unit = StageTimes(forward_s=1.0, input_s=0.0, weight_s=0.0)
    schedule = make_schedule("forward-only", num_stages=2, num_ranks=2, num_microbatches=5)
    assert run_schedule(schedule, [unit] * 2, [StageBytes(held_bytes=10)] * 2).peak_bytes == (10, 10)


def test_times_of_another_number_of_stages_are_refused() -> None:
    unit = StageTimes(forward_s=1.0, input_s=1.0, weight_s=1.0)
    with pytest.raises(ProgramError, match="has 2 stages, and there are times of 3 and bytes of 0"):
        run_schedule(one_f_one_b(2, 2), [unit] * 3)
    with pytest.raises(ProgramError, match="times of 2 and bytes of 1"):
        run_schedule(one_f_one_b(2, 2), [unit] * 2, [StageBytes(held_bytes=1)])


def test_a_schedule_that_cannot_run_is_refused() -> None:
    unit = StageTimes(forward_s=1.0, input_s=1.0, weight_s=1.0)
    with pytest.raises(ProgramError, match="cannot run to its end"):
        run_schedule(parse_schedule("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1"), [unit] * 2)


def test_a_large_schedule_ends_when_its_closed_form_says() -> None:
    """64 stages, 512 microbatches: 65,536 actions, whose closed form is (m + p - 1)(F + B)."""
    unit = StageTimes(forward_s=1.0, input_s=1.0, weight_s=1.0)
    run: ScheduleRun = run_schedule(one_f_one_b(64, 512), [unit] * 64)
    assert run.makespan_s == (512 + 64 - 1) * 3
