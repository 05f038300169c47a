"""The named schedules: their published figures, and what holds at every size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstage.errors import ProgramError
from shardstage.schedule import (
    SCHEDULES,
    Schedule,
    StageBytes,
    StageTimes,
    check_schedule,
    draw,
    dualpipe_v,
    forward_only,
    gpipe,
    interleaved_1f1b,
    looped_bfs,
    make_schedule,
    one_f_one_b,
    place_stages,
    run_schedule,
    zb_h1,
    zb_v,
)

SIZES = {"num_ranks": st.integers(1, 8), "num_microbatches": st.integers(1, 24)}
SECONDS = st.integers(1, 5).map(float)


def made(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> Schedule:
    """A schedule with as many stages a rank as it takes, of those that may choose ``stages_per_rank``."""
    stages = {"one": 1, "loop": stages_per_rank, "v": 2}[SCHEDULES[name].places] * num_ranks
    return make_schedule(name, num_stages=stages, num_ranks=num_ranks, num_microbatches=num_microbatches)


def bubble_s(schedule: Schedule, forward_s: float, input_s: float, weight_s: float) -> float:
    """Seconds that the step takes longer than a rank computes."""
    times = StageTimes(forward_s=forward_s, input_s=input_s, weight_s=weight_s)
    run = run_schedule(schedule, [times] * schedule.num_stages)
    return run.makespan_s - max(run.busy_s)


def test_gpipe_is_the_one_of_the_paper() -> None:
    assert str(gpipe(3, 3)) == "0F0 0F1 0F2 0B2 0B1 0B0\n1F0 1F1 1F2 1B2 1B1 1B0\n2F0 2F1 2F2 2B2 2B1 2B0"


def test_one_f_one_b_is_the_one_of_the_paper() -> None:
    """Narayanan et al. 2021, figure 4: four stages, eight microbatches."""
    assert str(one_f_one_b(4, 8)) == (
        "0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0F6 0B3 0F7 0B4 0B5 0B6 0B7\n"
        "1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3 1F6 1B4 1F7 1B5 1B6 1B7\n"
        "2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4 2F6 2B5 2F7 2B6 2B7\n"
        "3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5 3F6 3B6 3F7 3B7"
    )


def test_interleaved_1f1b_is_the_one_of_the_paper() -> None:
    """Narayanan et al. 2021, figure 4 bottom: four ranks with two stages each, eight microbatches."""
    assert str(interleaved_1f1b(4, 8, 2)) == (
        "0F0 0F1 0F2 0F3 4F0 4F1 4F2 4F3 0F4 0F5 0F6 4B0 0F7 4B1 4F4 4B2 "
        "4F5 4B3 4F6 0B0 4F7 0B1 0B2 0B3 4B4 4B5 4B6 4B7 0B4 0B5 0B6 0B7\n"
        "1F0 1F1 1F2 1F3 5F0 5F1 5F2 5F3 1F4 5B0 1F5 5B1 1F6 5B2 1F7 5B3 "
        "5F4 1B0 5F5 1B1 5F6 1B2 5F7 1B3 5B4 5B5 5B6 5B7 1B4 1B5 1B6 1B7\n"
        "2F0 2F1 2F2 2F3 6F0 6F1 6F2 6B0 6F3 6B1 2F4 6B2 2F5 6B3 2F6 2B0 "
        "2F7 2B1 6F4 2B2 6F5 2B3 6F6 6B4 6F7 6B5 6B6 6B7 2B4 2B5 2B6 2B7\n"
        "3F0 3F1 3F2 3F3 7F0 7B0 7F1 7B1 7F2 7B2 7F3 7B3 3F4 3B0 3F5 3B1 "
        "3F6 3B2 3F7 3B3 7F4 7B4 7F5 7B5 7F6 7B6 7F7 7B7 3B4 3B5 3B6 3B7"
    )


def test_interleaved_1f1b_makes_rounds_as_even_as_they_can_be() -> None:
    """Seven microbatches on three ranks: a round of three and one of four."""
    first = str(interleaved_1f1b(3, 7, 2)).splitlines()[0]
    forwards = [word for word in first.split() if "F" in word]
    assert " ".join(forwards) == "0F0 0F1 0F2 3F0 3F1 3F2 0F3 0F4 0F5 0F6 3F3 3F4 3F5 3F6"


def test_looped_bfs_is_the_one_of_the_paper() -> None:
    """Lamy-Poirier 2022: every stage takes all microbatches before the rank's next stage."""
    assert str(looped_bfs(2, 3, 2)) == (
        "0F0 0F1 0F2 2F0 2F1 2F2 2B2 2B1 2B0 0B2 0B1 0B0\n1F0 1F1 1F2 3F0 3F1 3F2 3B2 3B1 3B0 1B2 1B1 1B0"
    )


