"""The analytic step: what each axis adds, what hides, and what the numbers mean."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from tests.cost.machines import round_machine
from tests.cost.test_memory import setup
from tests.cost.toy import toy_graph

from shardstage.cluster import Cluster, LinearCost, load
from shardstage.cost import Execution, Links, Prediction, Profile, fold, least_step_s, predict_step, profile
from shardstage.cost.links import exposed_s
from shardstage.cost.stages import stage_costs
from shardstage.cost.step import CALIBRATIONS
from shardstage.graph.recompute import PartialRecompute
from shardstage.layout import Mesh

GRAPH = toy_graph(num_layers=4)


def priced(cluster: Cluster, tp: int = 1, microbatch: int = 2) -> Profile:
    return profile(fold(GRAPH), cluster, tp=tp, microbatch=microbatch, sequence=16)


def step(cluster: Cluster | None = None, **changes: Any) -> Prediction:
    cluster = cluster or round_machine(64)
    case = setup(**changes)
    units = priced(cluster, case.mesh.tp, case.microbatch)
    prediction = predict_step(units, case, Links(cluster, case.mesh))
    bound = least_step_s(units, case, Links(cluster, case.mesh))
    assert bound <= prediction.step_time_s * (1 + 1e-12)
    return prediction


def test_one_rank_computes_adds_its_gradients_up_and_updates() -> None:
    cluster = round_machine(1)
    alone = step(cluster, mesh=Mesh())
    units = priced(cluster).units
    compute_s = 3 * sum(unit.forward_s + unit.backward_s for unit in units)
    adding_s = 3 * sum(unit.own_elements for unit in units) * (4 + 2 * 4) / 1e9
    expected = CALIBRATIONS["cuda"].expected
    assert alone.step_time_s == pytest.approx(expected * (compute_s + adding_s + alone.optimizer_s))
    assert (alone.exposed_dp_s, alone.exposed_tp_s, alone.exposed_pp_s) == (0, 0, 0)
    assert alone.bubble_ratio == pytest.approx(0)


def test_the_range_holds_the_expected_time() -> None:
    for kind in ("cuda", "cpu"):
        found = step(round_machine(4, kind=kind))
        assert found.step_time_low_s < found.step_time_s < found.step_time_high_s


def test_layers_that_recompute_are_counted_and_gather_once_more() -> None:
    """Alone and under ZeRO-3 where parameters travel apart: seconds rise evenly from none to all, and all are what full is."""
    layers = fold(GRAPH).layers
    partial = [PartialRecompute(full=n) for n in (1, 2, 3, 4)]
    for more in ({"mesh": Mesh()}, {"zero": 3, "execution": Execution(gathers_apart=2)}):
        none, *some, full = (
            step(recompute=recompute, layers=layers, **more) for recompute in ("none", *partial, "full")
        )
        assert some[-1] == full
        times = [found.step_time_s for found in (none, *some)]
        assert all(later > earlier for earlier, later in pairwise(times))


def test_rates_follow_from_the_time() -> None:
    found = step(global_batch=24)
    assert found.samples_per_s == pytest.approx(24 / found.step_time_s)
    assert found.tokens_per_s == pytest.approx(16 * found.samples_per_s)
    flops = 3 * priced(round_machine(64)).whole_flops * 24 / 2
    assert found.mfu == pytest.approx(flops / (found.step_time_s * 4 * 1e12))


def test_a_reduction_hides_under_the_last_backward_of_a_gpu_and_not_of_a_cpu() -> None:
    gpu, cpu = (step(round_machine(4, kind=kind), bucket_bytes=1024) for kind in ("cuda", "cpu"))
    assert 0 < gpu.exposed_dp_s < cpu.exposed_dp_s


def test_data_parallelism_across_nodes_costs_more_than_within() -> None:
    near = step(round_machine(4, kind="cpu"), mesh=Mesh(dp=4))
    far = step(round_machine(8, kind="cpu", node=1), mesh=Mesh(dp=4))
    assert far.exposed_dp_s > near.exposed_dp_s


def test_zero_1_updates_a_part_and_gathers_the_whole() -> None:
    plain, sharded = step(zero=0), step(zero=1)
    gathered_s = sharded.optimizer_s - plain.optimizer_s / 4
    assert gathered_s > 0


def test_zero_3_gathers_for_every_microbatch() -> None:
    cluster = round_machine(4, kind="cpu")
    two, three = step(cluster, zero=2), step(cluster, zero=3)
    gathers_s = sum(gather_s(cluster, unit.own_elements) for unit in priced(cluster).units)
    assert three.stages[0].forward_s == pytest.approx(two.stages[0].forward_s + gathers_s)
    assert three.stages[0].backward_s == pytest.approx(two.stages[0].backward_s + gathers_s)
    assert two.stages[0].forward_s == step(cluster, zero=0).stages[0].forward_s
    assert three.exposed_dp_s == pytest.approx(two.exposed_dp_s + 5 * gathers_s)  # 6 of 3 microbatches, not 1


def gather_s(cluster: Cluster, elements: int) -> float:
    """Of parameters over the four ranks of the mesh."""
    return Links(cluster, Mesh(dp=4)).replicas.shards_s("all_gather", 4 * elements)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_zero_2_gathers_once_a_step_beside_nothing(kind: str) -> None:
    """It was once priced for every microbatch: 8 to 22 % too slow on slow links."""
    cluster = round_machine(4, kind=kind)
    few, many = (step(cluster, zero=2, num_microbatches=m) for m in (3, 6))
    once_s = 2 * few.exposed_dp_s - many.exposed_dp_s
    units = priced(cluster).units
    assert once_s == pytest.approx(sum(gather_s(cluster, unit.own_elements) for unit in units))


@pytest.mark.parametrize(("bytes_per_s", "is_late"), [(1e12, False), (1e9, True)])
def test_later_stages_gather_while_the_first_microbatch_is_on_its_way(
    bytes_per_s: float, *, is_late: bool
) -> None:
    """A last stage of most units ends its gather after it: by so much later does the step begin."""
    cluster = round_machine(8)
    cluster = replace(
        cluster, levels=tuple(replace(level, bytes_per_s=bytes_per_s) for level in cluster.levels)
    )
    cut: dict[str, Any] = {"mesh": Mesh(pp=2, dp=4), "starts": (0, 1), "zero": 2}
    few, many = (step(cluster, num_microbatches=m, **cut) for m in (3, 6))
    found = stage_costs(priced(cluster), setup(**cut), Links(cluster, Mesh(pp=2, dp=4)))
    first_s, last_s = (stage.unshard_s for stage in found)
    late_s = last_s - found[0].time.forward_s
    assert (late_s > first_s > 0) == is_late
    assert 2 * few.exposed_dp_s - many.exposed_dp_s == pytest.approx(max(first_s, late_s))
    assert sum(few.parts.values()) * CALIBRATIONS["cuda"].expected == pytest.approx(few.step_time_s)


@pytest.mark.parametrize("zero", [2, 3])
def test_what_one_unit_of_a_stage_shares_with_another_stage_goes_with_the_unit(zero: int) -> None:
    """A tied embedding on two stages is a block's own on each of them, as FSDP2 is told; on one, the stage's, gathered once."""
    cluster = round_machine(8, kind="cpu")
    units = profile(fold(toy_graph(num_layers=4, is_tied=True)), cluster, tp=1, microbatch=2, sequence=16)
    (tied,) = units.shared_elements.values()
    own = [unit.own_elements for unit in units.units]
    for mesh, starts, with_units in (
        (Mesh(dp=4), (0,), own),
        (Mesh(pp=2, dp=4), (0, 3), [own[0] + tied, *own[1:-1], own[-1] + tied]),
    ):
        links = Links(cluster, mesh)
        sharded = stage_costs(units, setup(mesh=mesh, starts=starts, zero=zero), links)
        plain = stage_costs(units, setup(mesh=mesh, starts=starts, zero=0), links)
        several_s = gather_s(cluster, tied) if len(starts) == 1 else 0.0
        for (start, stop), found, without in zip(pairwise((*starts, None)), sharded, plain, strict=True):
            gathers_s = sum(gather_s(cluster, elements) for elements in with_units[start:stop])
            once_s, each_s = (gathers_s, 0.0) if zero == 2 else (0.0, gathers_s)
            assert found.unshard_s == pytest.approx(several_s + once_s)
            assert found.time.forward_s - without.time.forward_s == pytest.approx(each_s)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_ranks_that_own_a_part_sum_that_part_between_tied_stages(zero: int) -> None:
    """Under ZeRO the sum between stages was once priced whole: 6 % of a GPT's step on four CPU ranks."""
    cluster = round_machine(8, latency_s=1e-3)
    units = profile(fold(toy_graph(num_layers=4, is_tied=True)), cluster, tp=1, microbatch=2, sequence=16)
    (tied,) = units.shared_elements.values()
    *others, head = units.units
    apart = replace(units, units=(*others, replace(head, shared=())))
    links = Links(cluster, Mesh(pp=2, dp=4))

    def tie_s(execution: Execution) -> float:
        case = setup(mesh=links.mesh, starts=(0, 3), zero=zero, execution=execution)
        whole, less = (stage_costs(each, case, links)[0].reduction_s for each in (units, apart))
        return whole - less

    assert tie_s(Execution()) == pytest.approx(links.tie_s(4 * tied / (4 if zero else 1)))
    assert tie_s(Execution(sums_ties_whole=True)) == pytest.approx(links.tie_s(4 * tied))


