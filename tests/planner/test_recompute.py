"""What a stage recomputes at least: as little as the best of all counts of layers, on random layers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from shardstage.graph.recompute import Recompute, StageRecompute, counted, layer_modes
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
                assert found in fitting
                assert offered[found][0] == min(seconds for seconds, _, _ in fitting.values())
                partly += not isinstance(found, str)
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
