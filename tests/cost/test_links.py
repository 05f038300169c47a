"""Talk that runs beside compute: what of it is seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cost.machines import round_machine

from shardstage.cluster import load
from shardstage.cost.links import exposed_s, overlap_slowdown

seconds = st.floats(0, 10)


@given(seconds, seconds, st.floats(0, 1), st.floats(0, 1))
def test_exposed_talk_is_what_a_race_in_small_steps_adds(
    talk_s: float, compute_s: float, slowdown: float, first: float
) -> None:
    first_s, step_s = first * talk_s, 1e-2
    elapsed_s, talk_left_s, compute_left_s = first_s, talk_s - first_s, compute_s
    while talk_left_s > 0 or compute_left_s > 0:
        compute_left_s -= step_s * (1 - slowdown if talk_left_s > 0 else 1)
        talk_left_s -= step_s
        elapsed_s += step_s
    found = exposed_s(talk_s, compute_s, slowdown, first_s)
    assert found == pytest.approx(elapsed_s - compute_s, abs=3 * step_s)


@given(seconds, seconds, st.floats(0, 1))
def test_it_is_at_most_all_talk_and_at_least_none(talk_s: float, compute_s: float, slowdown: float) -> None:
    assert -1e-9 <= exposed_s(talk_s, compute_s, slowdown) <= talk_s + 1e-9
    assert exposed_s(talk_s, compute_s, 1.0) == talk_s, "taking turns"


def test_a_device_without_a_kernel_model_is_slowed_down_as_its_kind_is() -> None:
    assert overlap_slowdown(round_machine(kind="cpu").device) == 1
    assert 0 < overlap_slowdown(round_machine().device) < 0.3
    kernels = load("h100").device.kernels
    assert kernels is not None and overlap_slowdown(load("h100").device) == kernels.overlap_slowdown
