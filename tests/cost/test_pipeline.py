"""When stages act: the recurrence against the closed form, its bounds, and what transfers cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstage.cost.pipeline import (
    StageTime,
    bubble_s,
    each_bubble_s,
    exposed_talk_s,
    idle_cores_s,
    pipeline_s,
    rank_seconds,
    run_pipeline,
)
from shardstage.schedule import Action, Schedule, make_schedule, one_f_one_b

SECONDS = st.floats(0.01, 10)
THIRDS = StageTime(1.0, 2.0, weight_s=1.0)


def cut(forward_s: float, input_s: float, weight_s: float, receive_s: float = 0.0) -> StageTime:
    return StageTime(forward_s, input_s + weight_s, receive_s, weight_s)


STAGES = st.lists(st.builds(cut, SECONDS, SECONDS, SECONDS, st.floats(0, 1)), min_size=1, max_size=5)
INSTANT = st.builds(cut, SECONDS, SECONDS, SECONDS)  # without transfers


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@given(st.integers(1, 6), st.integers(1, 12), SECONDS, SECONDS)
def test_equal_stages_take_one_microbatch_for_each_and_one_for_each_further_stage(
    schedule: str, num_stages: int, num_microbatches: int, forward_s: float, backward_s: float
) -> None:
    ends = run_pipeline([StageTime(forward_s, backward_s)] * num_stages, num_microbatches, schedule)
    assert max(ends) == pytest.approx((num_microbatches + num_stages - 1) * (forward_s + backward_s))


FORMULAS = [("gpipe", 1), ("1f1b", 1), ("interleaved-1f1b", 2), ("interleaved-1f1b", 3), ("looped-bfs", 2)]


@pytest.mark.parametrize(("schedule", "per_rank"), [*FORMULAS, ("zb-h1", 1), ("zb-v", 2), ("dualpipe-v", 2)])
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_the_formula_is_the_end_of_fewer_microbatches_than_ranks_too(
    schedule: str, per_rank: int, num_ranks: int
) -> None:
    stages = [THIRDS] * (num_ranks * per_rank)
    for m in range(1, num_ranks + 1):
        end_s = max(run_pipeline(stages, m, schedule, num_ranks=num_ranks))
        assert pipeline_s(schedule, stages, num_ranks, m) == pytest.approx(end_s)


@pytest.mark.parametrize(("schedule", "per_rank"), [*FORMULAS, ("zb-h1", 1), ("zb-v", 2), ("dualpipe-v", 2)])
@pytest.mark.parametrize(("num_ranks", "num_rounds"), [(2, 2), (3, 4), (4, 2), (7, 3)])
def test_the_formula_is_the_schedule_s_end_where_stages_are_equal(
    schedule: str, per_rank: int, num_ranks: int, num_rounds: int
) -> None:
    stages = [THIRDS] * (num_ranks * per_rank)
    m = num_ranks * num_rounds
    end_s = max(run_pipeline(stages, m, schedule, num_ranks=num_ranks))
    assert pipeline_s(schedule, stages, num_ranks, m) == pytest.approx(end_s)


@pytest.mark.parametrize(
    ("schedule", "per_rank", "off"), [("zb-h1", 1, 1e-9), ("zb-v", 2, 0.03), ("dualpipe-v", 2, 0.05)]
)
@pytest.mark.parametrize("num_microbatches", [1, 3, 4, 5, 6, 8, 12, 33])
@pytest.mark.parametrize("num_ranks", [2, 4, 7])
@pytest.mark.parametrize(
    ("input_s", "weight_s"), [(1.0, 0.5), (1.5, 0.5), (1.5, 1.0), (2.0, 0.0), (3.0, 1.0)]
)
def test_what_can_be_put_off_of_a_backward_and_what_cannot_set_the_bubble(
    schedule: str,
    per_rank: int,
    off: float,
    num_microbatches: int,
    num_ranks: int,
    input_s: float,
    weight_s: float,
) -> None:
    """Attention's backward, talk and recomputation lie in I; half of the backward each would be up to 25 % too short."""
    stages = [cut(1.0, input_s, weight_s)] * (num_ranks * per_rank)
    end_s = max(run_pipeline(stages, num_microbatches, schedule, num_ranks=num_ranks))
    assert pipeline_s(schedule, stages, num_ranks, num_microbatches) == pytest.approx(end_s, rel=off)


