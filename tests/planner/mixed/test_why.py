"""Why not another decision, over several classes of devices: each price is the search's own, each reason names what is so."""

from __future__ import annotations

import re
from random import Random

import pytest
from tests.planner.mixed.instances import CLOSE, GRAPH, PLENTY, machines, random_searcher, searcher_of

from shardstage.errors import PlanError
from shardstage.plan import named_decisions, parse_request
from shardstage.planner import Alternative, MixedResult, MixedSearcher, Searcher, mixed_alternatives
from shardstage.planner.mixed.changes import changes
from shardstage.planner.mixed.space import MixedChoice
from shardstage.units import format_ratio

CLUSTER = machines((2, 1.0), (2, 2.0))


def fixing(text: str) -> MixedSearcher:
    """With data parallelism inside pipelines, or without them, unless the text says ``outer``."""
    names = named_decisions(text) | {"dp_outside"}
    return searcher_of(CLUSTER, fix=parse_request(text), fixed=names)


def tight(searcher: MixedSearcher, ratio: float) -> MixedResult:
    """The best plan where each class has a multiple of what the fastest one holds on any."""
    most = max(share.peak_bytes for share in searcher.best([PLENTY] * len(searcher.cluster.parts)).shares)
    return searcher.best([int(ratio * most)] * len(searcher.cluster.parts))


def whys(text: str, ratio: float = 10.0) -> tuple[MixedResult, dict[str, Alternative]]:
    searcher = fixing(text)
    found = tight(searcher, ratio)
    return found, {each.change: each for each in mixed_alternatives(searcher, found)}


def decisions(choice: MixedChoice) -> str:
    """All that ``--fix`` can say of it."""
    of, schedule = choice.arrangement, choice.schedule
    parts = [
        f"tp={of.sharding.tp},cp={of.sharding.cp},pp={of.pp},mb={max(of.sizes)},zero={choice.zero.level}"
    ]
    if of.pp > 1:
        parts.append(f"schedule={schedule.name},v={schedule.per_rank}")
        parts += ["outer"] if of.by == "shares" else []
    return ",".join(parts + (["sp"] if of.sharding.is_sequence_parallel else []))


@pytest.mark.parametrize("seed", range(12))
def test_no_alternative_is_faster_and_the_cheapest_comes_first(seed: int) -> None:
    searcher = random_searcher(Random(seed))
    for ratio in (10.0, 0.8):
        try:
            found = tight(searcher, ratio)
        except PlanError:
            continue
        told = mixed_alternatives(searcher, found)
        times = [each.prediction.step_time_s for each in told if each.prediction is not None]
        assert times == sorted(times)
        for each in told:
            if each.prediction is not None and not each.change.endswith(" idle"):
                assert each.prediction.step_time_s * CLOSE >= found.prediction.step_time_s
        without = [each.prediction is None for each in told]
        assert without == sorted(without)
        assert len({each.change for each in told}) == len(told) >= 2


@pytest.mark.parametrize(
    ("fix", "kinds"),
    [
        ("pp=2,schedule=1f1b", {"tp", "zero", "mb", "layers", "recompute=full", "class0", "class1"}),
        ("pp=1", {"tp", "zero", "mb", "samples", "recompute=full", "class0", "class1"}),
        ("pp=2,outer", {"zero", "schedule", "mb", "samples", "recompute=full", "class0", "class1"}),
        ("mb=2", {"tp", "zero", "schedule", "pp", "recompute=full", "class0", "class1"}),
    ],
)
def test_every_decision_is_asked_for(fix: str, kinds: set[str]) -> None:
    _, told = whys(fix)
    assert kinds <= {change.split()[0] for change in told}


@pytest.mark.parametrize(
    ("fix", "ratio"),
    [
        ("zero=1,mb=2,schedule=1f1b", 10.0),
        ("pp=1,mb=4", 10.0),
        ("pp=1,mb=4", 0.9),
        ("pp=2,zero=1", 10.0),
        ("pp=2,zero=1", 0.9),
    ],
)
def test_a_price_is_what_the_search_finds_with_all_else_fixed(fix: str, ratio: float) -> None:
    searcher = fixing(fix)
    found = tight(searcher, ratio)
    told = {each.change.split(",")[0]: each for each in mixed_alternatives(searcher, found)}
    checked = 0
    for change in changes(searcher, found.priced):
        prediction = told[change.text].prediction
        if change.firsts or change.text.startswith("samples"):
            continue
        prices = []
        for choice in change.variants:
            text = decisions(choice) + (f",recompute={change.recompute}" if change.recompute else "")
            names = named_decisions(text) | {"is_sequence_parallel", "dp_outside", "recompute_modules"}
            names -= set() if change.recompute else {"recompute", "recompute_modules"}
            alone = searcher_of(CLUSTER, fix=parse_request(text), fixed=frozenset(names))
            try:
                prices.append(alone.best(found.limits).prediction.step_time_s)
            except PlanError:
                continue
        assert (prediction is None) == (not prices), change.text
        if prediction is not None:
            assert prediction.step_time_s == pytest.approx(min(prices), rel=1e-9), change.text
            checked += 1
    assert checked >= 2