def test_the_first_gather_that_nothing_hides_is_that_of_the_first_unit_with_parameters_of_its_own() -> None:
    """The embedding of a tied model on one stage has none: it is gathered before, once a step."""
    cluster = round_machine(4, latency_s=1e-6)
    units = profile(fold(toy_graph(num_layers=4, is_tied=True)), cluster, tp=1, microbatch=2, sequence=16)
    embedding, layer, *_ = units.units
    assert (embedding.own_elements, layer.own_elements) == (0, 512)
    links = Links(cluster, Mesh(dp=4))
    sharded, plain = (stage_costs(units, setup(zero=zero), links)[0].time for zero in (3, 0))
    each_s = gather_s(cluster, 512)
    expected_s = exposed_s(4 * each_s, plain.forward_s, links.overlap_slowdown, each_s)
    assert sharded.forward_s - plain.forward_s == pytest.approx(expected_s)


def test_what_both_ends_of_a_message_work_on_shared_cores_is_counted_once() -> None:
    """It was once in the time that a first microbatch travels, too."""
    cluster = round_machine(2, latency_s=1e-2)
    case = setup(mesh=Mesh(pp=2), starts=(0, 3), num_microbatches=8)

    def seconds(message_s: float) -> float:
        device = replace(cluster.device, alone_ratio=1.5, message=LinearCost(message_s, 1e12))
        shared = replace(cluster, device=device)
        return sum(predict_step(priced(shared), case, Links(shared, case.mesh)).parts.values())

    more_s = seconds(3e-3) - seconds(2e-3)
    assert more_s == pytest.approx(
        4 * 8 * 1e-3 / 2 - 4 * 1e-3 / 1.5
    )  # four ends for each microbatch, less those of the first


