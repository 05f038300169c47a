"""The best plan that fits in whole blocks, of models that are searched in parts of them."""

from __future__ import annotations

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import Experts, toy_graph
from tests.planner.brute import PLENTY

from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.planner import Searcher, best_in_whole_blocks, predict, search, verify_certificate

MACHINE = round_machine(16, latency_s=1e-4, op_latency_s=1e-4)
FEW = toy_graph(
    num_layers=2, width=64, hidden=1024, vocab=128, experts=Experts(number=2, hidden=64, chosen=1)
)


def searcher_of(graph: ModelGraph = FEW, ranks: int = 16) -> Searcher:
    return Searcher(
        graph, MACHINE, num_ranks=ranks, global_batch=32, sequence=64, fixed=frozenset({"offload"})
    )


def limits(searcher: Searcher) -> list[int]:
    plenty = searcher.best(PLENTY).prediction.peak_bytes
    return [plenty * percent // 100 for percent in range(36, 101, 8)]


def test_what_fits_in_parts_and_not_in_whole_blocks_is_not_the_answer() -> None:
    """A search once returned plans that its own --plan said did not fit, by up to 16 %."""
    searcher, num_over = searcher_of(), 0
    assert searcher.pricing.num_units > len(FEW.blocks)
    for limit in limits(searcher):
        in_parts, found = searcher.best(limit), best_in_whole_blocks(searcher, limit)
        is_over = predict(FEW, in_parts.best, MACHINE).peak_bytes > limit
        num_over += is_over
        assert predict(FEW, found.best, MACHINE).peak_bytes <= limit
        assert (found.limit_bytes < limit) == is_over
        assert found.prediction.step_time_s >= in_parts.prediction.step_time_s
        assert verify_certificate(searcher, found, max_checked=20).is_valid
        if not is_over:
            assert found.best == in_parts.best
    assert num_over >= 3


def test_search_keeps_within_the_memory_in_whole_blocks() -> None:
    searcher = searcher_of()
    limit = next(
        limit
        for limit in limits(searcher)
        if predict(FEW, searcher.best(limit).best, MACHINE).peak_bytes > limit
    )
    found = search(FEW, MACHINE, num_ranks=16, global_batch=32, sequence=64, memory_bytes=limit)
    assert predict(FEW, found.best, MACHINE).peak_bytes <= limit


def test_where_nothing_fits_in_whole_blocks_the_plan_that_fits_in_parts_is_the_answer() -> None:
    """Whoever asks is told that it is over; a refusal would be of a plan that may fit."""
    searcher = searcher_of()
    low, high = 0, searcher.best(PLENTY).prediction.peak_bytes
    while high - low > 1024:
        middle = (low + high) // 2
        try:
            high = searcher.best(middle).prediction.peak_bytes
        except PlanError:
            low = middle
    found = best_in_whole_blocks(searcher, high)
    assert found.best == searcher.best(high).best
    assert predict(FEW, found.best, MACHINE).peak_bytes > high
    with pytest.raises(PlanError, match="no plan for"):
        best_in_whole_blocks(searcher, low // 2)


def test_a_model_of_enough_blocks_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searcher = searcher_of(toy_graph(num_layers=6), ranks=4)
    monkeypatch.setattr("shardstage.planner.best.predict", lambda *_: pytest.fail("not asked for"))
    assert best_in_whole_blocks(searcher, PLENTY).limit_bytes == PLENTY
