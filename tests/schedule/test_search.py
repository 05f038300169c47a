"""The search: never worse than a named schedule, within its memory, and right when it says that nothing is faster."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardstage.errors import ProgramError
from shardstage.schedule import (
    SCHEDULES,
    StageBytes,
    StageTimes,
    check_schedule,
    make_schedule,
    place_stages,
    run_schedule,
)
from shardstage.schedule.search import OptimalSchedule, optimal
from shardstage.schedule.search.bound import least_makespan_s
from shardstage.schedule.search.dispatch import Policy, dispatch
from shardstage.schedule.search.exact import solve_exactly
from shardstage.schedule.search.exchange import improve
from shardstage.schedule.search.problem import (
    Problem,
    Rows,
    make_problem,
    rows_of,
    schedule_of,
    trace,
)
from shardstage.schedule.search.stdout import stdout_to_stderr

SECONDS = st.integers(1, 40).map(lambda tenths: tenths / 10)
TIMES = st.builds(
    StageTimes,
    forward_s=SECONDS,
    input_s=SECONDS,
    weight_s=SECONDS,
    backward_s=st.one_of(st.none(), SECONDS),
    receive_s=st.sampled_from([0.0, 0.1, 1.0]),
)
BYTES = st.builds(StageBytes, held_bytes=st.integers(1, 9), freed_by_input_bytes=st.integers(-2, 5))
UNIT = StageTimes(forward_s=1.0, input_s=1.0, weight_s=1.0)
UNEVEN = [
    StageTimes(forward_s=f, input_s=i, weight_s=w) for f, i, w in ((1, 1, 2), (3, 3, 3), (2, 3, 1), (1, 2, 2))
]


def problem_of(
    times: list[StageTimes], num_microbatches: int, memory: list[StageBytes] | None = None, limit: float = 1e9
) -> Problem:
    ranks = place_stages("one", len(times), 1)
    return make_problem(times, memory or [], num_microbatches, ranks, limit, is_split=True)


def clock(looks: int) -> Iterator[float]:
    """Time that goes by with every look at it."""
    return iter([1 - look / looks for look in range(looks)] + [0.0] * 10)


def every_row(problem: Problem, rank: int) -> Iterator[list[int]]:
    """Every order of a rank's tokens in which F comes before I and I before W."""
    tokens = [token for token in problem.tokens_of(rank) for _ in range(problem.num_microbatches)]
    for row in sorted(set(itertools.permutations(tokens))):
        prefixes = [row[: at + 1] for at in range(len(row))]
        if all(p.count(t - 1) >= p.count(t) for p in prefixes for t in row if t % 3):
            yield list(row)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), num_ranks=st.integers(1, 4), per_rank=st.integers(1, 2), m=st.integers(1, 6))
def test_a_found_schedule_is_valid_within_its_memory_and_never_slower_than_a_named_one(
    data: st.DataObject, num_ranks: int, per_rank: int, m: int
) -> None:
    num_stages = num_ranks * per_rank
    times = data.draw(st.lists(TIMES, min_size=num_stages, max_size=num_stages))
    memory = data.draw(st.lists(BYTES, min_size=num_stages, max_size=num_stages))
    least = max(
        sum(memory[s].held_bytes for s in range(num_stages)) + 2 * per_rank,
        max(part.held_bytes for part in memory),
    )
    limit = data.draw(st.one_of(st.none(), st.integers(least, 3 * least)))
    found = optimal(times, m, num_ranks=num_ranks, memory=memory, memory_limit_bytes=limit, max_seconds=0.1)
    check_schedule(found.schedule)
    run = run_schedule(found.schedule, times, memory)
    assert found.makespan_s == run.makespan_s
    assert limit is None or max(run.peak_bytes) <= limit
    assert found.bound_s <= found.makespan_s
    for kind in SCHEDULES.values():
        if kind.name != "forward-only" and kind.takes(per_rank):
            named = make_schedule(kind.name, num_stages=num_stages, num_ranks=num_ranks, num_microbatches=m)
            named_run = run_schedule(named, times, memory)
            if limit is None or max(named_run.peak_bytes) <= limit:
                assert found.makespan_s <= named_run.makespan_s
            assert found.bound_s <= named_run.makespan_s or max(named_run.peak_bytes) > (limit or 1e9)