def test_tensor_parallelism_waits_for_its_talk() -> None:
    found = step(mesh=Mesh(tp=2))
    units = priced(round_machine(64), 2).units
    assert found.exposed_tp_s == pytest.approx(3 * sum(u.tp_forward_s + u.tp_backward_s for u in units))


def test_a_pipeline_has_a_bubble_that_more_microbatches_fill() -> None:
    cut: dict[str, Any] = {"mesh": Mesh(pp=2), "starts": (0, 3)}
    few, many = (step(**cut, num_microbatches=m) for m in (2, 16))
    assert 0 < many.bubble_ratio < few.bubble_ratio
    assert few.exposed_pp_s > 0
    assert [stage.compute_ratio for stage in few.stages] == pytest.approx(
        [1 - few.stages[1].compute_ratio, few.stages[1].compute_ratio]
    )


def test_a_tie_across_stages_is_summed_between_them() -> None:
    cluster = round_machine(2)
    cut = setup(mesh=Mesh(pp=2), starts=(0, 3))
    for is_tied in (False, True):
        units = profile(
            fold(toy_graph(num_layers=4, is_tied=is_tied)), cluster, tp=1, microbatch=2, sequence=16
        )
        waited = predict_step(units, cut, Links(cluster, cut.mesh)).exposed_dp_s
        assert (waited > 0) == is_tied


def test_recomputing_takes_time() -> None:
    assert step(recompute="full").step_time_s > step().step_time_s


def test_the_peak_is_the_fullest_stage_s() -> None:
    found = step(mesh=Mesh(pp=2), starts=(0, 3), num_microbatches=8)
    assert found.peak_bytes == max(found.rank_peak_bytes(0), found.rank_peak_bytes(1))
    assert found.rank_peak_bytes(0) == found.stages[0].memory.total_bytes


def test_latency_counts_once_a_collective() -> None:
    quick, slow = (step(round_machine(4, kind="cpu", latency_s=s), bucket_bytes=1024) for s in (0.0, 1.0))
    assert slow.exposed_dp_s - quick.exposed_dp_s == pytest.approx(
        _num_buckets() * 4, rel=0.01
    )  # two rounds of two hops


