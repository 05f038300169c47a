"""Experts that tensor parallelism leaves whole: which ops take part, what a rank runs, sends, holds and reduces, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import Experts, toy_graph

from shardstage.cost import Links, Profiler, StepSetup, fold
from shardstage.cost.experts import routed_ops
from shardstage.cost.links import LinkCosts, exposed_s
from shardstage.cost.reading import Work
from shardstage.cost.stages import stage_costs
from shardstage.cost.units import EXPERT_SKEW, UnitCost
from shardstage.graph import ModelGraph
from shardstage.layout import Mesh

# Of a layer: 4 experts of 64 → 32 → 64 features, two for each of 16 tokens a sample; a product before them, 64 → 256 → 64.
EXPERTS = Experts(number=4, hidden=32, chosen=2)
WIDTH, SEQUENCE = 64, 16
EXPERT_ELEMENTS = 4 * 2 * WIDTH * 32
MACHINE = round_machine(64, latency_s=1e-5)


def moe(experts: Experts = EXPERTS, num_layers: int = 3) -> ModelGraph:
    return toy_graph(num_layers=num_layers, width=WIDTH, hidden=256, vocab=128, experts=experts)


def profiler(tp: int, *, sp: bool = True, experts: Experts = EXPERTS) -> Profiler:
    return Profiler(fold(moe(experts)), MACHINE, tp=tp, sequence=SEQUENCE, is_sequence_parallel=sp)


def layer(of: Profiler) -> Work:
    """The second unit: embedding, layer, layer, head."""
    return of._read.works[1]


def cost(tp: int, dp: int, ep: int, *, microbatch: int = 1, experts: Experts = EXPERTS) -> UnitCost:
    links = Links(MACHINE, Mesh(tp=tp, dp=dp), ep=ep, has_whole_experts=True)
    return profiler(tp, experts=experts).with_whole_experts().at(microbatch, links).units[1]


def setup(mesh: Mesh, ep: int, zero: int, *, has_whole_experts: bool = True) -> StepSetup:
    return StepSetup(
        mesh=mesh,
        starts=(0,),
        microbatch=1,
        num_microbatches=1,
        global_batch=mesh.dp,
        sequence=SEQUENCE,
        zero=zero,
        recompute="none",
        schedule="1f1b",
        precision="float32",
        bucket_bytes=2**20,
        ep=ep,
        has_whole_experts=has_whole_experts,
    )


@pytest.mark.parametrize("chosen", [1, 2])
@pytest.mark.parametrize("has_shared", [False, True])
def test_what_is_routed_lies_between_tokens_and_their_sum(chosen: int, has_shared: bool) -> None:
    """With a single expert a token, rows sorted by expert are as many as the sum's: the way from the router still ends with the weights."""
    graph = moe(replace(EXPERTS, chosen=chosen, has_shared=has_shared), num_layers=2)
    of_layer = ("gate", "softmax", "top", "which", "flat", "order", "place", "rows", "ends")
    of_layer += ("expert_up", "expert_relu", "expert_down", "each", "sum", "weighted", "result")
    assert routed_ops(graph) == {f"{name}_{n}" for name in of_layer for n in (0, 1)}