@settings(max_examples=20, deadline=None)
@given(times=st.lists(TIMES, min_size=1, max_size=2), limit=st.sampled_from([10, 17, 1000]))
def test_no_order_of_two_microbatches_beats_the_bound_or_what_is_proved(
    times: list[StageTimes], limit: int
) -> None:
    """Against every order there is."""
    memory = [StageBytes(held_bytes=10, freed_by_input_bytes=4)] * len(times)
    problem = problem_of(times, 2, memory, limit)
    rows = [[row for row in every_row(problem, rank) if problem.fits(row)] for rank in range(len(times))]
    runs = (trace(problem, list(choice)) for choice in itertools.product(*rows))
    best_s = min(run.makespan_s for run in runs if run is not None)
    assert least_makespan_s(problem) <= best_s * (1 + 1e-9)
    answer = solve_exactly(problem, 2 * best_s, 0.0, 10.0)
    assert answer is not None
    assert answer.rows is not None
    solved = trace(problem, answer.rows)
    assert solved is not None
    assert solved.makespan_s == pytest.approx(best_s)
    assert all(map(problem.fits, answer.rows))
    again = solve_exactly(problem, best_s, 0.0, 10.0)
    assert again is not None
    assert again.rows is None
    assert best_s * (1 - 2e-5) <= again.bound_s <= best_s * (1 + 1e-9)


def test_on_equal_stages_zb_h1_is_proved_to_be_the_best() -> None:
    found = optimal([UNIT] * 4, 8)
    assert (found.named, found.makespan_s, found.bound_s, found.is_proved) == ("zb-h1", 27.0, 27.0, True)


def test_on_uneven_stages_the_search_beats_every_named_schedule() -> None:
    found = optimal(UNEVEN, 6, max_seconds=3.0)
    assert (found.named, found.named_s, found.makespan_s) == ("zb-h1", 57.0, 55.0)
    assert found.is_proved
    assert found.schedule.name == "optimal"


def test_two_stages_a_rank_are_placed_in_loops_or_in_a_v() -> None:
    found = optimal([UNIT] * 4, 4, num_ranks=2, max_seconds=1.0)
    assert found.schedule.stage_ranks in ((0, 1, 0, 1), (0, 1, 1, 0))
    assert found.named_s is not None
    assert found.makespan_s <= found.named_s
    given_ranks = optimal([UNIT] * 3, 4, stage_ranks=(0, 1, 1), max_seconds=0.3)
    assert given_ranks.schedule.stage_ranks == (0, 1, 1)
    assert given_ranks.named is None


def test_a_tight_limit_leaves_one_microbatch_at_a_time() -> None:
    part = StageBytes(held_bytes=10)
    found: OptimalSchedule = optimal([UNIT] * 3, 4, memory=[part] * 3, memory_limit_bytes=10, max_seconds=0.5)
    assert (found.named, found.named_s) == (None, None)
    assert max(run_schedule(found.schedule, [UNIT] * 3, [part] * 3).peak_bytes) == 10
    assert found.makespan_s >= found.bound_s


def test_a_limit_below_one_microbatch_is_refused_with_what_it_takes() -> None:
    with pytest.raises(ProgramError, match="holds 10 bytes on a rank, and the limit is 9") as caught:
        optimal([UNIT] * 3, 4, memory=[StageBytes(held_bytes=10)] * 3, memory_limit_bytes=9)
    assert caught.value.hint == "memory_limit_bytes=10"


def test_halves_that_take_longer_than_the_whole_are_left_whole() -> None:
    """A B of 2 s against I and W of 3 s each: no cut pays."""
    times = [StageTimes(forward_s=1.0, input_s=3.0, weight_s=3.0, backward_s=2.0)] * 3
    found = optimal(times, 6, max_seconds=0.5)
    assert {action.kind for row in found.schedule.actions for action in row} == {"F", "B"}
    assert found.named_s == found.makespan_s == (6 + 2) * 3