@pytest.mark.parametrize("schedule", ["zb-h1", "zb-v", "dualpipe-v"])
@given(
    cut=INSTANT,
    more=st.tuples(SECONDS, SECONDS),
    ratio=st.floats(0, 1),
    p=st.integers(1, 9),
    m=st.integers(1, 40),
)
def test_a_bubble_of_less_work_of_which_more_can_be_put_off_is_no_longer(
    schedule: str, cut: StageTime, more: tuple[float, float], ratio: float, p: int, m: int
) -> None:
    """So that a search may bound it by the least seconds of a stage and the most of its W."""
    longer = StageTime(cut.forward_s + more[0], cut.backward_s + more[1], weight_s=ratio * cut.weight_s)
    least_s, longer_s = (
        each_bubble_s(schedule, 2, of.forward_s, of.backward_s, of.weight_s, p, m) for of in (cut, longer)
    )
    assert least_s <= longer_s * (1 + 1e-12)


@given(st.lists(INSTANT, min_size=1, max_size=5), st.integers(1, 30))
def test_uneven_stages_under_1f1b_end_no_later_than_the_formula_says_and_little_earlier(
    stages: list[StageTime], num_microbatches: int
) -> None:
    """The formula lets the slowest stage wait for all others; stages that are slow in one direction only wait less.

    No end is before m max t, which the formula exceeds by Σ t - max t.
    """
    end_s = max(run_pipeline(stages, num_microbatches, "1f1b"))
    formula_s = pipeline_s("1f1b", stages, len(stages), num_microbatches)
    others_s = sum(s.both_s for s in stages) - max(s.both_s for s in stages)
    slack_s = sum(max(s.forward_s, s.backward_s) for s in stages)
    assert end_s - slack_s <= formula_s <= (end_s + others_s) * (1 + 1e-9)


@pytest.mark.parametrize(("schedule", "per_rank"), [*FORMULAS, ("zb-h1", 1), ("zb-v", 2), ("dualpipe-v", 2)])
@given(data=st.data())
def test_no_formula_is_below_the_work_of_the_slowest_rank(
    schedule: str, per_rank: int, data: st.DataObject
) -> None:
    num_ranks = data.draw(st.integers(1, 4))
    num_stages = num_ranks * per_rank
    stages = data.draw(st.lists(INSTANT, min_size=num_stages, max_size=num_stages))
    m = data.draw(st.integers(1, 9))
    work_s = m * max(rank_seconds(schedule, stages, num_ranks))
    assert pipeline_s(schedule, stages, num_ranks, m) >= work_s * (1 - 1e-12)


@pytest.mark.parametrize("schedule", ["zb-v", "dualpipe-v"])
def test_a_v_gives_a_rank_the_first_and_the_last_stage(schedule: str) -> None:
    stages = [StageTime(float(n), 0.0) for n in (1, 2, 4, 8)]
    assert rank_seconds(schedule, stages, 2) == [9.0, 6.0]
    assert rank_seconds("interleaved-1f1b", stages, 2) == [5.0, 10.0]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@given(STAGES, st.integers(1, 8))
def test_transfers_never_help(schedule: str, stages: list[StageTime], num_microbatches: int) -> None:
    instant = [stage._replace(receive_s=0.0) for stage in stages]
    with_transfers = run_pipeline(stages, num_microbatches, schedule)
    without = run_pipeline(instant, num_microbatches, schedule)
    assert all(a <= b + 1e-9 for a, b in zip(without, with_transfers, strict=True))


def test_the_slowest_stage_sets_the_pace() -> None:
    slow = [StageTime(1.0, 2.0), StageTime(2.0, 4.0), StageTime(1.0, 2.0)]
    paces = [max(run_pipeline(slow, m, "1f1b")) for m in (20, 21)]
    assert paces[1] - paces[0] == pytest.approx(6.0)


def test_the_first_stage_ends_last() -> None:
    ends = run_pipeline([StageTime(1.0, 2.0)] * 3, 6, "1f1b")
    assert ends == (24.0, 22.0, 20.0)


def test_one_stage_does_one_thing_after_the_other() -> None:
    assert run_pipeline([StageTime(1.0, 2.0)], 5, "1f1b") == (15.0,)


