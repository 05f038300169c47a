"""Stages that recompute alike: as little as the best of all counts, each tried on the cost model's own memory."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph

from shardstage.cost import MemoryModel, Profile, StepSetup, balanced, fold, profile
from shardstage.cost.profile import KeptOf, UnitCost
from shardstage.graph.recompute import StageRecompute, counted
from shardstage.layout import Mesh
from shardstage.planner.alike import Alike
from shardstage.planner.chain import Chain

GRAPH = toy_graph(num_layers=13, width=64)
FOLDED = fold(GRAPH)


def priced() -> Profile:
    """Selective recomputation keeps half of what none does, for a fifth of the seconds of full."""
    found = profile(FOLDED, round_machine(4), tp=1, microbatch=2, sequence=64)
    known: dict[int, UnitCost] = {}
    for unit in found.units:
        none, full = unit.kept["none"], unit.kept["full"]
        some = KeptOf(
            saved_bytes=none.saved_bytes - (none.saved_bytes - full.saved_bytes) // 2,
            recompute_s=0.2 * full.recompute_s,
            extra_bytes=full.extra_bytes // 2,
        )
        known.setdefault(id(unit), replace(unit, kept={**unit.kept, "selective": some}))
    return replace(found, units=tuple(known[id(unit)] for unit in found.units))


def setup_of(schedule: str, num_ranks: int, per_rank: int, units: int) -> StepSetup:
    return StepSetup(
        mesh=Mesh(pp=num_ranks),
        starts=balanced([1.0] * units, num_ranks * per_rank),
        microbatch=2,
        num_microbatches=8,
        global_batch=16,
        sequence=64,
        zero=0,
        recompute="none",
        schedule=schedule,
        precision="float32",
        bucket_bytes=2**20,
        layers=FOLDED.layers,
    )


@pytest.mark.parametrize(
    ("schedule", "num_ranks", "per_rank"),
    [
        ("interleaved-1f1b", 2, 2),
        ("interleaved-1f1b", 2, 3),
        ("zb-v", 2, 2),
        ("looped-bfs", 3, 2),
        ("dualpipe-v", 2, 2),
    ],
)
def test_nothing_that_fits_recomputes_for_less(schedule: str, num_ranks: int, per_rank: int) -> None:
    units = priced()
    setup = setup_of(schedule, num_ranks, per_rank, len(units.units))
    layers = Chain(units, layers=FOLDED.layers).layers
    spans = list(itertools.pairwise((*setup.starts, len(units.units))))
    most = max(len(layers.ends(*span)) for span in spans) - 1
    offered = [counted(f, e - f, most) for e in range(most + 1) for f in range(e + 1)]

    def peak(recompute: StageRecompute) -> int:
        memory = MemoryModel(units, replace(setup, recompute=recompute))
        return max(memory.rank(rank).total_bytes for rank in range(num_ranks))

    def seconds(recompute: StageRecompute) -> float:
        return sum(layers.again_s(layers.runs(recompute, *span)) for span in spans)

    peaks, times = [peak(each) for each in offered], [seconds(each) for each in offered]
    before = float("inf")
    for limit in sorted({min(peaks) - 1, *peaks}):
        best = min((s for s, held in zip(times, peaks, strict=True) if held <= limit), default=None)
        found = least(Alike(units, layers, setup, limit))
        assert (found is None) == (best is None)
        if found is not None and best is not None:
            assert peak(found) <= limit and seconds(found) == pytest.approx(best, abs=1e-15)
            assert seconds(found) <= before * (1 + 1e-12)
            before = seconds(found)
    assert before == 0


def least(alike: Alike) -> StageRecompute | None:
    """As a choice is priced: what fits the ranks that bind, until it fits all."""
    recompute: StageRecompute | None = "none"
    while recompute is not None and alike.within(recompute) is None:
        recompute = alike.least()
    return recompute