def test_zb_h1_is_the_one_of_the_paper() -> None:
    """Qi et al. 2023, figure 3: four stages, eight microbatches."""
    assert str(zb_h1(4, 8)) == (
        "0F0 0F1 0F2 0F3 0I0 0W0 0F4 0I1 0W1 0F5 0I2 0W2 0F6 0I3 0W3 0F7 0I4 0W4 0I5 0W5 0I6 0W6 0I7 0W7\n"
        "1F0 1F1 1F2 1I0 1F3 1I1 1W0 1F4 1I2 1W1 1F5 1I3 1W2 1F6 1I4 1W3 1F7 1I5 1W4 1I6 1W5 1I7 1W6 1W7\n"
        "2F0 2F1 2I0 2F2 2I1 2F3 2I2 2W0 2F4 2I3 2W1 2F5 2I4 2W2 2F6 2I5 2W3 2F7 2I6 2W4 2I7 2W5 2W6 2W7\n"
        "3F0 3I0 3F1 3I1 3F2 3I2 3F3 3I3 3W0 3F4 3I4 3W1 3F5 3I5 3W2 3F6 3I6 3W3 3F7 3I7 3W4 3W5 3W6 3W7"
    )


def test_zb_v_is_the_one_of_the_paper() -> None:
    """Qi et al. 2023, section 6, here with two ranks and four microbatches."""
    assert str(zb_v(2, 4)) == (
        "0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 3F2 3I2 3W2 0I1 0W1 3F3 3I3 3W3 0I2 0W2 0I3 0W3\n"
        "1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1F3 1I1 1W1 2F3 2I2 2W2 1I2 2I3 1I3 1W2 2W3 1W3"
    )


def test_dualpipe_v_is_the_published_one() -> None:
    """DeepSeek-AI 2024, figure 5, cut in half: two ranks, five microbatches."""
    assert str(dualpipe_v(2, 5)) == (
        "0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 3F2 0B0 0F4 3B2 3F3 0B1 3B3 3F4 0B2 3B4 0I3 0W3 0I4 0W4\n"
        "1F0 2F0 1F1 2F1 1F2 2B0 2F2 1B0 1F3 2B1 2F3 1B1 1F4 2B2 2F4 1B2 2B3 1B3 2I4 1I4 2W4 1W4"
    )


def test_forward_only_goes_in_rounds() -> None:
    assert str(forward_only(2, 3, 2)) == "0F0 0F1 2F0 2F1 0F2 2F2\n1F0 1F1 3F0 3F1 1F2 3F2"


@pytest.mark.parametrize("name", SCHEDULES)
@given(**SIZES, stages_per_rank=st.integers(1, 4))
def test_every_schedule_of_every_size_is_complete_and_runs_to_its_end(
    name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int
) -> None:
    check_schedule(made(name, num_ranks, num_microbatches, stages_per_rank))


@pytest.mark.parametrize(
    ("function", "sizes"),
    [
        (gpipe, (4, 4)),
        (one_f_one_b, (4, 6)),
        (interleaved_1f1b, (2, 4, 2)),
        (looped_bfs, (2, 3, 2)),
        (forward_only, (2, 4, 1)),
        (zb_h1, (4, 6)),
        (zb_v, (2, 4)),
        (dualpipe_v, (2, 5)),
    ],
)
def test_what_a_docstring_draws_is_the_schedule(
    function: Callable[..., Schedule], sizes: tuple[int, ...]
) -> None:
    drawn = [line.strip() for line in (function.__doc__ or "").splitlines() if " | " in line]
    assert drawn == draw(function(*sizes), num_columns=125).splitlines()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_by_its_own_name(name: str) -> None:
    schedule = made(name, 3, 4)
    assert (schedule.name, schedule.num_ranks, schedule.num_microbatches) == (name, 3, 4)
    assert any(a.kind in "IW" for row in schedule.actions for a in row) == SCHEDULES[name].splits_backward


