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


NAMED = ("layers.*", "layers.[35]", "*.act", "*.up/*.act", "*.act/*.down")


def with_activations(graph: ModelGraph = GRAPH) -> ModelGraph:
    ops = (replace(op, module=f"{op.module}.act") if op.name.startswith("relu") else op for op in graph.ops)
    return replace(graph, ops=tuple(ops))


def named(text: str, *, tp: int = 1) -> Profile:
    folded = fold(with_activations(), modules=tuple(text.split("/")))
    return profile(folded, round_machine(), tp=tp, microbatch=2, sequence=16)


@pytest.mark.parametrize("text", NAMED)
def test_with_modules_named_units_keep_what_the_graph_does(text: str) -> None:
    graph = with_activations().at(microbatch=2, sequence=16)
    whole = saved_bytes(graph, 0, len(graph.ops), "selective", modules=text.split("/"))
    assert sum(unit.kept["selective"].saved_bytes for unit in named(text).units) == whole


def test_named_modules_take_as_long_again_as_their_forward() -> None:
    plain, act, both, whole = (named(text).units[3] for text in ("embed", "*.act", "*.up/*.act", "layers.*"))
    again = [unit.kept["selective"].recompute_s for unit in (plain, act, both, whole)]
    assert 0 == again[0] < again[1] < again[2] == again[3] < whole.kept["full"].recompute_s, (
        "add is not run again"
    )
    assert again[2] < whole.forward_s
    assert whole.kept["selective"].saved_bytes == whole.kept["full"].saved_bytes
    for unit in (plain, act, both):
        assert unit.kept["full"] == whole.kept["full"] and unit.kept["none"] == whole.kept["none"]


def test_calls_in_named_modules_are_made_again() -> None:
    """Under tp the sum after ``down`` is needed by nothing that is recomputed, and that before ``up`` goes backward alone."""
    calls = named("layers.*", tp=2).units[3]
    assert calls.tp_forward_s > 0
    assert calls.kept["full"].recompute_s - calls.kept["selective"].recompute_s > calls.tp_forward_s


@pytest.mark.parametrize("text", ["layers.*", "*.act", "*.up/*.act"])
def test_modules_named_later_cost_the_same(text: str) -> None:
    modules = tuple(text.split("/"))
    made = Profiler(fold(with_activations()), round_machine(), tp=2, sequence=16)
    assert made.naming(modules).at(2).units == named(text, tp=2).units
    assert (
        made.at(2).units
        == profile(fold(with_activations()), round_machine(), tp=2, microbatch=2, sequence=16).units
    )


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
