"""Schedules written by hand: reading, checking and drawing them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstage.errors import ProgramError
from shardstage.schedule import (
    SCHEDULES,
    Action,
    Schedule,
    check_schedule,
    draw,
    forward_only,
    gpipe,
    make_schedule,
    one_f_one_b,
    parse_schedule,
    zb_h1,
    zb_v,
)


@given(stage=st.integers(0, 99), kind=st.sampled_from("FBIW"), microbatch=st.integers(0, 999))
def test_an_action_is_read_back_from_its_text(stage: int, kind: str, microbatch: int) -> None:
    text = f"{stage}{kind}{microbatch}"
    assert str(Action.parse(text)) == text


@pytest.mark.parametrize("text", ["", "F0", "0X1", "0F", "0F1 ", "-1F0"])
def test_what_is_no_action_is_refused_by_name(text: str) -> None:
    with pytest.raises(ProgramError, match="is not an action"):
        Action.parse(text)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_read_back_from_its_text(name: str) -> None:
    num_stages = 6 if SCHEDULES[name].takes(2) else 3
    schedule = make_schedule(name, num_stages=num_stages, num_ranks=3, num_microbatches=5)
    assert parse_schedule(str(schedule), name) == schedule


def test_comments_and_empty_lines_do_not_count() -> None:
    text = """
        # two ranks
        0F0 0F1 0B0 0B1   # the first

        1F0 1B0 1F1 1B1
    """
    schedule = parse_schedule(text)
    assert (schedule.name, schedule.stage_ranks, schedule.num_microbatches) == ("custom", (0, 1), 2)
    assert str(schedule) == "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1"


def test_a_rank_runs_the_stages_that_its_line_names() -> None:
    assert parse_schedule("0F0 3F0\n1F0 2F0").stage_ranks == (0, 1, 1, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "without any action"),
        ("# nothing", "without any action"),
        ("0F0 0B0\n1F0 1C0", "line 2: '1C0' is not an action"),
        ("0F0 0B0\n1F0 0B1", "stage 0 is on rank 0, and rank 1 acts as 0B1"),
        ("0F0 0B0\n2F0 2B0", "no rank runs stage 1, and there is a stage 2"),
    ],
)
def test_text_that_is_no_schedule_is_refused_where_it_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ProgramError, match=message) as caught:
        parse_schedule(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 0B0 0F0\n1F0 1B0", "0F0: more than once"),
        (
            "0F0 0B0\n1F0",
            "1B0: missing in schedule custom, where every stage runs each of the 1 microbatches",
        ),
        ("0B0\n1F0 1B0", "0F0: missing"),
        ("0F0 0I0\n1F0 1B0", "0W0: missing"),
        ("0F0 0W0\n1F0 1B0", "0I0: missing"),
        ("0F0 0I0 0B0\n1F0 1B0", "0B0 and 0I0: the backward more than once"),
        ("0F0 0B0 0W0\n1F0 1B0", "0B0 and 0W0: the backward more than once"),
        ("0F0 0F2 0B0 0B2", "0F1, 0B1: missing"),
    ],
)
def test_an_incomplete_schedule_is_refused_with_what_it_lacks(text: str, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        check_schedule(parse_schedule(text))


def test_many_missing_actions_are_counted_rather_than_named() -> None:
    forwards = " ".join(f"0F{m}" for m in range(9))
    with pytest.raises(ProgramError, match="0B0, 0B1, 0B2, 0B3, 0B4, 0B5 and 2 more: missing"):
        check_schedule(parse_schedule(f"{forwards} 0B8"))


@pytest.mark.parametrize(
    ("stage_ranks", "action", "message"),
    [
        ((0, 1), Action(2, "F", 0), "rank 0 acts as 2F0, and there are 2 stages"),
        ((0, 1), Action(0, "F", 5), "rank 0 acts as 0F5, and there are 1 microbatches"),
        ((1, 0), Action(0, "F", 0), "rank 0 acts as 0F0, and stage 0 is on rank 1"),
    ],
)
def test_an_action_of_another_rank_s_stage_or_of_no_microbatch_is_refused(
    stage_ranks: tuple[int, ...], action: Action, message: str
) -> None:
    schedule = Schedule(name="made", num_microbatches=1, stage_ranks=stage_ranks, actions=((action,), ()))
    with pytest.raises(ProgramError, match=message):
        check_schedule(schedule)


def test_a_schedule_of_nothing_is_refused() -> None:
    with pytest.raises(ProgramError, match="0 ranks, 0 stages and 0 microbatches runs nothing"):
        check_schedule(Schedule(name="made", num_microbatches=0, stage_ranks=(), actions=()))


def test_a_stuck_schedule_is_refused_with_its_grid_and_the_actions_that_wait() -> None:
    with pytest.raises(ProgramError) as caught:
        check_schedule(parse_schedule("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1"))
    assert str(caught.value) == (
        "schedule custom cannot run to its end:\n"
        "rank 0 | F0 ?? B0\n"
        "rank 1 | .. F0 ?? F1\n"
        "rank 0 waits at 0B0 (action 2 of 4) for 1B0, which is action 3 of rank 1\n"
        "rank 1 waits at 1F1 (action 2 of 4) for 0F1, which is action 3 of rank 0\n"
        "hint: on each rank, put an action behind what it waits for"
    )


def test_a_weight_gradient_before_that_of_the_input_is_stuck() -> None:
    with pytest.raises(ProgramError, match=r"rank 0 waits at 0W0 .* for 0I0, which is action 3 of rank 0"):
        check_schedule(parse_schedule("0F0 0W0 0I0\n1F0 1B0"))


def test_of_many_waiting_ranks_six_are_named() -> None:
    rows = [f"{s}F0 {s}B0" for s in range(9)] + ["9B0 9F0"]
    with pytest.raises(ProgramError, match="and 4 more ranks"):
        check_schedule(parse_schedule("\n".join(rows)))


@given(num_ranks=st.integers(1, 5), num_microbatches=st.integers(1, 6), seed=st.integers(0, 999))
def test_swapped_actions_run_to_the_end_or_are_refused(
    num_ranks: int, num_microbatches: int, seed: int
) -> None:
    """A swap within a stage's needs (F, I, W of one microbatch) can never run."""
    rng = random.Random(seed)
    rows = [list(row) for row in zb_h1(num_ranks, num_microbatches).actions]
    row = rng.choice(rows)
    a, b = sorted(rng.sample(range(len(row)), 2))
    is_wrong = row[a].microbatch == row[b].microbatch
    row[a], row[b] = row[b], row[a]
    schedule = parse_schedule("\n".join(" ".join(map(str, row)) for row in rows))
    try:
        check_schedule(schedule)
    except ProgramError as error:
        assert "cannot run to its end" in str(error)
    else:
        assert not is_wrong


def test_a_grid_draws_what_idles_and_what_takes_two_units() -> None:
    assert draw(one_f_one_b(2, 3)) == (
        "rank 0 | F0 F1 .. .. B0 == F2 B1 == .. B2 ==\nrank 1 | .. F0 B0 == F1 B1 == F2 B2 =="
    )


def test_a_grid_names_stages_where_a_rank_has_several() -> None:
    assert draw(zb_v(1, 2)) == "rank 0 | 0F0 1F0 1I0 1W0 0F1 0I0 0W0 1F1 1I1 1W1 0I1 0W1"
    assert draw(forward_only(2, 2, 2)) == "rank 0 | 0F0 0F1 2F0 2F1\nrank 1 | ... 1F0 1F1 3F0 3F1"


def test_a_long_grid_ends_in_dots_and_fits() -> None:
    lines = draw(gpipe(12, 40)).splitlines()
    assert all(len(line) == 80 and line.endswith("…") for line in lines)
    assert lines[0].startswith("rank  0 | F0  F1  F2")
    assert draw(gpipe(2, 40), num_columns=1000).count("…") == 0