@given(**SIZES)
def test_one_f_one_b_holds_no_more_microbatches_than_stages_follow(
    num_ranks: int, num_microbatches: int
) -> None:
    schedule = one_f_one_b(num_ranks, num_microbatches)
    for rank in range(num_ranks):
        assert schedule.max_in_flight(rank) == min(num_ranks - rank, num_microbatches)


@given(**SIZES)
def test_zero_bubble_schedules_hold_as_much_as_the_first_rank_of_1f1b(
    num_ranks: int, num_microbatches: int
) -> None:
    """Qi et al. 2023, table 2 and section 6; a stage of a V has half a rank's layers."""
    for rank in range(num_ranks):
        assert zb_h1(num_ranks, num_microbatches).max_in_flight(rank) <= num_ranks
        assert zb_v(num_ranks, num_microbatches).max_in_flight(rank) <= 2 * num_ranks
        assert dualpipe_v(num_ranks, num_microbatches).max_in_flight(rank) <= 2 * num_ranks + 1


@given(**SIZES)
def test_breadth_first_schedules_hold_all_microbatches(num_ranks: int, num_microbatches: int) -> None:
    assert gpipe(num_ranks, num_microbatches).max_in_flight(0) == num_microbatches
    assert looped_bfs(num_ranks, num_microbatches, 3).max_in_flight(0) == 3 * num_microbatches


def test_in_flight_counts_of_the_stages_add_up_to_no_less_than_the_rank_s() -> None:
    schedule = zb_v(4, 8)
    for rank in range(4):
        held = [schedule.max_held(stage) for stage in schedule.stages_of(rank)]
        assert max(held) <= schedule.max_in_flight(rank) <= sum(held)
    assert forward_only(4, 8, 1).max_in_flight(0) == 1


@given(**SIZES, forward_s=SECONDS, input_s=SECONDS, weight_s=SECONDS)
def test_gpipe_and_1f1b_wait_for_a_forward_and_a_backward_of_every_further_rank(
    num_ranks: int, num_microbatches: int, forward_s: float, input_s: float, weight_s: float
) -> None:
    for name in ("gpipe", "1f1b"):
        found = bubble_s(made(name, num_ranks, num_microbatches), forward_s, input_s, weight_s)
        assert found == (num_ranks - 1) * (forward_s + input_s + weight_s)


@pytest.mark.parametrize("name", ["interleaved-1f1b", "looped-bfs"])
@given(num_ranks=st.integers(1, 7), rounds=st.integers(1, 4), stages=st.integers(1, 4), backward_s=SECONDS)
def test_more_stages_a_rank_divide_the_bubble(
    name: str, num_ranks: int, rounds: int, stages: int, backward_s: float
) -> None:
    """(p - 1)(F + B) with the seconds of one stage, which is 1 / v of a rank's: Narayanan et al. 2021, section 2.2."""
    schedule = made(name, num_ranks, rounds * num_ranks, stages)
    assert bubble_s(schedule, 1.0, backward_s, 0.0) == (num_ranks - 1) * (1 + backward_s)


@given(num_ranks=st.integers(1, 7), more=st.integers(0, 20), stages=st.integers(1, 4), backward_s=SECONDS)
def test_rounds_that_p_does_not_divide_cost_interleaved_1f1b_nothing(
    num_ranks: int, more: int, stages: int, backward_s: float
) -> None:
    schedule = interleaved_1f1b(num_ranks, num_ranks + more, stages)
    assert bubble_s(schedule, 1.0, backward_s, 0.0) == (num_ranks - 1) * (1 + backward_s)


@given(num_ranks=st.integers(1, 9), more=st.integers(0, 12))
def test_dualpipe_v_with_actions_one_behind_the_other_has_the_bubble_of_zb_h1(
    num_ranks: int, more: int
) -> None:
    """In seconds of a stage, which are half of a rank's."""
    schedule = dualpipe_v(num_ranks, 2 * num_ranks + more)
    for forward_s, input_s, weight_s in ((1.0, 1.0, 1.0), (2.0, 2.0, 1.0), (3.0, 3.0, 2.0)):
        found = bubble_s(schedule, forward_s, input_s, weight_s)
        assert found == (num_ranks - 1) * (forward_s + input_s - weight_s)