def test_halves_that_follow_each_other_become_whole_again() -> None:
    found = optimal([UNIT], 3)
    assert sorted(action.kind for action in found.schedule.actions[0]) == ["B"] * 3 + ["F"] * 3


def test_one_rank_alone_does_everything_without_a_gap() -> None:
    found = optimal(UNEVEN[:2], 3, stage_ranks=(0, 0))
    assert found.makespan_s == found.bound_s == 3 * (4 + 9)
    assert found.is_proved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_ranks": 2}, "3 stages cannot be placed equally on 2 ranks"),
        ({"stage_ranks": (0, 1)}, "does not place 3 stages"),
        ({"stage_ranks": (0, 2, 2)}, "on all of its ranks"),
        ({"num_microbatches": 0}, "0 microbatches"),
        ({"memory": [StageBytes(held_bytes=1)]}, "bytes of 1 are no problem to solve"),
    ],
)
def test_a_problem_that_makes_no_sense_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        optimal([UNIT] * 3, **{"num_microbatches": 4, **arguments})  # type: ignore[arg-type]


def test_rows_say_which_microbatches_by_counting() -> None:
    problem = problem_of([UNIT] * 2, 3)
    schedule = make_schedule("gpipe", num_stages=2, num_ranks=2, num_microbatches=3)
    rows = rows_of(problem, schedule)
    assert rows[0] == [0, 0, 0, 1, 2, 1, 2, 1, 2]
    assert str(schedule_of(problem, rows, "x")).splitlines()[0] == "0F0 0F1 0F2 0I0 0W0 0I1 0W1 0I2 0W2"
    assert trace(problem, [[1, 0, 2], [3, 4, 5]]) is None


def test_a_policy_s_caps_bound_what_a_stage_is_ahead() -> None:
    problem = problem_of([UNIT] * 3, 6)
    rows = dispatch(problem, Policy(caps=(2, 1, 1)))
    assert rows is not None
    schedule = schedule_of(problem, rows, "x")
    check_schedule(schedule)
    ahead = most = 0
    for action in schedule.actions[0]:
        ahead += (action.kind == "F") - (action.kind == "I")
        most = max(most, ahead)
    assert most == 2


def test_dispatch_gives_up_where_memory_brings_it_to_a_halt() -> None:
    """All of rank 0's memory goes to its first stage, and its last one, whose backwards would free it, gets none."""
    memory = [StageBytes(held_bytes=1)] * 4
    problem = make_problem([UNIT] * 4, memory, 4, place_stages("v", 2, 2), 2, is_split=True)
    assert dispatch(problem, Policy(caps=(4, 4, 4, 4))) is None
    assert dispatch(problem, Policy(caps=(1, 1, 1, 1))) is not None


def test_on_slow_links_more_microbatches_under_way_hide_the_transfers() -> None:
    far = [StageTimes(forward_s=1.0, input_s=1.0, weight_s=1.0, receive_s=0.5)] * 4
    found = optimal(far, 8, max_seconds=3.0)
    assert found.named_s == 33.0
    assert found.makespan_s < 30.0


def test_local_search_fills_the_gap_with_weight_gradients() -> None:
    problem = problem_of([UNIT] * 3, 5)
    one_f_one_b = make_schedule("1f1b", num_stages=3, num_ranks=3, num_microbatches=5)
    rows: Rows = rows_of(problem, one_f_one_b)
    start = trace(problem, rows)
    assert start is not None
    looks = clock(3000)
    better, makespan_s = improve(problem, rows, 17.0, lambda: next(looks), random.Random(0))
    assert makespan_s < start.makespan_s
    check_schedule(schedule_of(problem, better, "x"))


def test_what_compiled_code_prints_stays_out_of_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    with stdout_to_stderr():
        os.write(1, b"debugging")
    os.write(1, b"plan")
    assert capfd.readouterr() == ("plan", "debugging")


def test_a_problem_too_large_for_the_exact_method_is_left_alone() -> None:
    assert solve_exactly(problem_of(UNEVEN, 40), 1e6, 0.0, 1.0) is None
