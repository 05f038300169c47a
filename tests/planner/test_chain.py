"""A chain's shortcuts: runs of equal layers are asked for once, and say what each run says by itself."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph
from tests.planner.brute import EVEN, every_choice, searcher_of

from shardstage.cost import Links, StepSetup, balanced, fold, profile
from shardstage.cost.profile import RECOMPUTES
from shardstage.graph import ModelGraph
from shardstage.layout import Mesh
from shardstage.planner.chain import Chain, ChainCosts, ShardingWaits

MACHINE = round_machine(8, latency_s=1e-6)
MIXED = toy_graph(num_layers=12, width=64, hidden=(256, *[128] * 5, *[512] * 6), vocab=512)
TIED = toy_graph(num_layers=7, width=64, vocab=4096, is_tied=True)
GRAPHS = {"equal layers": toy_graph(num_layers=9, width=64), "runs of layers": MIXED, "tied": TIED}


def chain_of(graph: ModelGraph, *, is_folded: bool = True, layers: tuple[int, ...] | None = None) -> Chain:
    """``is_folded``: equal units are known to be."""
    folded = fold(graph)
    found = profile(folded, MACHINE, tp=1, microbatch=2, sequence=64)
    if not is_folded:
        return Chain(found, layers=folded.layers)
    twins = [unit.twin for unit in folded.units]
    kinds = [found.units[twins.index(twin)] for twin in range(max(twins) + 1)]
    return Chain(found, kinds, twins, layers or folded.layers)


def setup_of(chain: Chain, graph: ModelGraph, *, schedule: str, zero: int) -> StepSetup:
    return StepSetup(
        mesh=Mesh(pp=4, dp=2),
        starts=balanced([1.0] * chain.num_units, 4),
        microbatch=2,
        num_microbatches=8,
        global_batch=32,
        sequence=64,
        zero=zero,
        recompute="none",
        schedule=schedule,
        precision="float32",
        bucket_bytes=2**20,
        layers=fold(graph).layers,
    )


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_run_that_repeats_costs_what_it_does_by_itself(name: str, schedule: str, zero: int) -> None:
    graph = GRAPHS[name]
    folded, apart = chain_of(graph), chain_of(graph, is_folded=False)
    setup = setup_of(folded, graph, schedule=schedule, zero=zero)
    links = Links(MACHINE, setup.mesh)
    most = 16 * folded.own[-1] + 8 * folded.saved["none"][-1]
    seen = set()
    for limit in (int(most * 0.75**power) for power in range(14)):
        costs, each = (
            ChainCosts(chain, setup, limit, 1e-9, ShardingWaits(chain, setup, links) if zero == 3 else None)
            for chain in (folded, apart)
        )
        for start, stop in combinations(range(folded.num_units + 1), 2):
            for stage in range(4) if start else (0,):
                shared, alone = costs.fitted(stage, start, stop), each.fitted(stage, start, stop)
                seen.add(alone and alone.recompute)
                assert (shared is None) == (alone is None)
                if shared is not None and alone is not None:
                    assert shared.recompute == alone.recompute
                    assert shared.seconds == pytest.approx(alone.seconds, rel=1e-12)
        assert len(costs._known) < len(each._known)
    assert {None, "none", "full"} < seen, "limits that leave some layers as they are"


@pytest.mark.parametrize("name", GRAPHS)
def test_the_first_equal_run_is_of_equal_units_with_an_equal_one_behind(name: str) -> None:
    chain = chain_of(GRAPHS[name])
    twins = np.array([unit.twin for unit in fold(GRAPHS[name]).units])
    num_moved = 0
    for start, stop in combinations(range(chain.num_units + 1), 2):
        first, last = chain.first_alike(start, stop)
        assert last - first == stop - start
        if first != start:
            num_moved += 1
            assert first < start and len({*twins[first : last + 1], *twins[start : stop + 1]}) == 1
    assert num_moved


def test_parts_of_a_layer_are_never_taken_for_layers() -> None:
    """Two equal units in a row may be the halves of one layer: a run that begins with a second half recomputes otherwise."""
    graph = toy_graph(num_layers=8, width=64)
    num_units = len(fold(graph).units)
    chain = chain_of(graph, layers=tuple(unit // 2 for unit in range(num_units)))
    spans = list(combinations(range(num_units + 1), 2))
    assert [chain.first_alike(*span) for span in spans] == spans


@pytest.mark.parametrize("name", GRAPHS)
def test_what_passes_at_most_is_the_most_of_any_unit(name: str) -> None:
    chain = chain_of(GRAPHS[name])
    for mode in RECOMPUTES:
        each = [unit.kept[mode].extra_bytes + unit.transient_bytes for unit in chain.profile.units]
        assert len(set(each)) > 1
        for start, stop in combinations(range(chain.num_units + 1), 2):
            assert chain.most_passing(mode, start, stop) == max(each[start:stop])


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_another_order_of_a_mesh_is_cut_as_if_it_were_asked_for_alone(zero: int) -> None:
    """Under ZeRO-2/3 its gathers run over other links; before, stages cost the same in any order, and are kept."""
    searcher = searcher_of(EVEN, ranks=8, slow_links=True)
    both = [
        choice
        for choice in every_choice(searcher)
        if choice.mesh.pp > 1 and choice.mesh.order[0] == "dp" and choice.zero.level == zero
        if choice.schedule.per_rank == 1
    ]
    assert both
    limit = 2**40
    for swapped in both[:: max(1, len(both) // 12)]:
        usual = replace(swapped, mesh=replace(swapped.mesh, order=Mesh().order))
        alone = searcher_of(EVEN, ranks=8, slow_links=True).pricing.price(swapped, limit)
        searcher.pricing.price(usual, limit)
        after = searcher.pricing.price(swapped, limit)
        assert alone is not None and after is not None
        assert (after.positions, after.prediction) == (alone.positions, alone.prediction)
