"""Models on devices: lines against all cuts tried, towers side by side, what is said of them and what is refused."""

from __future__ import annotations

import itertools

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph
from tests.planner.mixed.instances import machines
from tests.planner.placement.captured import Towers, captured, captured_clip

from shardstage.cluster import load
from shardstage.errors import PlanError
from shardstage.planner.placement import PlacementGraph, place_model, stage_time_s

MACHINE = round_machine(8, latency_s=1e-6)


def best_cut_s(graph: PlacementGraph, num_devices: int) -> float:
    """The fastest line of stages of the nodes in their order, by trying all."""
    cuts = itertools.combinations_with_replacement(range(graph.num_nodes + 1), num_devices - 1)
    return min(
        stage_time_s(
            graph,
            [sum(node >= cut for cut in each) for node in range(graph.num_nodes)],
            num_devices=num_devices,
        )
        for each in cuts
    )


@pytest.mark.parametrize("num_devices", [1, 2, 3])
@pytest.mark.parametrize("hidden", [128, (64, 512, 32, 256)])
def test_a_chain_is_cut_as_well_as_by_trying_all_cuts(
    num_devices: int, hidden: int | tuple[int, ...]
) -> None:
    """Each op of the toy reads what the one before it makes: contiguous placements are its lines."""
    graph = toy_graph(num_layers=4, width=64, hidden=hidden, vocab=512)
    found = place_model(graph, MACHINE, num_devices=num_devices, microbatch=2, sequence=64, max_moves=5000)
    expected_s = best_cut_s(found.ops.placement, num_devices)
    assert found.line.stage_time_s == pytest.approx(expected_s, rel=1e-12)
    assert found.contiguous.stage_time_s == pytest.approx(expected_s, rel=1e-12)
    assert found.free.stage_time_s <= expected_s * (1 + 1e-12)
    assert found.free.lower_bound_s <= found.free.stage_time_s


def test_towers_side_by_side_beat_every_line() -> None:
    """Every cut of the captured order sends both towers' values; a tower on each device sends one, at the end."""
    graph = captured(Towers(4))
    found = place_model(graph, MACHINE, num_devices=2, microbatch=8, sequence=None, max_moves=5000)
    assert found.line.stage_time_s == pytest.approx(best_cut_s(found.ops.placement, 2), rel=1e-12)
    assert found.contiguous.stage_time_s < found.line.stage_time_s
    assert found.gain_ratio > 0.02
    left, right = sorted(found.modules_of(found.contiguous), key=lambda names: "left" not in names)
    assert "left" in left
    assert "right" in right


def test_the_towers_of_clip_beat_every_line_where_links_are_slow() -> None:
    graph = captured_clip()
    found = place_model(graph, load("cpu:4"), num_devices=3, microbatch=4, sequence=16, max_moves=20_000)
    assert found.contiguous.method.startswith("exact")
    assert found.free.stage_time_s <= found.contiguous.stage_time_s < found.line.stage_time_s / 1.02
    again = place_model(graph, load("cpu:4"), num_devices=3, microbatch=4, sequence=16, max_moves=20_000)
    assert again.free == found.free, "the same for the same seed"


def test_each_module_is_told_once_with_the_ops_of_those_that_are_split() -> None:
    graph = captured(Towers(4))
    found = place_model(graph, MACHINE, num_devices=2, microbatch=8, sequence=None, max_moves=5000)
    devices = found.device_of_op(found.line)
    assert list(devices) == [op.name for op in graph.ops]
    told = [name for names in found.modules_of(found.line) for name in names]
    assert len(told) == len(set(told))
    assert sum(found.loads_s(found.line)) >= sum(found.ops.placement.compute_s)
    assert max(found.loads_s(found.line)) == pytest.approx(found.line.stage_time_s)
    assert sum(found.memory_bytes(found.line)) == pytest.approx(sum(found.ops.placement.memory_bytes))


def test_on_one_device_all_placements_are_the_whole_model() -> None:
    found = place_model(captured(Towers(1)), MACHINE, num_devices=1, microbatch=8, sequence=None)
    assert found.modules_of(found.free) == (("the whole model",),)
    assert found.free.stage_time_s == pytest.approx(sum(found.ops.placement.compute_s))
    assert found.gain_ratio == pytest.approx(0.0)


def test_devices_beyond_the_ops_stay_empty() -> None:
    found = place_model(
        captured(Towers(1)), MACHINE, num_devices=8, microbatch=8, sequence=None, max_moves=5000
    )
    assert found.ops.placement.num_nodes < 8
    assert () in found.modules_of(found.free)
    assert max(found.loads_s(found.free)) == pytest.approx(found.free.stage_time_s)


def test_what_cannot_be_placed_is_refused() -> None:
    graph = toy_graph(num_layers=4, width=64)
    with pytest.raises(PlanError, match="9 ranks need as many devices"):
        place_model(graph, MACHINE, num_devices=9, microbatch=2, sequence=64)
    with pytest.raises(PlanError, match="0 devices and 0 hosts"):
        place_model(graph, MACHINE, num_devices=0, microbatch=2, sequence=64)
    with pytest.raises(PlanError, match="no contiguous placement on 2 devices of 1000 bytes"):
        place_model(graph, MACHINE, num_devices=2, microbatch=2, sequence=64, memory_limit_bytes=1000)
    with pytest.raises(PlanError, match="several classes of devices"):
        place_model(graph, machines((2, 1.0), (2, 2.0)), num_devices=2, microbatch=2, sequence=64)


def test_memory_moves_ops_from_where_they_would_be_fastest() -> None:
    """Kernels of all layers are short, and the first two hold nearly all parameters: halves by time are not halves by bytes."""
    graph = toy_graph(num_layers=8, width=64, hidden=(1024, 1024, *[32] * 6), vocab=64)
    machine = load("h100:8")
    roomy = place_model(graph, machine, num_devices=2, microbatch=2, sequence=64, max_moves=5000)
    limit_bytes = 0.9 * max(roomy.memory_bytes(roomy.line))
    tight = place_model(
        graph,
        machine,
        num_devices=2,
        microbatch=2,
        sequence=64,
        memory_limit_bytes=limit_bytes,
        max_moves=5000,
    )
    for placement in (tight.line, tight.contiguous, tight.free):
        assert max(tight.memory_bytes(placement)) <= limit_bytes * (1 + 1e-9)
    assert tight.line.stage_time_s > 1.2 * roomy.line.stage_time_s
    assert tight.gain_ratio > 0.2
