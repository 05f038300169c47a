"""Over several classes of devices, modules are told that make the best plan faster, by the search's own price."""

from __future__ import annotations

import pytest
from tests.planner.mixed.instances import PLENTY, machines, searcher_of
from tests.runtime.dry_run_cases import graph_of

from shardstage.plan import named_decisions, parse_request
from shardstage.planner import MixedResult, MixedSearcher, mixed_named_modules, predict_mixed

CLUSTER = machines((1, 1.0), (1, 2.0))
GRAPH = graph_of("llama", "float32")


def fixing(text: str) -> MixedSearcher:
    return searcher_of(CLUSTER, graph=GRAPH, fix=parse_request(text), fixed=named_decisions(text))


def tight(searcher: MixedSearcher, ratio: float) -> MixedResult:
    shares = searcher.best((PLENTY, PLENTY)).shares
    return searcher.best([int(ratio * max(share.peak_bytes for share in shares))] * 2)


@pytest.mark.parametrize(("fix", "ratio"), [("pp=2,mb=2,schedule=1f1b", 0.8), ("pp=1,mb=8", 0.8)])
def test_modules_that_are_told_are_faster_and_what_a_search_that_names_them_prices(
    fix: str, ratio: float
) -> None:
    searcher = fixing(fix)
    found = tight(searcher, ratio)
    told = mixed_named_modules(searcher, found)
    assert told is not None and told.gain > 0
    assert told.prediction.step_time_s == pytest.approx(
        (1 - told.gain) * found.prediction.step_time_s, rel=1e-9
    )
    named = "/".join(told.plan.recompute_modules)
    assert told.asked == f'--fix "modules={named}"'
    again = fixing(f"{fix},modules={named}")
    priced = again.pricing.price(found.priced.choice, found.limits)
    assert priced is not None and priced.prediction == told.prediction and priced.plan == told.plan
    assert again.best(found.limits).prediction.step_time_s <= told.prediction.step_time_s
    units = searcher.pricing.folded.starts
    assert predict_mixed(GRAPH, told.plan, CLUSTER, units=units) == told.prediction
    assert all(peak <= limit for peak, limit in zip(priced.peaks, found.limits, strict=True))


def test_nothing_is_told_where_nothing_is_recomputed_or_that_was_decided() -> None:
    plenty = fixing("pp=2,mb=8")
    assert mixed_named_modules(plenty, plenty.best((PLENTY, PLENTY))) is None
    decided = fixing("pp=2,mb=8,recompute=selective")
    assert mixed_named_modules(decided, decided.best((PLENTY, PLENTY))) is None
    named = fixing("pp=2,mb=8,modules=*.mlp")
    assert mixed_named_modules(named, tight(named, 0.8)) is None