@given(STAGES, st.integers(1, 8))
def test_a_backward_that_is_cut_in_two_takes_as_long_as_the_whole(
    stages: list[StageTime], num_microbatches: int
) -> None:
    """All work of a rank is done by any schedule's end; ZB-H1 does no more of it than 1F1B."""
    for name in ("1f1b", "zb-h1"):
        ends = run_pipeline(stages, num_microbatches, name)
        for end_s, stage in zip(ends, stages, strict=True):
            assert end_s >= num_microbatches * (stage.forward_s + stage.backward_s) * (1 - 1e-12)


def test_several_stages_a_rank_end_one_by_one() -> None:
    ends = run_pipeline([StageTime(1.0, 2.0)] * 4, 4, "interleaved-1f1b", num_ranks=2)
    assert max(ends) == 4 * 2 * 3 + 3
    assert len(set(ends)) == 4


def test_a_schedule_may_be_given_itself() -> None:
    stages = [StageTime(1.0, 2.0)] * 3
    assert run_pipeline(stages, 5, one_f_one_b(3, 5)) == run_pipeline(stages, 5, "1f1b")


def run_on_shared_cores(
    schedule: Schedule, forward_s: float, backward_s: float, num_cores: float, talk_s: float = 0.0
) -> float:
    """Until the last action ends, where ranks that compute at a time share the cores evenly and none has more than one.

    After each forward, and each backward that the stage before waits for, a rank talks, which takes of no core.
    """
    rows = [list(row) for row in schedule.actions]
    at, left_s, done, now_s = [0] * len(rows), [0.0] * len(rows), set[tuple[str, int, int]](), 0.0
    talking_s = [0.0] * len(rows)
    seconds = {"F": forward_s, "B": backward_s, "I": backward_s / 2, "W": backward_s / 2}
    last = schedule.num_stages - 1

    def is_ready(action: Action) -> bool:
        stage, m = action.stage, action.microbatch
        if action.kind == "F":
            return stage == 0 or ("F", stage - 1, m) in done
        arrived = stage == last or ("B", stage + 1, m) in done or ("I", stage + 1, m) in done
        return action.kind == "W" or (arrived and ("F", stage, m) in done)

    def ended(r: int) -> None:
        if not talking_s[r]:
            action = rows[r][at[r]]
            done.add((action.kind, action.stage, action.microbatch))
            at[r] += 1

    while any(place < len(row) for place, row in zip(at, rows, strict=True)):
        talking = [r for r, each_s in enumerate(talking_s) if each_s]
        active = [
            r
            for r, row in enumerate(rows)
            if at[r] < len(row) and r not in talking and (left_s[r] or is_ready(row[at[r]]))
        ]
        for r in active:
            left_s[r] = left_s[r] or seconds[rows[r][at[r]].kind]
        rate = min(1.0, num_cores / max(1, len(active)))
        passed_s = min([*(left_s[r] / rate for r in active), *(talking_s[r] for r in talking)])
        now_s += passed_s
        for r in active:
            left_s[r] -= passed_s * rate
            if left_s[r] < 1e-9:
                left_s[r] = 0.0
                talking_s[r] = 0.0 if rows[r][at[r]].kind == "W" else talk_s
                ended(r)
        for r in talking:
            talking_s[r] = max(0.0, talking_s[r] - passed_s)
            talking_s[r] *= talking_s[r] > 1e-9
            ended(r)
    return now_s


