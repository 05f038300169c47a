"""The search: nothing that fits is faster, nothing that does not fit is chosen, and every rejection says why."""

from __future__ import annotations

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph

from shardstage.cluster import Cluster
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.plan import check, complete, parse_request
from shardstage.planner import SearchResult, predict, search
from shardstage.planner.candidates import choices

GRAPH = toy_graph(num_layers=6, width=256, hidden=1024, vocab=512)
MACHINE = round_machine(8, latency_s=1e-6)


def found(
    graph: ModelGraph = GRAPH,
    cluster: Cluster = MACHINE,
    *,
    ranks: int = 4,
    batch: int = 16,
    memory_bytes: int | None = None,
) -> SearchResult:
    return search(graph, cluster, num_ranks=ranks, global_batch=batch, sequence=64, memory_bytes=memory_bytes)


def peak_bytes(text: str, *, ranks: int = 4) -> int:
    plan = complete(parse_request(text), GRAPH, num_ranks=ranks, global_batch=16, sequence=64)
    return predict(GRAPH, plan, MACHINE).peak_bytes


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_the_best_plan_passes_its_check_and_costs_what_was_said(ranks: int) -> None:
    result = found(ranks=ranks)
    check(result.best, GRAPH, num_ranks=ranks, cluster=MACHINE)
    assert predict(GRAPH, result.best, MACHINE) == result.prediction


def test_no_candidate_is_clearly_faster_than_the_best() -> None:
    result = found()
    for candidate in result.considered[::5]:
        plan = complete(parse_request(candidate.text), GRAPH, num_ranks=4, global_batch=16, sequence=64)
        assert predict(GRAPH, plan, MACHINE).step_time_s * 1.0101 >= result.prediction.step_time_s


def test_every_choice_is_considered_once_with_a_price_or_a_reason() -> None:
    result = found()
    texts = [candidate.text for candidate in result.considered]
    assert len(texts) == len(set(texts)) == len(list(choices(GRAPH, MACHINE, 4, 16, 64, num_units=8)))
    assert all(candidate.reason for candidate in result.considered[1:])
    assert result.considered[0].prediction == result.prediction
    times = [c.prediction.step_time_s for c in result.alternatives if c.prediction]
    assert len(times) >= 11 and times == sorted(times)


def test_of_plans_that_are_as_fast_the_simplest_is_taken() -> None:
    result = found(ranks=2, batch=2)
    as_fast = [c for c in result.considered if c.reason == "as fast, not as simple"]
    for candidate in as_fast:
        assert candidate.prediction is not None
        assert candidate.prediction.step_time_s <= 1.011 * result.prediction.step_time_s
    assert found(ranks=1).best.recompute == "none"


def test_less_memory_forces_a_plan_that_saves_some() -> None:
    plenty = found()
    tight = found(memory_bytes=plenty.prediction.peak_bytes - 1)
    assert tight.prediction.peak_bytes < plenty.prediction.peak_bytes
    assert tight.prediction.step_time_s >= plenty.prediction.step_time_s / 1.01
    rejected = next(c for c in tight.considered if c.text == plenty.considered[0].text)
    assert rejected.prediction is None and "too much" in rejected.reason


def test_nothing_fits_names_the_nearest_miss() -> None:
    with pytest.raises(
        PlanError, match=r"none of \d+ plans for 4 ranks fits into 1.00 KiB a rank; the nearest, dp="
    ) as caught:
        found(memory_bytes=1024)
    assert caught.value.hint is not None and "--memory" in caught.value.hint


def test_the_device_s_own_memory_is_the_limit() -> None:
    small = round_machine(8, memory_bytes=found().prediction.peak_bytes)
    assert found(cluster=small).prediction.peak_bytes <= 0.92 * small.device.memory_bytes


def test_more_ranks_than_devices_are_refused() -> None:
    with pytest.raises(PlanError, match="16 ranks need as many devices, and cluster 'round' has 8") as caught:
        found(ranks=16)
    assert caught.value.hint == "--cluster round:16"


def test_a_batch_that_no_mesh_can_share_is_refused() -> None:
    fixed = GRAPH.at(microbatch=3, sequence=64)
    with pytest.raises(PlanError, match="a batch of 16 samples cannot be shared by 4 ranks"):
        found(fixed)


def test_a_graph_of_one_size_gets_microbatches_of_that_size() -> None:
    fixed = GRAPH.at(microbatch=4, sequence=64)
    assert found(fixed).best.microbatch == 4


def test_tensor_parallelism_stays_within_a_node_and_stages_within_the_blocks() -> None:
    meshes = {choice.mesh for choice in choices(GRAPH, MACHINE, 8, 16, 64, num_units=3)}
    assert {mesh.tp for mesh in meshes} == {1, 2, 4}
    assert {mesh.pp for mesh in meshes} == {1, 2}
    assert {mesh.world_size for mesh in meshes} == {8}


def test_no_choice_leaves_a_rank_without_samples() -> None:
    for choice in choices(GRAPH, MACHINE, 6, 7, 64, num_units=8):
        assert min(choice.shares) >= -(-max(choice.shares) // choice.microbatch) >= 1
        assert sum(choice.shares) == 7


def test_a_small_batch_keeps_data_parallelism_small() -> None:
    assert {c.mesh.dp for c in choices(GRAPH, MACHINE, 8, 2, 64, num_units=8)} == {1, 2}


def test_few_blocks_are_cut_finer_for_many_ranks() -> None:
    shallow = toy_graph(num_layers=1)
    result = search(shallow, round_machine(8), num_ranks=8, global_batch=1, sequence=64)
    check(result.best, shallow, num_ranks=8)
