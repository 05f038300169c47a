"""A host that launches slower than its GPU computes: the simulation waits for it where the step formula does, and by the same rule."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from tests.cluster.test_calibration import FOUND
from tests.simulator.planned_cases import GRAPH, Planned, analytic, planned

from shardstage.cluster import CAUSES, Cluster, load
from shardstage.graph import ModelGraph, Op, Ref
from shardstage.planner import predict
from shardstage.simulator import step_time

GPU = load("a100-80:4")
TEXTS = (
    "pp=4,mb=2",
    "pp=4,mb=2,schedule=gpipe",
    "pp=2,tp=2,mb=2",
    "pp=4,mb=2,recompute=full",
    "pp=4,mb=4,recompute=selective",
    "pp=4,mb=2,recompute=full:1",
    "pp=4,mb=2,recompute=selective,modules=*up*/*relu*",
    "pp=4,mb=2,compile",
    "tp=4,mb=8,sp",
    "pp=4,mb=2,schedule=zb-h1",
    "pp=4,mb=4,schedule=zb-v,recompute=full",
    "pp=2,tp=2,mb=2,schedule=dualpipe-v,compile",
)


def gpu(dispatch_s: float, **others: float) -> Cluster:
    """An A100 whose host takes so long for a launch."""
    assert GPU.device.kernels is not None
    kernels = replace(GPU.device.kernels, dispatch_s=dispatch_s, **others)
    return replace(GPU, device=replace(GPU.device, kernels=kernels))


SLOW, FREE = gpu(1e-3), gpu(0.0)


def simulated_s(text: str, cluster: Cluster) -> float:
    case = planned(text, cluster=cluster)
    return step_time(case.program, case.prices)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cluster", [GPU, SLOW], ids=["preset", "slow host"])
def test_a_small_model_on_a_gpu_takes_what_the_formula_says(text: str, cluster: Cluster) -> None:
    """Rehearsed, a tiny Llama took a third of the seconds that its plan had promised: nobody had launched its kernels."""
    case = planned(text, cluster=cluster)
    prediction, expected_s = analytic(case.plan, cluster)
    if cluster is SLOW:
        assert prediction.parts["host"] > prediction.parts["products"] + prediction.parts["memory"]
    assert step_time(case.program, case.prices) == pytest.approx(expected_s, rel=2e-3)


@pytest.mark.parametrize(
    "text", ["dp=4,mb=2,zero=1", "pp=2,dp=2,mb=2,zero=2", "dp=4,mb=2,zero=3,recompute=full"]
)
def test_so_it_does_where_gradients_are_reduced_beside_slow_launches(text: str) -> None:
    case = planned(text, cluster=GPU)
    assert step_time(case.program, case.prices) == pytest.approx(analytic(case.plan, GPU)[1], rel=0.02)


@pytest.mark.parametrize("text", [*TEXTS, "dp=4,mb=2,zero=3"])
def test_a_host_that_keeps_up_changes_not_a_bit(text: str) -> None:
    assert simulated_s(text, gpu(1e-9)) == simulated_s(text, FREE)


def test_a_slower_host_never_makes_a_faster_step() -> None:
    seconds = [
        simulated_s("pp=2,tp=2,mb=2,recompute=full", gpu(dispatch_s)) for dispatch_s in (0, 1e-6, 1e-5, 1e-4)
    ]
    assert all(before <= after for before, after in pairwise(seconds)) and seconds[0] < seconds[-1]


def computed_s(case: Planned) -> dict[str, float]:
    return {kind: case.prices.compute_s(0, 1, kind, 2) for kind in ("F", "B", "I", "W")}


def test_launches_are_counted_where_the_host_alone_takes_time() -> None:
    """Of two layers: linear, relu, linear and add, backward their gradients of inputs and weights; the sums of all weights' gradients run
    once they are there."""
    found = computed_s(planned("pp=4,mb=2", cluster=SLOW))
    free = computed_s(planned("pp=4,mb=2", cluster=FREE))
    assert found["F"] == pytest.approx(2 * 4 * 1e-3)
    assert found["W"] == pytest.approx(2 * 2 * 1e-3, rel=0.05)
    assert found["I"] == pytest.approx(2 * 4 * 1e-3, rel=0.05)
    assert found["B"] == pytest.approx(found["I"] + found["W"])
    assert all(found[kind] > 10 * free[kind] for kind in found)


def test_talk_along_tp_leaves_the_host_time_to_launch() -> None:
    lame = tuple(replace(level, latency_s=1e-3) for level in SLOW.levels)
    quick, slow = (
        planned("tp=4,mb=2", cluster=replace(SLOW, levels=levels, collectives=()))
        for levels in (SLOW.levels, lame)
    )
    assert quick.prices.compute_s(0, 0, "F", 2) > slow.prices.compute_s(0, 0, "F", 2)


def chained() -> ModelGraph:
    """A gelu after each relu: two kernels, or one that is compiled."""
    ops, values = [], dict(GRAPH.values)
    for op in GRAPH.ops:
        if op.name.startswith("down_"):
            relu, name = op.inputs[0], f"gelu_{op.name}"
            values[name] = replace(values[relu], name=name)
            gelu = Op(
                name=name,
                target="aten.gelu.default",
                args=(Ref(relu),),
                outputs=(name,),
                module=op.module,
                saved=(relu,),
            )
            saved = tuple(name if each == relu else each for each in op.saved)
            ops += [gelu, replace(op, args=(Ref(name), *op.args[1:]), saved=saved)]
        else:
            ops.append(op)
    return replace(GRAPH, ops=tuple(ops), values=values)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("cluster", [SLOW, FREE], ids=["slow host", "no host"])
def test_compiled_chains_are_launched_and_moved_once(cluster: Cluster, recompute: str) -> None:
    """A compiled plan was simulated as if nothing of it were."""
    graph, text = chained(), f"mb=8,recompute={recompute}"
    eager, compiled = (
        planned(each, num_ranks=1, graph=graph, cluster=cluster) for each in (text, f"{text},compile")
    )
    compiled_s = step_time(compiled.program, compiled.prices)
    assert compiled_s < step_time(eager.program, eager.prices)
    assert compiled_s == pytest.approx(predict(graph, compiled.plan, cluster).step_time_s, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "causes"), [("mb=8", ("host",)), ("mb=8,recompute=full", ("host", "products"))]
)
def test_a_calibrated_host_weighs_what_it_adds(text: str, causes: tuple[str, ...]) -> None:
    """The formula tells launches of recomputed kernels from their products by the forward's proportion."""
    factors = dict.fromkeys(CAUSES, 1.0) | dict.fromkeys(causes, 3.0)
    found = replace(FOUND, factors=factors, device_kind="cuda")
    plain = planned(text, num_ranks=1, cluster=GPU)
    slower = planned(text, num_ranks=1, cluster=replace(GPU, calibration=found))
    parts = analytic(plain.plan, GPU)[0].parts
    more_s = step_time(slower.program, slower.prices) - step_time(plain.program, plain.prices)
    assert more_s == pytest.approx(2 * sum(parts[cause] for cause in causes), rel=1e-6)
    assert parts["host"] > 0
