"""What a rank holds, category by category, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import Experts, toy_graph

from shardstage.cost import Links, Profile, Profiler, StepSetup, fold, profile, stage_memory
from shardstage.cost.memory import stage_elements
from shardstage.graph.recompute import PartialRecompute
from shardstage.layout import Mesh
from shardstage.schedule import parse_schedule

LAYER = 2 * 8 * 32
TABLE = 64 * 8
ELEMENTS = 4 * LAYER + 2 * TABLE


def priced(*, is_tied: bool = False) -> Profile:
    graph = toy_graph(num_layers=4, is_tied=is_tied)
    return profile(fold(graph), round_machine(), tp=1, microbatch=2, sequence=16)


def setup(**changes: Any) -> StepSetup:
    default = StepSetup(
        mesh=Mesh(dp=4),
        starts=(0,),
        microbatch=2,
        num_microbatches=3,
        global_batch=24,
        sequence=16,
        zero=0,
        recompute="none",
        schedule="1f1b",
        precision="float32",
        bucket_bytes=2**20,
    )
    return replace(default, **changes)


@pytest.mark.parametrize(
    ("zero", "precision", "parameters", "master", "gradients", "optimizer"),
    [
        (0, "float32", 4, 0, 4, 8),
        (0, "bfloat16", 2, 4, 4, 8),
        (0, "float64", 8, 0, 8, 16),
        (1, "float32", 4, 0, 4 + 1, 2),
        (1, "bfloat16", 2, 1, 4 + 1, 2),
    ],
)
def test_replicated_parameters_take_these_bytes_an_element(
    zero: int, precision: str, parameters: int, master: int, gradients: int, optimizer: int
) -> None:
    use = stage_memory(priced(), setup(zero=zero, precision=precision), 0)
    found = (use.parameters, use.master, use.gradients, use.optimizer)
    assert found == tuple(n * ELEMENTS for n in (parameters, master, gradients, optimizer))


@pytest.mark.parametrize(
    ("zero", "gradients", "parameters", "master", "sums", "optimizer", "host"),
    [
        (0, "bfloat16", 2, 4, 2, 8, 0),
        (1, "bfloat16", 2, 1, 2 + 0.5, 2, 0),
        (2, "bfloat16", 2 + 0.5, 1, 0.5, 2, 0),
        (0, None, 2, 0, 4, 0, 12),
        (1, None, 2, 0, 4 + 1, 0, 3),
        (2, None, 2 + 1, 0, 1, 0, 3),
        (2, "bfloat16", 2 + 0.5, 0, 0.5, 0, 3),
    ],
)
def test_narrow_gradients_and_an_offloaded_optimizer_take_these_bytes_an_element(
    zero: int,
    gradients: str | None,
    parameters: float,
    master: float,
    sums: float,
    optimizer: float,
    host: float,
) -> None:
    case = setup(zero=zero, precision="bfloat16", gradient_dtype=gradients, is_offloaded=host > 0)
    use = stage_memory(priced(), case, 0)
    unit = (2 + case.gradient_bytes) * LAYER if zero == 2 else 0
    found = (use.parameters, use.master, use.gradients - unit, use.optimizer, use.host)
    assert found == tuple(n * ELEMENTS for n in (parameters, master, sums, optimizer, host))
    assert use.total_bytes == sum(num_bytes for name, num_bytes in use.categories() if name != "host")


def test_an_offloaded_optimizer_leaves_parameters_that_are_computed_with_in_float32() -> None:
    use = stage_memory(priced(), setup(is_offloaded=True), 0)
    assert (use.parameters, use.master, use.optimizer) == (4 * ELEMENTS, 0, 0)
    assert use.host == 12 * ELEMENTS


def test_zero_2_keeps_parameters_gathered_and_zero_3_two_units() -> None:
    for zero, whole in ((2, ELEMENTS), (3, 2 * LAYER)):
        use = stage_memory(priced(), setup(zero=zero, precision="bfloat16"), 0)
        assert use.parameters == 2 * whole
        assert use.master == 4 * ELEMENTS // 4
        assert use.gradients == 4 * ELEMENTS // 4 + (2 + 4) * LAYER
        assert use.optimizer == 8 * ELEMENTS // 4


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_without_other_ranks_is_no_zero(zero: int) -> None:
    alone = setup(mesh=Mesh(), zero=zero)
    assert stage_memory(priced(), alone, 0) == stage_memory(priced(), replace(alone, zero=0), 0)


@pytest.mark.parametrize(
    ("schedule", "num_microbatches", "in_flight"),
    [("1f1b", 8, (3, 2, 1)), ("1f1b", 2, (2, 2, 1)), ("gpipe", 8, (8, 8, 8))],
)
def test_stages_hold_the_activations_of_the_microbatches_in_flight(
    schedule: str, num_microbatches: int, in_flight: tuple[int, ...]
) -> None:
    case = setup(mesh=Mesh(pp=3), starts=(0, 2, 4), schedule=schedule, num_microbatches=num_microbatches)
    assert tuple(case.in_flight(stage) for stage in range(3)) == in_flight
    once = replace(case, num_microbatches=1)
    for stage, times in enumerate(in_flight):
        held = stage_memory(priced(), case, stage).activations
        assert held == times * stage_memory(priced(), once, stage).activations


@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 8])
def test_microbatches_in_flight_are_those_of_the_schedule(num_microbatches: int) -> None:
    for name, num_stages in (("1f1b", 3), ("gpipe", 3), ("zb-h1", 3), ("interleaved-1f1b", 6), ("zb-v", 6)):
        case = setup(
            mesh=Mesh(pp=3), starts=tuple(range(num_stages)), schedule=name, num_microbatches=num_microbatches
        )
        for stage in range(num_stages):
            assert case.in_flight(stage) == case.order().max_held(stage)


def test_a_schedule_without_a_name_is_counted_too() -> None:
    custom = parse_schedule("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1")
    case = setup(mesh=Mesh(pp=2), starts=(0, 3), schedule="custom", num_microbatches=2, custom=custom)
    assert (case.in_flight(0), case.in_flight(1)) == (2, 1)


def test_a_later_stage_holds_what_it_received() -> None:
    case = setup(mesh=Mesh(pp=2), starts=(0, 3), num_microbatches=1)
    kept = sum(unit.kept["none"].saved_bytes for unit in priced().units[3:])
    assert stage_memory(priced(), case, 1).activations == kept + 4 * 2 * 16 * 8


def test_a_tied_weight_is_held_by_both_of_its_stages_once_each() -> None:
    tied = priced(is_tied=True)
    assert stage_elements(tied, setup(), 0) == 4 * LAYER + TABLE
    cut = setup(mesh=Mesh(pp=2), starts=(0, 3))
    assert [stage_elements(tied, cut, s) for s in (0, 1)] == [2 * LAYER + TABLE] * 2


def test_recomputing_trades_activations_for_a_working_set() -> None:
    none, full = (stage_memory(priced(), setup(recompute=r), 0) for r in ("none", "full"))
    assert full.activations < none.activations
    assert none.recompute == 0 < full.recompute


def test_with_every_layer_more_that_recomputes_less_is_kept_for_longer() -> None:
    units, layers = priced(), fold(toy_graph(num_layers=4)).layers
    uses = [
        stage_memory(units, setup(recompute=recompute, layers=layers), 0)
        for recompute in ("none", *(PartialRecompute(full=n) for n in (1, 2, 3)), "full")
    ]
    kept = [use.activations for use in uses]
    assert all(a > b for a, b in pairwise(kept)) and len({a - b for a, b in pairwise(kept[1:])}) == 1
    assert {use.recompute for use in uses[1:]} == {uses[-1].recompute}
    all_of_them = setup(recompute=PartialRecompute(full=4), layers=layers)
    assert stage_memory(units, all_of_them, 0) == uses[-1]


def test_the_total_is_the_sum_of_the_categories() -> None:
    use = stage_memory(priced(), setup(zero=1), 0)
    assert use.total_bytes == sum(num_bytes for _, num_bytes in use.categories())
    assert [name for name, _ in use.categories()] == [
        "parameters", "gradients", "optimizer", "activations", "transient", "communication",
    ]  # fmt: skip


@pytest.mark.parametrize(("ep", "num_holders"), [(1, 8), (2, 4), (8, 1)])
def test_experts_that_one_rank_holds_have_no_part_of_their_own_to_be_reduced_into(
    ep: int, num_holders: int
) -> None:
    """Under ZeRO-1 gradients are summed into a part beside the whole ones: where nobody else holds an expert, there is no sum."""
    experts = Experts(number=8, hidden=32)
    graph = toy_graph(num_layers=3, width=64, hidden=256, vocab=128, experts=experts)
    machine, mesh = round_machine(8), Mesh(dp=8)
    found = Profiler(fold(graph), machine, tp=1, sequence=16).at(2, Links(machine, mesh, ep=ep))
    plan = setup(mesh=mesh, zero=1, ep=ep)
    of_experts = sum(unit.expert_elements for unit in found.units)
    elements = stage_elements(found, plan, 0)
    reduced = -(-(elements - of_experts) // 8) + (-(-of_experts // num_holders) if num_holders > 1 else 0)
    assert of_experts > 0
    assert plan.reduced_elements(elements, of_experts) == reduced
    assert stage_memory(found, plan, 0).gradients == 4 * (elements + reduced)
