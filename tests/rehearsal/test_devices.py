"""A model with torch's own norm keeps other tensors on a GPU than on a CPU: planner, simulator and dry run say so alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.cost.machines import round_machine
from tests.graph.attention_models import Form, attention_graph, attention_source, kept_of_attention
from tests.graph.norm_models import kept_bytes, norm_graph, norm_source

from shardstage.cost import Profiler, fold
from shardstage.cost.readings import Readings
from shardstage.graph import ModelGraph
from shardstage.plan import Plan, Precision, complete, parse_request
from shardstage.planner import predict
from shardstage.program import StageGraphs, lower
from shardstage.rehearsal import rehearse
from shardstage.runtime.dry_run import DryRun, dry_run
from shardstage.runtime.optimizer import OptimizerConfig
from shardstage.simulator import planned_prices

SEQUENCE = 8
DTYPES: dict[str, Precision] = {"bf16": "bfloat16", "fp32": "float32"}


def plan_of(
    text: str, dtype: str, *, ranks: int = 1, graph: ModelGraph | None = None, sequence: int = SEQUENCE
) -> Plan:
    return complete(
        parse_request(f"{text},dtype={dtype}"),
        graph or norm_graph(DTYPES[dtype]),
        num_ranks=ranks,
        global_batch=128,
        sequence=sequence,
        precision=DTYPES[dtype],
    )


def run_of(plan: Plan, dtype: str, kind: str) -> DryRun:
    graph = norm_graph(DTYPES[dtype])
    graphs = StageGraphs(graph, plan)
    return dry_run(
        graph,
        plan,
        norm_source(),
        rank=0,
        optimizer=OptimizerConfig(),
        program=lower(graph, plan, graphs),
        graphs=graphs,
        device_kind=kind,
    )


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_predict_the_bytes_that_are_added_up_by_hand(dtype: str, kind: str) -> None:
    graph, plan, cluster = norm_graph(DTYPES[dtype]), plan_of("mb=64", dtype), round_machine(1, kind=kind)
    by_hand = kept_bytes(DTYPES[dtype], kind, num_rows=64 * SEQUENCE)
    assert predict(graph, plan, cluster).ranks[0].activations == by_hand
    cost = planned_prices(graph, plan, cluster).costs[0].cost(0, tp=0, size=64)
    assert cost.saved_bytes == by_hand


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_dry_run_holds_on_each_device_what_is_predicted(dtype: str) -> None:
    """After a forward: all but what else the engine holds, which is the same on both."""
    plan = plan_of("mb=64", dtype)
    held = {
        kind: max(moment.held.get("activations", 0) for moment in run_of(plan, dtype, kind).moments)
        for kind in ("cpu", "cuda")
    }
    by_hand = {kind: kept_bytes(DTYPES[dtype], kind, num_rows=64 * SEQUENCE) for kind in held}
    assert held["cpu"] - held["cuda"] == by_hand["cpu"] - by_hand["cuda"] > 0
    assert held["cuda"] == pytest.approx(by_hand["cuda"], rel=0.05)


@pytest.mark.parametrize("text", ["mb=64,recompute=full", "mb=32,tp=2,sp", "mb=32,pp=2"])
def test_a_rehearsal_for_gpus_holds_what_is_predicted(text: str) -> None:
    """At the peak, which may be another moment of the loss that is cut over ranks: four bytes of a row, 1,024 here."""
    ranks = 1 if text.startswith("mb=64") else 2
    plan = plan_of(text, "bf16", ranks=ranks)
    found = rehearse(norm_graph("bfloat16"), plan, norm_source(), round_machine(ranks))
    assert found.differences == ()
    for rank in found.ranks:
        peak = found.timeline.peak(rank.rank)
        assert peak is not None
        assert rank.held["activations"] == pytest.approx(peak.bytes_by_category["activations"], abs=1032)


def test_kinds_do_not_share_what_was_read() -> None:
    folded, readings = fold(norm_graph("bfloat16")), Readings()
    cpu, gpu = round_machine(1, kind="cpu"), round_machine(1)

    def saved(profiler: Profiler) -> int:
        return sum(unit.kept["none"].saved_bytes for unit in profiler.at(4).units)

    profilers = [
        Profiler(folded, cluster, tp=1, sequence=SEQUENCE, readings=readings) for cluster in (cpu, gpu)
    ]
    assert saved(profilers[0]) > saved(profilers[1])
    assert saved(profilers[0].on(gpu)) == saved(profilers[1])
    assert saved(profilers[1].on(cpu)) == saved(profilers[0])
    other = replace(gpu, device=replace(gpu.device, bytes_per_s=2e9))
    assert saved(profilers[1].on(other)) == saved(profilers[1])


def test_compute_capabilities_do_not_share_what_was_read() -> None:
    folded, readings = fold(attention_graph("bfloat16", "grouped")), Readings()
    new = round_machine(1)
    old = replace(new, device=replace(new.device, compute_capability=7.0))
    saved = []
    for cluster in (old, new):
        profiler = Profiler(folded, cluster, tp=1, sequence=96, readings=readings)
        saved.append(sum(unit.kept["none"].saved_bytes for unit in profiler.at(4).units))
    assert saved[0] > saved[1]


def test_a_norm_that_keeps_less_is_faster_on_a_gpu() -> None:
    """One kernel reads x once and writes its result, where the parts move float32 copies of both."""
    graph, plan = norm_graph("bfloat16"), plan_of("mb=64", "bf16")
    clusters = [round_machine(1, kind=kind) for kind in ("cpu", "cuda")]
    cpu, gpu = (planned_prices(graph, plan, cluster).costs[0].cost(0, tp=0, size=64) for cluster in clusters)
    assert gpu.forward_s < cpu.forward_s and gpu.backward_s < cpu.backward_s


@pytest.mark.parametrize("form", ["latent", "grouped"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_attention_is_held_as_its_kernel_on_a_gpu_keeps_it(dtype: str, form: Form) -> None:
    """Planner and simulator say the same bytes, and a dry run for a GPU holds them."""
    graph = attention_graph(DTYPES[dtype], form)
    plan = plan_of("mb=4", dtype, graph=graph, sequence=96)
    machine = round_machine(1)
    by_hand = kept_of_attention(DTYPES[dtype], num_samples=4, sequence=96, form=form)
    assert predict(graph, plan, machine).ranks[0].activations == by_hand
    assert planned_prices(graph, plan, machine).costs[0].cost(0, tp=0, size=4).saved_bytes == by_hand
    run = dry_run(
        graph,
        plan,
        attention_source(form),
        rank=0,
        optimizer=OptimizerConfig(),
        program=lower(graph, plan),
        graphs=StageGraphs(graph, plan),
        device_kind="cuda",
    )
    held = max(moment.held.get("activations", 0) for moment in run.moments)
    assert held == pytest.approx(by_hand, rel=0.05)


@pytest.mark.parametrize("form", ["latent", "grouped"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_old_gpu_holds_the_scores_that_its_kernels_keep(dtype: str, form: Form) -> None:
    """Before compute capability 8.0 there is no flash kernel: planner, simulator and dry run say the same bytes, other ones."""
    graph, machine = attention_graph(DTYPES[dtype], form), round_machine(1)
    plan = plan_of("mb=4", dtype, graph=graph, sequence=96)
    old = replace(machine, device=replace(machine.device, compute_capability=7.0))
    kept, kept_elsewhere = (predict(graph, plan, each).ranks[0].activations for each in (old, machine))
    assert kept > kept_elsewhere if dtype == "bf16" else kept == kept_elsewhere
    assert planned_prices(graph, plan, old).costs[0].cost(0, tp=0, size=4).saved_bytes == kept
    run = dry_run(
        graph,
        plan,
        attention_source(form),
        rank=0,
        optimizer=OptimizerConfig(),
        program=lower(graph, plan),
        graphs=StageGraphs(graph, plan),
        compute_capability=7.0,
    )
    held = max(moment.held.get("activations", 0) for moment in run.moments)
    assert held == pytest.approx(kept, rel=0.05)
    sums = [
        sum(rehearse(graph, plan, attention_source(form), each).ranks[0].held.values())
        for each in (old, machine)
    ]
    assert sums[0] - sums[1] >= kept - kept_elsewhere


@pytest.mark.parametrize("form", ["latent", "grouped"])
@pytest.mark.parametrize("text", ["mb=32,pp=2", "mb=32,dp=2,recompute=full"])
def test_a_rehearsal_of_such_attention_holds_what_is_predicted(text: str, form: Form) -> None:
    graph = attention_graph("bfloat16", form)
    plan = plan_of(text, "bf16", ranks=2, graph=graph, sequence=96)
    found = rehearse(graph, plan, attention_source(form), round_machine(2))
    assert found.differences == ()
    for rank in found.ranks:
        peak = found.timeline.peak(rank.rank)
        assert peak is not None
        assert rank.held["activations"] == pytest.approx(peak.bytes_by_category["activations"], rel=0.05)


@pytest.mark.parametrize(
    ("form", "a_row"),
    [
        (
            "latent",
            2 * (24 + 24 + 16 + 16) + 4,
        ),  # of one of two heads q, k, v and the result, and its float32
        ("grouped", 2 * (24 + 24) + 4),  # q and the result: both ranks have the only key and value
    ],
)
def test_tensor_parallel_ranks_keep_their_heads_of_such_attention(form: Form, a_row: int) -> None:
    """The loss is cut, too, so that a rehearsal's peak is a moment of the forward: compared is what is kept."""
    graph, machine, num_rows = attention_graph("bfloat16", form), round_machine(2), 32 * 96
    whole, cut = (
        plan_of(text, "bf16", ranks=2, graph=graph, sequence=96) for text in ("mb=32,dp=2", "mb=32,tp=2,sp")
    )
    assert rehearse(graph, cut, attention_source(form), machine).differences == ()
    kept = predict(graph, cut, machine).ranks[0].activations
    assert kept <= predict(graph, whole, machine).ranks[0].activations - 2 * num_rows * a_row
    simulated = planned_prices(graph, cut, machine).costs[0].cost(0, tp=0, size=32).saved_bytes
    # ids, labels, masks and a float32 a row of what cuts the vocabulary (``sharding.kept``): 8 + 1 and 4 + 8 + 1 + 1
    assert 0 <= simulated - kept <= 23 * num_rows