def test_a_model_without_experts_or_of_one_length_has_no_tokens_to_deal_out() -> None:
    assert not routed_ops(toy_graph())
    assert not fold(toy_graph()).can_have_whole_experts
    assert fold(moe()).can_have_whole_experts
    assert not fold(moe().at(microbatch=2, sequence=16)).can_have_whole_experts


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_a_rank_has_whole_experts_and_its_part_of_the_tokens(tp: int) -> None:
    cut, whole = profiler(tp), profiler(tp).with_whole_experts()
    tokens = -(-SEQUENCE // tp)
    assert layer(whole).expert_elements == EXPERT_ELEMENTS
    assert layer(whole).own_elements - layer(cut).own_elements == EXPERT_ELEMENTS - layer(cut).expert_elements
    assert layer(whole).dispatched.sample == tokens * 2 * WIDTH * 4
    assert layer(cut).dispatched.sample == SEQUENCE * 2 * WIDTH * 4
    up, down = [k for k in layer(whole).kernels if k.is_expert and not k.is_backward]
    assert (up.n, up.k, up.num_products) == (32, WIDTH, 4)
    assert (down.n, down.k, down.num_products) == (WIDTH, 32, 4)
    assert up.m == tokens * 2 // 4


def test_as_many_flops_are_computed_whether_experts_are_cut_or_tokens() -> None:
    cut, whole = profiler(4), profiler(4).with_whole_experts()
    assert layer(whole).forward_flops == pytest.approx(layer(cut).forward_flops, rel=0.01)
    assert layer(whole).backward_flops == pytest.approx(layer(cut).backward_flops, rel=0.01)


def talk(work: Work) -> list[tuple[str, bool, float]]:
    return [(kind, is_backward, moved.sample) for kind, is_backward, moved in work.calls]


@pytest.mark.parametrize("has_shared", [False, True])
def test_nothing_is_talked_along_tp_around_whole_experts(has_shared: bool) -> None:
    """Left are the products before them, and the shared expert, which stays cut: each gathers its input and scatters its result."""
    experts = replace(EXPERTS, has_shared=has_shared)
    around = [
        *(("all_gather", False), ("reduce_scatter", True)),
        *(("reduce_scatter", False), ("all_gather", True)),
    ]
    whole_bytes = SEQUENCE * WIDTH * 4
    expected = [(*call, float(whole_bytes)) for call in around * (2 if has_shared else 1)]
    assert talk(layer(profiler(2, experts=experts).with_whole_experts())) == expected
    assert len(talk(layer(profiler(2, experts=experts)))) > len(expected)


def test_without_sequence_parallelism_a_rank_takes_its_tokens_and_gathers_the_results() -> None:
    cut, whole = profiler(2, sp=False), profiler(2, sp=False).with_whole_experts()
    whole_bytes = float(SEQUENCE * WIDTH * 4)
    assert talk(layer(whole)) == [
        *(("all_reduce", True, whole_bytes), ("all_reduce", False, whole_bytes)),
        *(("all_gather", True, whole_bytes), ("all_gather", False, whole_bytes)),
    ]
    assert ("all_reduce", False, whole_bytes) in talk(layer(cut))[-1:]


@pytest.mark.parametrize(
    ("tp", "dp", "ep", "within_node"),
    [(2, 2, 4, True), (4, 1, 2, True), (4, 2, 4, True), (2, 4, 4, True), (2, 4, 8, False)],
)
def test_tokens_go_to_neighbours_first(tp: int, dp: int, ep: int, within_node: bool) -> None:
    """1 GB/s within a node of four and 0.1 GB/s beyond: an exchange over eight ranks crosses it with what goes to the other node."""
    experts = replace(EXPERTS, number=8)
    num_bytes = EXPERT_SKEW * (SEQUENCE // tp) * 2 * WIDTH * 4
    link = MACHINE.collective("all_to_all", range(ep))
    found = cost(tp, dp, ep, experts=experts)
    assert found.ep_forward_s == found.ep_backward_s == pytest.approx(2 * link.seconds(num_bytes))
    near = MACHINE.collective("all_to_all", range(4))
    assert (link.bytes_per_s >= near.bytes_per_s) is within_node


def test_ranks_deal_experts_out_and_meet_all_their_tokens() -> None:
    """Eight experts for eight of the ranks of tp=4 × dp=4: one each, with the tokens of all eight."""
    experts = replace(EXPERTS, number=8)
    alone, dealt = cost(4, 4, 1, experts=experts), cost(4, 4, 8, experts=experts)
    assert alone.expert_elements == 8 * 2 * WIDTH * 32
    assert dealt.expert_elements == 2 * WIDTH * 32
    assert alone.own_elements - dealt.own_elements == 7 * 2 * WIDTH * 32
    assert alone.ep_forward_s == 0 < dealt.ep_forward_s
    assert dealt.forward_flops == alone.forward_flops


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_rank_reads_the_matrices_of_its_own_experts_alone(is_whole: bool) -> None:
    """A device that does nothing but read: 4 MB/s, so that products take what their bytes do."""
    slow = replace(MACHINE, device=replace(MACHINE.device, bytes_per_s=4e6))
    of = Profiler(fold(moe()), slow, tp=2, sequence=SEQUENCE, is_sequence_parallel=True)
    of = of.with_whole_experts() if is_whole else of

    def forward_s(ep: int) -> float:
        links = Links(slow, Mesh(tp=2, dp=4), ep=ep, has_whole_experts=is_whole)
        return of.at(1, links).units[1].forward_s

    ends_bytes = 2 * 4 * 4  # where an expert's rows end, once for each product
    expert_bytes = EXPERT_ELEMENTS * 4 / (1 if is_whole else 2)
    saved_bytes = (1 - 1 / 4) * (expert_bytes + ends_bytes)
    assert forward_s(1) - forward_s(4) == pytest.approx(saved_bytes / 4e6)


@pytest.mark.parametrize(
    ("mesh", "ep", "shards"),
    [
        (Mesh(tp=4, dp=2), 1, 8),
        (Mesh(tp=4, dp=2), 2, 4),
        (Mesh(tp=4, dp=2), 8, 1),
        (Mesh(tp=2, dp=6), 4, 3),
        (Mesh(tp=4, pp=2, dp=2), 4, 2),
        (Mesh(tp=4), 2, 1),
    ],
)
def test_zero_cuts_experts_over_all_that_hold_them(mesh: Mesh, ep: int, shards: int) -> None:
    """world / (pp × ep) ranks hold an expert; with a single data-parallel rank no ZeRO has an effect."""
    of = setup(mesh, ep, zero=1)
    assert of.expert_shards == shards
    assert of.part_elements(1200 + 240, 240) == 1200 // mesh.dp + 240 // shards
    assert setup(mesh, ep, zero=0).part_elements(1440, 240) == 1440


def test_whole_experts_are_reduced_over_those_that_hold_them() -> None:
    mesh = Mesh(tp=4, dp=4)
    links = Links(MACHINE, mesh, ep=8, has_whole_experts=True)
    assert (links.replicas.count, links.replicas.stride) == (4, 4)
    assert (links.expert_replicas.count, links.expert_replicas.stride) == (2, 8)
    both = LinkCosts(MACHINE).cost("all_reduce", 2, 8)
    assert links.expert_replicas.sum_s(1e6) == pytest.approx(both.seconds(1e6))
    alone = Links(MACHINE, mesh, ep=16, has_whole_experts=True).expert_replicas
    assert alone.sum_s(1e6) == alone.scatter_s(1e6) == 0


def test_experts_that_are_cut_and_dealt_out_are_reduced_over_those_that_hold_them() -> None:
    mesh = Mesh(tp=2, dp=4)
    links = Links(MACHINE, mesh, ep=2)
    assert (links.replicas.count, links.replicas.stride) == (4, 2)
    assert (links.expert_replicas.count, links.expert_replicas.stride) == (2, 4)
    assert not Links(MACHINE, mesh).deals_out_experts
    profile = profiler(2).at(1, links)
    (stage,) = stage_costs(profile, setup(mesh, 2, zero=0, has_whole_experts=False), links)
    experts = sum(unit.expert_elements for unit in profile.units)
    elements = stage.num_elements - experts
    buckets = [max(1, -(-number * 4 // 2**20)) for number in (elements, experts)]
    summed_s = links.replicas.sum_s(elements * 4, buckets[0])
    summed_s += links.expert_replicas.sum_s(experts * 4, buckets[1])
    number = max(1, -(-(elements + experts) * 4 // 2**20))
    exposed = exposed_s(summed_s, stage.time.backward_s, links.overlap_slowdown, summed_s / number)
    assert stage.reduction_s == pytest.approx(exposed)


def test_zero_over_a_part_of_the_replicas_cuts_experts_over_as_many_ranks() -> None:
    links = Links(MACHINE, Mesh(tp=2, dp=8), num_shards=4, ep=2, has_whole_experts=True)
    assert (links.expert_replicas.count, links.expert_replicas.num_shards) == (8, 4)


def test_more_expert_ranks_never_hold_nor_compute_more() -> None:
    experts = replace(EXPERTS, number=8)
    found = [cost(4, 4, ep, experts=experts, microbatch=4) for ep in (1, 2, 4, 8)]
    assert sorted((each.expert_elements for each in found), reverse=True) == [
        e.expert_elements for e in found
    ]
    times = [each.forward_s + each.backward_s for each in found]
    assert times == sorted(times, reverse=True)


def test_faster_links_never_make_an_exchange_slower() -> None:
    of = profiler(2).with_whole_experts()
    times = []
    for latency_s in (0.0, 1e-6, 1e-4):
        machine = round_machine(64, latency_s=latency_s)
        links = Links(machine, Mesh(tp=2, dp=4), ep=4, has_whole_experts=True)
        times.append(of.at(1, links).units[1].ep_forward_s)
    assert times == sorted(times) and times[0] < times[2]


def test_a_layer_whose_experts_meet_attention_is_left_alone() -> None:
    graph = moe(num_layers=1)
    ops = tuple(
        replace(op, target="aten.scaled_dot_product_attention.default") if op.name == "expert_relu_0" else op
        for op in graph.ops
    )
    assert not routed_ops(replace(graph, ops=ops))