def _num_buckets() -> int:
    elements = sum(unit.own_elements for unit in priced(round_machine(4)).units)
    return -(-elements * 4 // 1024)


def test_a_framework_may_sum_whole_gradients_pack_them_and_broadcast_parameters() -> None:
    cluster = round_machine(4, kind="cpu", latency_s=1e-3)
    plain = step(cluster, zero=1)
    summed = step(cluster, zero=1, execution=Execution(sums_whole=True))
    assert summed.exposed_dp_s == pytest.approx(step(cluster, zero=0).exposed_dp_s)
    assert summed.exposed_dp_s > plain.exposed_dp_s
    elements = sum(unit.own_elements for unit in priced(cluster).units)
    packed = step(cluster, zero=1, execution=Execution(packing_bytes=8.0))
    assert packed.exposed_dp_s - plain.exposed_dp_s == pytest.approx(8 * elements / 1e9)
    cast = step(cluster, zero=1, execution=Execution(broadcasts_parameters=True))
    more_bytes_s = 4 * elements / 4 / 1e9  # a ring's gather leaves out the own part
    assert cast.optimizer_s - plain.optimizer_s == pytest.approx(3 * 2e-3 + more_bytes_s, rel=0.01)


def test_a_framework_may_gather_each_parameter_apart() -> None:
    """Two matrices a layer of four, one each in the embedding and the head: 10 calls, four times with recomputation, of four ranks."""
    cluster = round_machine(4)
    kernels = load("a100-80").device.kernels
    assert kernels is not None
    slow_host = replace(cluster, device=replace(cluster.device, kernels=replace(kernels, dispatch_s=1.0)))
    times = {}
    for num in (0, 2):
        found = step(slow_host, zero=3, recompute="full", execution=Execution(gathers_apart=num))
        times[num] = found.stages[0].forward_s, found.stages[0].backward_s
    assert times[2][0] - times[0][0] == pytest.approx(10 * 4 * 1.0, rel=0.01)
    assert times[2][1] - times[0][1] == pytest.approx(3 * 10 * 4 * 1.0, rel=0.01)


def test_nothing_is_gathered_ahead_of_too_many_parameters() -> None:
    cluster = round_machine(4)
    free, full = (step(cluster, zero=3, execution=Execution(live_elements=n)) for n in (1e9, 1.0))
    taking_turns = step(replace(cluster, device=replace(cluster.device, kind="cpu")), zero=3)
    assert free.exposed_dp_s < full.exposed_dp_s == pytest.approx(taking_turns.exposed_dp_s)


def test_a_plan_s_other_numbers_do_not_change_the_price() -> None:
    assert step(global_batch=24).step_time_s == step(global_batch=48).step_time_s


def on_shared_cores(ratio: float, **changes: Any) -> Prediction:
    cluster = round_machine(64)
    return step(replace(cluster, device=replace(cluster.device, alone_ratio=ratio)), **changes)


def test_ranks_that_share_cores_leave_them_to_each_other_in_a_bubble() -> None:
    pipeline = {"mesh": Mesh(pp=4), "starts": (0, 1, 2, 3), "num_microbatches": 2, "global_batch": 4}
    apart, shared = on_shared_cores(1.0, **pipeline), on_shared_cores(1.25, **pipeline)
    assert shared.step_time_s < apart.step_time_s
    assert sum(shared.parts.values()) == pytest.approx(shared.step_time_s / CALIBRATIONS["cuda"].expected)
    busy_s = 2 * sum(stage.forward_s + stage.backward_s for stage in apart.stages) / 4
    filled = on_shared_cores(100.0, **pipeline)
    overheads_s = filled.optimizer_s + filled.exposed_pp_s
    assert filled.step_time_s >= CALIBRATIONS["cuda"].expected * busy_s
    assert filled.step_time_s == pytest.approx(
        CALIBRATIONS["cuda"].expected * (busy_s + overheads_s), rel=1e-3
    )


def test_ranks_that_all_compute_gain_nothing_from_shared_cores() -> None:
    plan = {"mesh": Mesh(dp=4)}
    assert on_shared_cores(2.0, **plan).step_time_s == pytest.approx(on_shared_cores(1.0, **plan).step_time_s)


def test_messages_between_stages_take_of_shared_cores_and_only_of_those() -> None:
    """Four microbatches over three boundaries, there and back, each sent by one rank and received by another: 48 on 4 ranks."""
    plan = {"mesh": Mesh(pp=4), "starts": (0, 1, 2, 3), "num_microbatches": 4, "global_batch": 8}
    for ratio, num_messages in ((1.0, 0), (100.0, 12)):
        found = []
        for message in (None, LinearCost(1.0, 1e30)):
            device = replace(round_machine(64).device, alone_ratio=ratio, message=message)
            found.append(step(replace(round_machine(64), device=device), **plan).parts["pp"])
        assert found[1] - found[0] == pytest.approx(num_messages)
