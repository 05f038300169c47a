"""Free placements: against all placements tried one by one, their bound, their starts, their sums."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from shardstage.errors import PlanError
from shardstage.planner.placement import (
    PlacementGraph,
    Tensor,
    device_loads_s,
    lower_bound,
    place,
    place_contiguous,
    stage_time_s,
)
from shardstage.planner.placement.anneal import _Walk
from shardstage.planner.placement.limits import Limits
from shardstage.planner.placement.multilevel import coarsen, v_cycle
from shardstage.planner.placement.refine import _State, refine, standing

MakeGraph = Callable[[np.random.Generator, int], PlacementGraph]


@pytest.mark.parametrize("seed", range(24))
def test_a_small_graph_is_placed_as_well_as_by_trying_all(
    seed: int, make_graph: MakeGraph, slow: Callable[..., float]
) -> None:
    graph = make_graph(np.random.default_rng(1000 + seed), 6)
    limit_bytes = math.inf if seed % 3 else float(max(4.0, 0.6 * sum(graph.memory_bytes)))
    expected_s = slow(graph, 2, num_hosts=1, limit_bytes=limit_bytes, contiguous=False)
    found = place(graph, 2, num_hosts=1, memory_limit_bytes=limit_bytes, max_moves=12_000)
    assert found.stage_time_s == pytest.approx(expected_s)
    assert found.lower_bound_s <= expected_s * (1 + 1e-9)
    assert stage_time_s(graph, found.device_of, num_devices=2, num_hosts=1) == found.stage_time_s


def test_a_scattered_placement_may_beat_every_contiguous_one() -> None:
    links = tuple(Tensor(producer=i, consumers=(i + 1,), transfer_s=0.1) for i in range(3))
    graph = PlacementGraph(compute_s=(4.0, 4.0, 2.0, 2.0), tensors=links)
    assert place_contiguous(graph, 2).stage_time_s == pytest.approx(8.1)
    assert place(graph, 2, max_moves=500).stage_time_s == pytest.approx(6.2)


def test_a_given_start_is_never_made_worse(make_graph: MakeGraph) -> None:
    graph = make_graph(np.random.default_rng(5), 12)
    start = place(graph, 3, num_hosts=1, max_moves=3000)
    again = place(graph, 3, num_hosts=1, max_moves=1, starts={"known": start.device_of}, seed=9)
    assert again.stage_time_s <= start.stage_time_s


def test_the_same_seed_gives_the_same_placement(make_graph: MakeGraph) -> None:
    graph = make_graph(np.random.default_rng(6), 20)
    first, second = (
        place(graph, 3, num_hosts=1, max_moves=2000, time_limit_s=60.0, seed=3) for _ in range(2)
    )
    assert first == second


def test_a_proof_of_optimality_ends_the_search() -> None:
    graph = PlacementGraph(
        compute_s=(3.0, 3.0), tensors=(Tensor(producer=0, consumers=(1,), transfer_s=5.0),)
    )
    found = place(graph, 2, max_moves=10**9, time_limit_s=1e9)
    assert found.stage_time_s == found.lower_bound_s == 6.0


def test_nets_that_cannot_be_cut_raise_the_bound_above_the_mean() -> None:
    graph = PlacementGraph(
        compute_s=(4.0, 4.0, 1.0), tensors=(Tensor(producer=0, consumers=(1,), transfer_s=50.0),)
    )
    assert lower_bound(graph, 3) == pytest.approx(8.0, rel=1e-3)


def test_memory_decides_before_time() -> None:
    graph = PlacementGraph(
        compute_s=(1.0, 1.0, 1.0, 1.0),
        tensors=(Tensor(producer=0, consumers=(1, 2, 3), transfer_s=100.0),),
        memory_bytes=(2.0, 2.0, 2.0, 2.0),
    )
    assert place(graph, 2, memory_limit_bytes=8.0, max_moves=500).stage_time_s == 4.0
    assert place(graph, 2, memory_limit_bytes=4.0, max_moves=500).stage_time_s == 102.0
    with pytest.raises(PlanError, match="too many"):
        place(graph, 2, memory_limit_bytes=3.0, max_moves=500)


@pytest.mark.parametrize("seed", range(8))
def test_sums_brought_up_to_date_equal_sums_made_anew(seed: int, make_graph: MakeGraph) -> None:
    rng = np.random.default_rng(seed)
    limits = Limits(num_devices=3, num_hosts=1, memory_limit_bytes=math.inf)
    graph = make_graph(rng, 12)
    clusters = limits.clusters(graph, is_ordered=False)
    device_of = rng.integers(4, size=len(clusters))
    state = _State(clusters, limits, device_of)
    for _ in range(30):
        one, target = int(rng.integers(len(clusters))), int(rng.integers(4))
        if target != state.device_of[one]:
            state.move(one, target)
    anew = _State(clusters, limits, state.device_of)
    for name in ("loads_s", "leaves_s", "joins_s", "held", "held_bytes"):
        np.testing.assert_allclose(getattr(state, name), getattr(anew, name), atol=1e-9)
    nodes = clusters.spread(state.device_of.tolist(), graph.num_nodes)
    np.testing.assert_allclose(
        state.loads_s, device_loads_s(graph, nodes, num_devices=3, num_hosts=1), atol=1e-9
    )


def test_coarsening_keeps_compute_and_never_joins_across_devices(make_graph: MakeGraph) -> None:
    rng = np.random.default_rng(2)
    limits = Limits(num_devices=2, num_hosts=1, memory_limit_bytes=math.inf)
    clusters = limits.clusters(make_graph(rng, 30), is_ordered=False)
    device_of = rng.integers(2, size=len(clusters))
    coarser, parent = coarsen(clusters, device_of, num_devices=2, rng=rng)
    assert len(coarser) < len(clusters)
    assert coarser.compute_s.sum() == pytest.approx(clusters.compute_s.sum())
    for one in range(len(coarser)):
        assert len(set(device_of[parent == one].tolist())) == 1


def test_refinement_never_returns_worse_than_its_start(make_graph: MakeGraph) -> None:
    rng = np.random.default_rng(3)
    limits = Limits(num_devices=3, num_hosts=1, memory_limit_bytes=math.inf)
    clusters = limits.clusters(make_graph(rng, 15), is_ordered=False)
    start = np.where(clusters.on_accelerator, rng.integers(3, size=len(clusters)), 3)
    before_s = standing(clusters, limits, start).stage_time_s
    assert before_s == pytest.approx(float(_State(clusters, limits, start).loads_s.max()))
    best, moves = refine(clusters, limits, start, max_moves=50, patience=50, rng=rng)
    assert best.stage_time_s <= before_s
    assert moves <= 50


@pytest.mark.parametrize("seed", range(6))
def test_annealing_keeps_its_loads_and_its_list_of_cut_nets(seed: int, make_graph: MakeGraph) -> None:
    rng = np.random.default_rng(seed)
    limits = Limits(num_devices=3, num_hosts=1, memory_limit_bytes=math.inf)
    graph = make_graph(rng, 14)
    clusters = limits.clusters(graph, is_ordered=False)
    start = np.where(clusters.on_accelerator, rng.integers(3, size=len(clusters)), 3)
    walk = _Walk(clusters, limits, start, power=4, best_s=math.inf, seed=seed)
    walk.scale_s = 10.0
    walk.step(0.5, 2000)
    np.testing.assert_allclose(walk.loads_s, walk._loads(), atol=1e-9)
    cut = [i for i, net in enumerate(walk.nets) if len({walk.device_of[one] for one in net}) > 1]
    assert sorted(walk.cut_nets) == cut
    assert all(on or device == 3 for on, device in zip(walk.on_accelerator, walk.device_of, strict=True))
    best = standing(clusters, limits, np.array(walk.best_device_of))
    assert best.stage_time_s == pytest.approx(min(walk.best_s, best.stage_time_s))


def test_parts_of_two_placements_are_kept_apart_when_they_are_combined(make_graph: MakeGraph) -> None:
    rng = np.random.default_rng(4)
    limits = Limits(num_devices=3, num_hosts=0, memory_limit_bytes=math.inf)
    graph = PlacementGraph(
        compute_s=tuple(float(one) for one in rng.integers(1, 9, size=40)),
        tensors=tuple(Tensor(producer=i, consumers=(i + 1,), transfer_s=0.5) for i in range(39)),
    )
    clusters = limits.clusters(graph, is_ordered=False)
    one, other = rng.integers(3, size=40), rng.integers(3, size=40)
    found = v_cycle(clusters, limits, one, keep_apart=other, proposals=2000, coarsest=10, rng=rng)
    assert found.stage_time_s <= standing(clusters, limits, one).stage_time_s
