"""What units cost a rank: sums agree with the graph, sharding halves, recomputing trades bytes for seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph

from shardstage.cluster import load
from shardstage.cost import Profile, Profiler, fold, profile
from shardstage.graph import ModelGraph
from shardstage.graph.flops import backward_flops, forward_flops
from shardstage.graph.saved import saved_bytes

GRAPH = toy_graph(num_layers=6)


def priced(graph: ModelGraph = GRAPH, *, tp: int = 1, microbatch: int = 2, sp: bool = False) -> Profile:
    return profile(
        fold(graph),
        round_machine(),
        tp=tp,
        microbatch=microbatch,
        sequence=16,
        is_sequence_parallel=sp,
    )


def test_units_add_up_to_the_graph() -> None:
    graph = GRAPH.at(microbatch=2, sequence=16)
    units = priced().units
    assert sum(unit.forward_flops for unit in units) == sum(forward_flops(graph, op) for op in graph.ops)
    assert sum(unit.backward_flops for unit in units) == sum(backward_flops(graph, op) for op in graph.ops)
    assert sum(unit.own_elements for unit in units) == graph.num_parameters
    assert priced().whole_flops == sum(unit.forward_flops for unit in units)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_saved_bytes_of_units_add_up_to_the_graph_s(recompute: str) -> None:
    graph = GRAPH.at(microbatch=2, sequence=16)
    whole = saved_bytes(graph, 0, len(graph.ops), recompute)  # type: ignore[arg-type]
    kept = [unit.kept[recompute].saved_bytes for unit in priced().units]  # type: ignore[index]
    assert sum(kept) == whole


def test_a_tied_weight_is_shared_and_counted_once() -> None:
    tied = priced(toy_graph(num_layers=6, is_tied=True))
    assert tied.shared_elements == {"p_embed_weight": 64 * 8}
    assert [unit.shared for unit in tied.units if unit.shared] == [("p_embed_weight",)] * 2
    assert tied.units[0].own_elements == 0


def test_two_ranks_share_the_work_and_talk() -> None:
    alone, shared = priced(), priced(tp=2)
    assert [2 * unit.forward_flops for unit in shared.units] == [unit.forward_flops for unit in alone.units]
    assert all(unit.tp_forward_s == 0 for unit in alone.units)
    assert shared.units[3].tp_forward_s > 0 and shared.units[3].tp_backward_s > 0
    assert shared.units[3].tp_bytes == (("all_reduce", 2, 2 * 4 * 2 * 16 * 8),)
    assert shared.whole_flops == alone.whole_flops


def test_sequence_parallel_halves_what_lies_between_layers_and_gathers_it() -> None:
    whole, cut = (priced(tp=2, sp=sp).units[3] for sp in (False, True))
    assert 2 * cut.input_bytes == whole.input_bytes
    assert {kind for kind, _, _ in cut.tp_bytes} == {"all_gather", "reduce_scatter"}


def test_recomputing_keeps_less_and_takes_longer() -> None:
    kept = priced().units[3].kept
    assert kept["none"].saved_bytes > kept["full"].saved_bytes
    assert kept["selective"].saved_bytes >= kept["full"].saved_bytes
    assert kept["full"].recompute_s > kept["selective"].recompute_s > 0 == kept["none"].recompute_s
    assert kept["full"].extra_bytes > 0 == kept["none"].extra_bytes


def test_head_and_embedding_are_not_recomputed() -> None:
    for unit in (priced().units[0], priced().units[-1]):
        assert unit.kept["full"].recompute_s == 0.0


def test_costs_grow_with_the_microbatch() -> None:
    small, large = priced(microbatch=2).units, priced(microbatch=4).units
    for a, b in zip(small, large, strict=True):
        assert b.forward_s > a.forward_s
        assert b.kept["none"].saved_bytes == 2 * a.kept["none"].saved_bytes
        assert b.own_elements == a.own_elements


def test_a_host_that_waits_for_kernels_adds_each_launch() -> None:
    """A host that runs ahead hides its launches, or hides the kernels: the longer of both counts. One that waits pays for both."""
    cluster = load("a100-80:1")
    kernels = cluster.device.kernels
    assert kernels is not None

    def seconds(dispatch_s: float, *, waits: bool) -> list[float]:
        device = replace(cluster.device, kernels=replace(kernels, dispatch_s=dispatch_s))
        host = replace(cluster, device=device)
        made = Profiler(fold(GRAPH), host, tp=1, sequence=16, waits_for_kernels=waits)
        return [unit.forward_s for unit in made.at(2).units]

    on_device, on_host = seconds(0.0, waits=False), seconds(1.0, waits=False)
    both = [one + other for one, other in zip(on_device, on_host, strict=True)]
    assert seconds(1.0, waits=True) == pytest.approx(both)