@given(num_ranks=st.integers(1, 9), more=st.integers(0, 12))
def test_zb_h1_wins_back_the_weight_gradients(num_ranks: int, more: int) -> None:
    """Qi et al. 2023, table 2: (p - 1)(F + I - W)."""
    schedule = zb_h1(num_ranks, num_ranks + more)
    for forward_s, input_s, weight_s in ((1.0, 1.0, 1.0), (2.0, 2.0, 1.0), (1.0, 2.0, 1.0), (3.0, 3.0, 2.0)):
        found = bubble_s(schedule, forward_s, input_s, weight_s)
        assert found == (num_ranks - 1) * (forward_s + input_s - weight_s)


@given(num_ranks=st.integers(1, 9), more=st.integers(0, 12))
def test_zb_v_has_no_bubble_between_a_rank_s_first_action_and_its_last(num_ranks: int, more: int) -> None:
    schedule = zb_v(num_ranks, 2 * num_ranks + more)
    run = run_schedule(schedule, [StageTimes(forward_s=1.0, input_s=1.0, weight_s=1.0)] * schedule.num_stages)
    assert max(run.bubbles_s) == 0


@given(num_ranks=st.integers(1, 9), num_microbatches=st.integers(1, 30))
def test_zb_h1_is_never_slower_than_1f1b_on_equal_stages(num_ranks: int, num_microbatches: int) -> None:
    sizes = (num_ranks, num_microbatches)
    assert bubble_s(zb_h1(*sizes), 1.0, 1.0, 1.0) <= bubble_s(one_f_one_b(*sizes), 1.0, 1.0, 1.0)


def test_stages_are_placed_in_loops_or_down_and_up_again() -> None:
    assert place_stages("one", 3, 1) == (0, 1, 2)
    assert place_stages("loop", 3, 2) == (0, 1, 2, 0, 1, 2)
    assert place_stages("v", 3, 2) == (0, 1, 2, 2, 1, 0)


@pytest.mark.parametrize(
    ("name", "num_stages", "num_ranks", "num_microbatches", "message"),
    [
        ("1f2b", 4, 4, 8, "'1f2b' is not a schedule; there are gpipe, 1f1b, interleaved-1f1b"),
        ("1f1b", 8, 4, 8, "1f1b runs exactly one stage on each rank, and 8 stages on 4 ranks are not that"),
        ("zb-v", 4, 4, 8, "zb-v runs exactly two stages on each rank, and 4 stages on 4 ranks"),
        ("looped-bfs", 7, 4, 8, "looped-bfs runs equally many stages on each rank, and 7 stages on 4 ranks"),
        ("interleaved-1f1b", 3, 4, 8, "equally many stages on each rank"),
        ("gpipe", 4, 4, 0, "at least one stage, one rank and one microbatch, and there are 4, 4 and 0"),
    ],
)
def test_what_cannot_be_made_is_refused_with_what_can(
    name: str, num_stages: int, num_ranks: int, num_microbatches: int, message: str
) -> None:
    with pytest.raises(ProgramError, match=message) as caught:
        make_schedule(name, num_stages=num_stages, num_ranks=num_ranks, num_microbatches=num_microbatches)
    assert caught.value.hint


def test_the_hint_of_a_wrong_number_of_stages_is_a_right_one() -> None:
    with pytest.raises(ProgramError, match="zb-v") as caught:
        make_schedule("zb-v", num_stages=4, num_ranks=4, num_microbatches=8)
    assert caught.value.hint == "8 stages, 2 on each of 4 ranks"


def test_memory_of_a_schedule_is_counted_by_stage() -> None:
    schedule = interleaved_1f1b(4, 8, 2)
    memory = [StageBytes(held_bytes=10)] * 8
    times = [StageTimes(forward_s=1.0, input_s=1.0, weight_s=1.0)] * 8
    peaks = run_schedule(schedule, times, memory).peak_bytes
    assert peaks == tuple(10 * schedule.max_in_flight(rank) for rank in range(4))
