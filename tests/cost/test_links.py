"""Talk that runs beside compute: what of it is seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cost.machines import round_machine

from shardstage.cluster import load
from shardstage.cost.links import Links, exposed_s, overlap_slowdown
from shardstage.layout import Mesh

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


@given(st.sampled_from([1, 2, 4, 8]), st.floats(1, 1e9))
def test_each_tensor_parallel_rank_sends_its_part_of_the_tokens_and_all_gather_them(
    tp: int, num_bytes: float
) -> None:
    """Between hosts of 8: what is sent shrinks by tp, what is gathered stays within the host."""
    cluster = load("h100:64")
    whole = Links(cluster, Mesh(dp=64 // tp, tp=tp), ep=64 // tp).exchange_cost.seconds(num_bytes)
    sent_s = cluster.collective("all_to_all", range(0, 64, tp)).seconds(num_bytes / tp)
    gathered_s = cluster.collective("all_gather", range(tp)).seconds(num_bytes) if tp > 1 else 0.0
    assert whole == pytest.approx(sent_s + gathered_s)
