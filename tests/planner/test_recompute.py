"""What a stage recomputes at least: as little as the best of all counts of layers, on random layers and in a search."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
from tests.planner.brute import EVEN, MACHINE, UNEVEN, every_choice, searcher_of

from shardstage.cost import predict_step, rank_memory
from shardstage.graph import ModelGraph
from shardstage.graph.recompute import PartialRecompute, Recompute, StageRecompute, counted, layer_modes
from shardstage.plan import check, named_decisions, parse_request, shorthand
from shardstage.planner import Searcher, search
from shardstage.planner.recompute import Layers

MODES: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class Units:
    """``each`` gives the bytes kept, seconds computed again and bytes that pass, of a unit and a mode."""

    layers: tuple[int, ...]
    saved: dict[Recompute, tuple[int, ...]]
    again: dict[Recompute, tuple[float, ...]]
    passing: dict[Recompute, tuple[int, ...]]

    def table(self) -> Layers:
        return Layers(
            self.layers,
            {mode: sums(self.saved[mode]) for mode in MODES},
            {mode: sums(self.again[mode]) for mode in MODES},
            lambda mode, start, stop: max(self.passing[mode][start:stop]),
        )

    def figures(self, start: int, stop: int, recompute: StageRecompute) -> tuple[float, int, int]:
        """Seconds, bytes kept and bytes that pass of a stage, unit by unit."""
        modes = layer_modes(recompute, self.layers[start:stop])
        each = list(zip(range(start, stop), modes, strict=True))
        return (
            sum(self.again[mode][unit] for unit, mode in each),
            sum(self.saved[mode][unit] for unit, mode in each),
            max(self.passing[mode][unit] for unit, mode in each),
        )


def sums(values: Sequence[float]) -> list[float]:
    return [0.0, *itertools.accumulate(values)]


def random_units(draw: random.Random, *, spares: bool) -> Units:
    """Layers of one to three units with others around them, of one, two or many kinds; without ``spares`` selective keeps even more."""
    sizes = [draw.choice((1, 1, 2, 3)) for _ in range(draw.randint(1, 7))]
    layers = [number for number, size in enumerate(sizes) for _ in range(size)]
    layers = [-1] * draw.randint(0, 2) + layers + [-1] * draw.randint(0, 2)
    kinds = [draw.randrange(draw.choice((1, 2, 9))) if layer != -1 else 9 for layer in layers]
    kept = [draw.randint(8, 20) for _ in range(10)]
    some = [draw.randint(4, 8) if spares else draw.randint(4, 30) for _ in range(10)]
    full = [draw.randint(0, 4) for _ in range(10)]
    seconds = [draw.randint(1, 9) for _ in range(10)]
    brought = [draw.randint(1, 30) for _ in range(10)]
    kept[9] = some[9] = full[9] = 5
    seconds[9] = 0

    def of(values: Sequence[int], ratio: int = 1) -> tuple[int, ...]:
        return tuple(values[kind] * ratio // 4 for kind in kinds)

    return Units(
        layers=tuple(layers),
        saved={"none": of(kept, 4), "selective": of(some, 4), "full": of(full, 4)},
        again={"none": of(kept, 0), "selective": of(seconds, 1), "full": of(seconds, 4)},
        passing={"none": of(brought, 1), "selective": of(brought, 2), "full": of(brought, 4)},
    )


def stages(units: Units) -> Iterator[tuple[int, int]]:
    yield from itertools.combinations(range(len(units.layers) + 1), 2)


def every_count(layers: Sequence[int]) -> list[StageRecompute]:
    num = len(set(layers) - {-1})
    return [counted(full, some, num) for full in range(num + 1) for some in range(num + 1 - full)]


@pytest.mark.parametrize("spares", [True, False])
def test_nothing_that_fits_recomputes_for_less(spares: bool) -> None:
    draw = random.Random(3 + spares)
    partly = unfit = 0
    for _ in range(150):
        units = random_units(draw, spares=spares)
        table, held = units.table(), draw.randint(1, 4)
        for start, stop in draw.sample(list(stages(units)), 1):
            none = units.figures(start, stop, "none")
            room = draw.uniform(0.2, 1.1) * (held * none[1] + none[2])
            offered = {r: units.figures(start, stop, r) for r in every_count(units.layers[start:stop])}
            fitting = {r: figures for r, figures in offered.items() if held * figures[1] + figures[2] <= room}
            found = table.least(start, stop, held, room)
            assert (found is None) == (not fitting)
            unfit += found is None
            if found is not None:
                assert found.recompute in fitting
                assert offered[found.recompute][0] == found.again_s == min(s for s, _, _ in fitting.values())
                partly += not isinstance(found.recompute, str)
    assert partly > 10 and unfit > 5


def test_runs_of_units_say_what_unit_by_unit_is_said() -> None:
    draw = random.Random(11)
    for _ in range(60):
        units = random_units(draw, spares=True)
        table = units.table()
        for start, stop in stages(units):
            for recompute in every_count(units.layers[start:stop]):
                runs = table.runs(recompute, start, stop)
                told = (table.again_s(runs), table.kept_bytes(runs), table.passing_bytes(runs))
                assert told == units.figures(start, stop, recompute)


def test_a_stage_that_begins_within_a_layer_counts_its_part_as_the_first() -> None:
    layers = Layers((-1, 0, 0, 1, 1, -1), *[{mode: [0.0] * 7 for mode in MODES}] * 2, lambda *_: 0)
    assert layers.ends(0, 6) == [0, 3, 6]
    assert layers.ends(2, 6) == [2, 3, 6]
    assert layers.ends(2, 3) == [2, 3]
    assert layers.ends(5, 6) == [5]


def test_all_or_no_layers_need_no_number() -> None:
    assert [counted(0, 0, 3), counted(3, 0, 3), counted(0, 3, 3)] == ["none", "full", "selective"]
    assert [str(counted(*n, 3)) for n in ((1, 0), (0, 2), (1, 1), (1, 2))] == [
        "full:1",
        "selective:2",
        "full:1+selective:1",
        "full:1+selective",
    ]


@pytest.mark.parametrize("graph", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_a_choice_without_a_pipeline_takes_the_best_of_all_counts(graph: ModelGraph) -> None:
    searcher = searcher_of(graph, ranks=4, batch=6)
    pricing, partly = searcher.pricing, 0
    for choice in [c for c in every_choice(searcher) if c.mesh.pp == 1][::3]:
        profile, links = pricing.chain(choice.group).profile, pricing.links(choice)
        offered = every_count(pricing.folded.layers)
        setups = [replace(pricing.setup(choice), recompute=recompute) for recompute in offered]
        peaks = [rank_memory(profile, setup, 0).total_bytes for setup in setups]
        times = [predict_step(profile, setup, links).step_time_s for setup in setups]
        for limit in (min(peaks) - 1, *sorted(set(peaks))[::2]):
            best = min((s for s, held in zip(times, peaks, strict=True) if held <= limit), default=None)
            priced = pricing.price(choice, limit)
            assert (priced is None) == (best is None)
            if priced is not None:
                assert priced.seconds == pytest.approx(best, rel=1e-12)
                partly += isinstance(priced.setup.recompute, PartialRecompute)
    assert partly > 10


def test_with_ever_more_memory_a_search_recomputes_ever_less() -> None:
    """A search's best is never slower, and what it finds passes the check and reads back from its own shorthand."""
    searcher = Searcher(EVEN, MACHINE, num_ranks=4, global_batch=16, sequence=64, is_runnable=True)
    most = searcher.best(2**40).prediction.peak_bytes
    found = [searcher.best(int(most * percent / 100)) for percent in range(50, 101, 5)]
    times = [result.prediction.step_time_s for result in found]
    assert all(more <= less * (1 + 1e-12) for less, more in itertools.pairwise(times))
    assert len(set(times)) > 4
    texts = [shorthand(result.best) for result in found]
    assert any("full:" in text for text in texts)
    for text, result in zip(texts, found, strict=True):
        check(result.best, EVEN, num_ranks=4)
        read = parse_request(text)
        assert read.recompute == result.best.recompute or read.stage_recompute == result.best.stage_recompute


def test_a_number_of_layers_that_is_fixed_is_kept_by_every_stage() -> None:
    fix = "pp=2,recompute=full:2"
    result = search(
        EVEN,
        MACHINE,
        num_ranks=4,
        global_batch=16,
        sequence=64,
        fix=parse_request(fix),
        fixed=named_decisions(fix),
    )
    assert result.best.recompute == PartialRecompute(full=2)
    assert all(candidate.plan.recompute == PartialRecompute(full=2) for candidate in result.runners_up)
