"""The step of an optimizer in the host's memory, from rates that can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.cost.machines import round_machine
from tests.cost.test_memory import setup
from tests.cost.test_step import step

from shardstage.cluster import DeviceClass, HostShare
from shardstage.cost.compute import optimizer_s
from shardstage.cost.offload import has_host_room, host_of, offloaded_update_s
from shardstage.layout import Mesh

HOST = HostShare(link_bytes_per_s=1e8, memory_bytes_per_s=1e7, memory_bytes=1000, source="made up")


def device(kind: str = "cuda", host: HostShare | None = HOST) -> DeviceClass:
    return replace(round_machine(kind=kind).device, host=host)


@pytest.mark.parametrize(
    ("zero", "precision", "gradients", "down", "up"),
    [
        (0, "float32", None, 4, 4),
        (0, "bfloat16", None, 4, 2),
        (1, "bfloat16", "bfloat16", 2, 2),
        (2, "bfloat16", None, 4, 4),
        (3, "bfloat16", "bfloat16", 2, 2),
    ],
)
def test_gradients_go_down_masters_are_updated_there_and_parameters_come_up(
    zero: int, precision: str, gradients: str | None, down: int, up: int
) -> None:
    case = setup(zero=zero, precision=precision, gradient_dtype=gradients, is_offloaded=True)
    assert (case.gradient_bytes, case.stored_bytes) == (down, up)
    widths = {"down_bytes": down, "up_bytes": up, "element_bytes": 4}
    seconds = offloaded_update_s(1000, device(), **widths)
    norm_s, travel_s, update_s = 1000 * down / 1e9, 1000 * (down + up) / 1e8, 8 * 1000 * 4 / 1e7
    assert seconds == pytest.approx(norm_s + travel_s + update_s)
    assert offloaded_update_s(2000, device(), **widths) == pytest.approx(2 * seconds)


def test_a_cpu_is_its_own_host_and_only_copies() -> None:
    cpu = device("cpu", None)
    assert host_of(cpu) is None and has_host_room(10**30, cpu)
    copies_s = 2 * 1000 * (4 + 4) / 1e9
    seconds = offloaded_update_s(1000, cpu, down_bytes=4, up_bytes=4, element_bytes=4)
    assert seconds == pytest.approx(copies_s + optimizer_s(1000, 4, 0, cpu))


def test_a_gpu_of_unknown_host_has_a_slow_one_without_limit() -> None:
    assert has_host_room(10**15, device(host=None))
    seconds = offloaded_update_s(1, device(host=None), down_bytes=4, up_bytes=4, element_bytes=4)
    assert seconds > 8 * 4 / 2e10


def test_a_host_keeps_a_tenth_for_itself() -> None:
    assert has_host_room(900, device()) and not has_host_room(901, device())


def test_a_step_pays_for_the_way_to_the_host_and_holds_less() -> None:
    cluster = round_machine(4)
    cluster = replace(cluster, device=replace(cluster.device, host=HOST))
    here, there = (step(cluster, mesh=Mesh(dp=4), zero=1, is_offloaded=off) for off in (False, True))
    assert there.optimizer_s > here.optimizer_s
    assert there.peak_bytes < here.peak_bytes
    assert here.host_bytes == 0 < there.host_bytes


def test_narrow_gradients_are_added_and_reduced_in_less_time() -> None:
    cluster = round_machine(8, kind="cpu", node=1)
    wide, narrow = (
        step(cluster, mesh=Mesh(dp=4), precision="bfloat16", gradient_dtype=dtype)
        for dtype in (None, "bfloat16")
    )
    assert narrow.exposed_dp_s == pytest.approx(wide.exposed_dp_s / 2)
    assert narrow.stages[0].backward_s < wide.stages[0].backward_s
