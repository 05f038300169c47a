"""A search that leaves nothing out: every choice of a space, enumerated a second time and priced one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph

from shardstage.cluster import LinearCost
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.planner import Searcher
from shardstage.planner.mixed.priced import TooLong
from shardstage.planner.pricing import Priced, TooSlow
from shardstage.planner.space import Choice

PLENTY = 2**40
CLOSE = 1 + 1e-9
EVEN = toy_graph(num_layers=6, width=256, hidden=1024, vocab=512)
UNEVEN = toy_graph(num_layers=4, width=128, hidden=(256, 2048, 512, 128), vocab=4096, is_tied=True)
MACHINE = round_machine(8, latency_s=1e-6)
SLOW_LINKS = round_machine(8, latency_s=1e-3, node=2)
SHARED_CORES = replace(
    SLOW_LINKS, device=replace(SLOW_LINKS.device, alone_ratio=1.5, message=LinearCost(1e-4, 1e9))
)


def searcher_of(
    graph: ModelGraph = EVEN,
    *,
    ranks: int = 4,
    batch: int = 16,
    slow_links: bool = False,
    shared_cores: bool = False,
    is_runnable: bool = False,
) -> Searcher:
    """Of one space: where nothing fits, nothing is offloaded."""
    return Searcher(
        graph,
        SHARED_CORES if shared_cores else SLOW_LINKS if slow_links else MACHINE,
        num_ranks=ranks,
        global_batch=batch,
        sequence=64,
        is_runnable=is_runnable,
        fixed=frozenset({"offload"}),
    )


def every_choice(searcher: Searcher) -> Iterator[Choice]:
    """By the words of ``planner.space``: groups × meshes × orders × ZeRO × schedules, of as many stages as there are units at most."""
    space = searcher.space
    for group in space.groups():
        for mesh in space.meshes(group.tp, group.cp):
            share = -(-space.global_batch // mesh.dp)
            for order in space.orders_of(mesh):
                if not space.takes(group, replace(mesh, order=order), share):
                    continue
                for zero in space.zeros_of(mesh):
                    for schedule in space.schedules_of(mesh.pp):
                        if mesh.pp * schedule.per_rank <= searcher.num_units:
                            ordered = replace(mesh, order=order)
                            yield Choice(mesh=ordered, group=group, zero=zero, schedule=schedule)


def all_priced(searcher: Searcher, limit_bytes: int) -> dict[Choice, Priced | None]:
    """Every choice with its price, None where it does not fit."""
    return {choice: searcher.pricing.price(choice, limit_bytes) for choice in every_choice(searcher)}


def least_s(priced: dict[Choice, Priced | None]) -> float | None:
    return min((p.seconds for p in priced.values() if p is not None), default=None)


def assert_best(searcher: Searcher, ratios: Sequence[float] = (0.55, 0.3)) -> None:
    """Against every choice of the space, priced, under limits that leave ever fewer: parts of what the fastest plan holds."""
    plenty = searcher.best(PLENTY).prediction.peak_bytes
    for limit in (PLENTY, plenty - 1, *(int(ratio * plenty) for ratio in ratios)):
        priced = all_priced(searcher, limit)
        assert all(p is None or p.prediction.peak_bytes <= limit for p in priced.values())
        least = least_s(priced)
        if least is None:
            with pytest.raises(PlanError, match="no plan for"):
                searcher.best(limit)
            continue
        result = searcher.best(limit)
        assert result.prediction.step_time_s == pytest.approx(least, rel=1e-9)
        assert result.prediction.peak_bytes <= limit
        assert result.certificate.gap == 0
        assert result.certificate.enumerated == len(priced)
        assert_bounds_are_below(searcher, priced)


def assert_nothing_faster_is_left_out(searcher: Searcher, priced: dict[Choice, Priced | None]) -> None:
    """Whatever is known to be the best so far: looser bounds than the last ones leave choices out, too."""
    prices = [
        price for price in priced.values() if price and price.choice.schedule not in searcher.space.dominated
    ]
    for below_s in sorted(price.seconds for price in prices)[:: max(1, len(prices) // 4)]:
        bounds = searcher.bounds(np.arange(len(searcher.lattice.groups)), below_s)
        is_open = np.flatnonzero(bounds.seconds.ravel() < below_s * CLOSE)
        still_open = {bounds.choice(index) for index in is_open.tolist()}
        left_out = [price.choice for price in prices if price.seconds * CLOSE < below_s]
        assert still_open.issuperset(left_out), below_s


def assert_bounds_are_below(searcher: Searcher, priced: dict[Choice, Priced | None]) -> None:
    """Under the limit that was searched last."""
    assert_nothing_faster_is_left_out(searcher, priced)
    limit_bytes = searcher._settings.limit_bytes
    bounds = searcher.bounds(np.arange(len(searcher.lattice.groups)))
    num_bounded = bounds.num_large
    for index in map(int, np.flatnonzero(np.isfinite(bounds.seconds.ravel()))):
        num_bounded += 1
        price = priced[bounds.choice(index)]
        if price is not None:
            assert bounds.seconds.flat[index] <= price.seconds * CLOSE, price.choice
            assert bounds.least_bytes.flat[index] <= price.prediction.peak_bytes * CLOSE, price.choice
    for number, group in enumerate(searcher.lattice.groups):
        of_group = [price for price in priced.values() if price and price.choice.group == group]
        assert all(searcher._least_s[number] <= price.seconds * CLOSE for price in of_group), group
    left_out = {c for c, p in priced.items() if p is not None and c.schedule not in searcher.space.dominated}
    left_out -= {bounds.choice(int(i)) for i in np.flatnonzero(np.isfinite(bounds.seconds.ravel()))}
    assert not left_out, f"bounds say of choices that fit {limit_bytes} bytes that they do not"
    dominated = searcher.space.dominated
    fitting = sum(1 for c in priced if c.schedule not in dominated)
    assert num_bounded == fitting


def assert_least_of_cuts(
    price: Callable[[float], Any | None],
    least_s: float,
    *,
    random: Random,
    too_slow: type[TooSlow | TooLong],
) -> None:
    """``price``, below some seconds, is that of the quickest cut, found where these leave room for it, and nowhere else."""
    for below_s in (math.inf, least_s * random.uniform(1.0001, 1.2)):
        found = price(below_s)
        assert found is not None
        assert found.seconds == pytest.approx(least_s, rel=2e-9)
    try:
        assert price(least_s * 0.9999) is None
    except too_slow as slower:
        assert slower.seconds >= least_s * (1 - 1e-9)
