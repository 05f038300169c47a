"""GPipe and 1F1B, held against their published figures and their invariants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstage.errors import ProgramError
from shardstage.schedule import SCHEDULES, Action, gpipe, one_f_one_b

SIZES = {"num_stages": st.integers(1, 9), "num_microbatches": st.integers(1, 17)}


def test_gpipe_is_the_one_of_the_paper() -> None:
    assert str(gpipe(3, 3)) == ("0F0 0F1 0F2 0B2 0B1 0B0\n1F0 1F1 1F2 1B2 1B1 1B0\n2F0 2F1 2F2 2B2 2B1 2B0")


def test_one_f_one_b_is_the_one_of_the_paper() -> None:
    """Narayanan et al. 2021, figure 4: four stages, eight microbatches."""
    assert str(one_f_one_b(4, 8)) == (
        "0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0F6 0B3 0F7 0B4 0B5 0B6 0B7\n"
        "1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3 1F6 1B4 1F7 1B5 1B6 1B7\n"
        "2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4 2F6 2B5 2F7 2B6 2B7\n"
        "3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5 3F6 3B6 3F7 3B7"
    )


@pytest.mark.parametrize("name", SCHEDULES)
@given(**SIZES)
def test_every_stage_runs_every_microbatch_once_each_way(
    name: str, num_stages: int, num_microbatches: int
) -> None:
    schedule = SCHEDULES[name](num_stages, num_microbatches)
    for stage, row in enumerate(schedule.actions):
        wanted = {Action(stage, kind, m) for kind in ("F", "B") for m in range(num_microbatches)}
        assert len(row) == len(wanted)
        assert set(row) == wanted


@pytest.mark.parametrize("name", SCHEDULES)
@given(**SIZES)
def test_a_backward_follows_its_forward(name: str, num_stages: int, num_microbatches: int) -> None:
    for row in SCHEDULES[name](num_stages, num_microbatches).actions:
        place = {(action.kind, action.microbatch): i for i, action in enumerate(row)}
        assert all(place["F", m] < place["B", m] for m in range(num_microbatches))


@given(**SIZES)
def test_one_f_one_b_holds_no_more_microbatches_than_stages_follow(
    num_stages: int, num_microbatches: int
) -> None:
    schedule = one_f_one_b(num_stages, num_microbatches)
    for stage in range(num_stages):
        assert schedule.max_in_flight(stage) == min(num_stages - stage, num_microbatches)


@given(**SIZES)
def test_gpipe_holds_all_microbatches(num_stages: int, num_microbatches: int) -> None:
    assert gpipe(num_stages, num_microbatches).max_in_flight(0) == num_microbatches


@given(stage=st.integers(0, 99), kind=st.sampled_from(["F", "B"]), microbatch=st.integers(0, 999))
def test_an_action_is_read_back_from_its_text(stage: int, kind: str, microbatch: int) -> None:
    text = f"{stage}{kind}{microbatch}"
    assert str(Action.parse(text)) == text


@pytest.mark.parametrize("text", ["", "F0", "0X1", "0F", "0F1 ", "-1F0"])
def test_what_is_no_action_is_refused_by_name(text: str) -> None:
    with pytest.raises(ProgramError, match="is not an action"):
        Action.parse(text)