@pytest.mark.parametrize("num_microbatches", [8, 16])
@pytest.mark.parametrize(("num_ranks", "num_cores"), [(4, 2), (8, 4), (4, 1), (4, 3)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zb-v", "interleaved-1f1b"])
def test_shared_cores_idle_as_in_a_pipeline_of_as_many_ranks(
    name: str, num_ranks: int, num_cores: int, num_microbatches: int
) -> None:
    """1F1B, GPipe and ZB-H1 exactly on half as many cores; several stages a rank fill sooner, and more cores: within 5 %."""
    num_stages = num_ranks * (2 if name in ("zb-v", "interleaved-1f1b") else 1)
    alone = [THIRDS] * num_stages
    schedule = make_schedule(
        name, num_stages=num_stages, num_ranks=num_ranks, num_microbatches=num_microbatches
    )
    shared_s = num_microbatches * 3.0 * num_stages / num_cores
    idle_s = idle_cores_s(bubble_s(name, alone, num_ranks, num_microbatches), num_ranks, num_cores)
    predicted_s = max(pipeline_s(name, alone, num_ranks, num_microbatches), shared_s + idle_s)
    found_s = run_on_shared_cores(schedule, 1.0, 2.0, num_cores)
    is_exact = num_stages == num_ranks and 2 * num_cores <= num_ranks
    assert predicted_s == pytest.approx(found_s, rel=1e-9 if is_exact else 0.05)


def test_a_pipeline_without_cores_to_spare_leaves_none_idle() -> None:
    assert idle_cores_s(9.0, 4, 0.5) == 0


def talking(name: str, num_ranks: int, num_microbatches: int, num_cores: float, talk_s: float) -> float:
    """Seconds on shared cores by the formulas: 1 forward, 2 backward, and talk after each."""
    talks, m = [StageTime(talk_s, talk_s)] * num_ranks, num_microbatches
    computed_s, talked_s = 3 * num_ranks / num_cores, 2 * talk_s
    alone = [StageTime(1 + talk_s, 2 + talk_s, weight_s=1.0)] * num_ranks
    exposed_s = exposed_talk_s(
        talked_s, bubble_s(name, talks, num_ranks, m), computed_s / num_ranks, num_ranks, m
    )
    idle_s = idle_cores_s(bubble_s(name, [THIRDS] * num_ranks, num_ranks, m), num_ranks, num_cores)
    return max(pipeline_s(name, alone, num_ranks, m), m * computed_s + idle_s + exposed_s)


@pytest.mark.parametrize("talk_s", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1"])
def test_of_a_single_microbatch_all_talk_is_waited_for_on_one_core(
    name: str, num_ranks: int, talk_s: float
) -> None:
    """Weight gradients, too, find no idle core: they took the price of a pipeline whose ranks have a core each."""
    schedule = make_schedule(name, num_stages=num_ranks, num_ranks=num_ranks, num_microbatches=1)
    found_s = run_on_shared_cores(schedule, 1.0, 2.0, 1.0, talk_s)
    all_s = num_ranks * (3.0 + 2 * talk_s)
    assert talking(name, num_ranks, 1, 1.0, talk_s) == pytest.approx(all_s, rel=1e-9)
    assert found_s == pytest.approx(all_s, rel=1e-9) or name == "zb-h1"
    # a W fills what its stage's neighbour talks
    assert all_s - (num_ranks - 1) * min(1.0, talk_s) - 1e-9 <= found_s <= all_s + 1e-9


@pytest.mark.parametrize("num_cores", [1.0, 1.5])
@pytest.mark.parametrize("talk_s", [0.1, 0.5, 1.5])
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 2), (2, 8), (3, 5), (4, 4), (4, 16)])
@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_others_compute_while_a_rank_talks(
    name: str, num_ranks: int, num_microbatches: int, talk_s: float, num_cores: float
) -> None:
    """1F1B on one core within 6 %; GPipe, whose forwards all come at a time, hides less of it, up to a fifth."""
    schedule = make_schedule(
        name, num_stages=num_ranks, num_ranks=num_ranks, num_microbatches=num_microbatches
    )
    found_s = run_on_shared_cores(schedule, 1.0, 2.0, num_cores, talk_s)
    predicted_s = talking(name, num_ranks, num_microbatches, num_cores, talk_s)
    is_close = name == "1f1b" and num_cores == 1
    assert predicted_s == pytest.approx(found_s, rel=0.06 if is_close else 0.12)


def test_where_nobody_talks_nobody_waits_for_it() -> None:
    assert exposed_talk_s(0.0, 0.0, 1.0, 4, 8) == 0.0


@given(st.floats(1e-6, 1e3), st.integers(2, 9), st.integers(1, 64))
def test_talk_that_nothing_could_hide_takes_what_it_takes(talk_s: float, p: int, m: int) -> None:
    """Cores that compute in no time hide nothing of a pipeline of talk: it is busy for all microbatches and its bubble."""
    bubble = (p - 1) * talk_s
    assert exposed_talk_s(talk_s, bubble, 0.0, p, m) == pytest.approx((m - 1 + p) * talk_s)
    assert exposed_talk_s(talk_s, bubble, 1e6 * talk_s, p, m) == pytest.approx(p * talk_s, rel=1e-3)