def test_the_best_of_all_deals_of_layers_is_the_one_that_is_cut_freely() -> None:
    searcher = fixing("pp=4,mb=2,zero=1,schedule=1f1b")
    for ratio, least in ((10.0, 2), (0.9, 1)):
        found = tight(searcher, ratio)
        firsts = [(0, unit) for unit in range(2, searcher.pricing.num_units - 1)]
        seconds = {}
        for each in firsts:
            priced = searcher.pricing.price(found.priced.choice, found.limits, firsts=each)
            if priced is not None:
                assert priced.setup.starts[2] == each[1]
                seconds[each[1]] = priced.seconds
        assert len(seconds) >= least
        assert min(seconds.values()) == pytest.approx(found.prediction.step_time_s, rel=1e-9)
        assert found.priced.setup.starts[2] in seconds


def test_layers_and_samples_of_classes_add_up_to_all_and_the_busier_class_is_named() -> None:
    for fix, of in (("pp=2,mb=2,schedule=1f1b", 5), ("pp=1", 16)):
        _, told = whys(fix)
        moved = [each for change, each in told.items() if change.startswith(("layers", "samples"))]
        assert moved
        for each in moved:
            before, after = ([*map(int, deal.split("/"))] for deal in each.change.split()[1::2])
            assert sum(before) == sum(after) == of and before != after
            assert each.prediction is not None
            if each.prediction.step_time_s > 1.05 * min(
                other.prediction.step_time_s for other in moved if other.prediction
            ):
                more = "class0" if after[0] > before[0] else "class1"
                assert each.reason.endswith(f"slower: {more} holds the others up")


def test_a_class_that_is_idle_leaves_the_best_plan_of_the_other() -> None:
    found, told = whys("zero=1")
    for number, idle in ((1, "class0 idle"), (0, "class1 idle")):
        text = "zero=1"
        alone = Searcher(
            GRAPH,
            CLUSTER.part(number),
            num_ranks=2,
            global_batch=16,
            sequence=64,
            fix=parse_request(text),
            fixed=named_decisions(text),
            is_runnable=False,
        ).best(found.limits[number])
        prediction = told[idle].prediction
        assert prediction is not None and prediction.step_time_s == alone.prediction.step_time_s
        assert told[idle].reason.endswith("% slower: without them")


def test_what_would_be_faster_on_one_class_alone_is_said_with_its_cluster() -> None:
    """Every class computes in a search over several: over slow links that may be worse than to leave one out."""
    searcher = random_searcher(Random(0))
    found = tight(searcher, 10.0)
    first = mixed_alternatives(searcher, found)[0]
    assert first.change == "class0 idle" and first.prediction is not None
    gain = 1 - first.prediction.step_time_s / found.prediction.step_time_s
    assert gain > 0.1 and first.reason == f"{format_ratio(gain)} faster: --cluster class1:2"


def test_what_does_not_fit_names_the_class_that_lacks_memory_and_how_much() -> None:
    searcher = fixing("pp=2,mb=2,schedule=1f1b")
    found = tight(searcher, 0.6)
    unfit = [each for each in mixed_alternatives(searcher, found) if each.prediction is None]
    assert unfit
    for each in unfit:
        assert (
            re.match(
                r"does not fit: (pipeline rank \d+, )?class\d,? at [\d.]+ [KMG]iB of [\d.]+ [KMG]iB",
                each.reason,
            )
            or "no plan for 2 ranks fits into" in each.reason
        )


def test_what_lacks_memory_would_fit_with_what_is_said() -> None:
    """Layers are recomputed and cut so that all classes lack as small a part as possible."""
    searcher = fixing("pp=2,mb=2,schedule=1f1b")
    found = tight(searcher, 0.6)
    told = {each.change: each.reason for each in mixed_alternatives(searcher, found)}
    lacking = [each for each in changes(searcher, found.priced) if "does not fit" in told.get(each.text, "")]
    assert lacking
    for change in lacking:
        peak, limit = (float(n) for n in re.findall(r"([\d.]+) [KMG]iB", told[change.text])[-2:])
        pricing = searcher.pricing.asking(change.recompute) if change.recompute else searcher.pricing
        ratios = (0.98 * peak / limit, 1.02 * peak / limit)
        fits = [
            any(
                pricing.price(choice, [int(ratio * each) for each in found.limits], firsts=change.firsts)
                for choice in change.variants
            )
            for ratio in ratios
        ]
        assert fits == [False, True], change.text
