"""What savers would bring to a plan that does without them: priced on its own mesh, in the order in which they would be searched."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.planner.mixed.instances import machines
from tests.planner.test_ladder import GRAPH, HOST, NARROW, PLENTY, as_bfloat16, searcher_of

from shardstage.cluster import Cluster
from shardstage.planner import MixedSearcher, mixed_more_savers, more_savers, predict, predict_mixed

RUNGS = ["grads=bfloat16", "offload=optimizer", "grads=bfloat16,offload=optimizer"]


def test_each_saver_that_was_not_searched_is_priced_with_the_plan_s_own_choice() -> None:
    searcher = searcher_of()
    found = searcher.best(PLENTY)
    savings = more_savers(searcher, found)
    assert [str(each.savers) for each in savings] == RUNGS
    for each in savings:
        plan = replace(found.best, gradient_dtype=each.savers.gradient_dtype, offload=each.savers.offload)
        alone = predict(NARROW, plan, searcher.cluster)
        assert each.prediction.step_time_s == pytest.approx(alone.step_time_s, rel=1e-9)
        assert each.gain == pytest.approx(1 - alone.step_time_s / found.prediction.step_time_s, rel=1e-6)
    assert searcher.pricing.savers == found.savers, "what is priced next has the plan's own"


def test_narrow_gradients_may_be_faster_where_the_best_plan_fits_without() -> None:
    """Half of the bytes are reduced: "best" was said of a plan that a saver beats."""
    searcher = searcher_of("dp=2,zero=0")
    (narrow, *_) = more_savers(searcher, searcher.best(PLENTY))
    assert narrow.gain > 0.01
    assert searcher_of("dp=2,zero=0,grads=bf16").best(PLENTY).prediction.step_time_s == pytest.approx(
        narrow.prediction.step_time_s
    )


def test_what_is_asked_for_or_needed_is_no_saving() -> None:
    asked = searcher_of("grads=bf16")
    assert [str(each.savers) for each in more_savers(asked, asked.best(PLENTY))] == ["offload=optimizer"]
    fixed = searcher_of("grads=fp32,offload=none")
    assert more_savers(fixed, fixed.best(PLENTY)) == ()
    searcher = searcher_of()
    limit = searcher.best(PLENTY).prediction.peak_bytes
    while not (found := searcher.best(limit)).certificate.needs:
        limit = int(0.93 * limit)
    later = RUNGS[RUNGS.index(found.certificate.needs) + 1 :]
    assert [str(each.savers) for each in more_savers(searcher, found)] == later


def test_a_host_that_is_too_small_saves_nothing() -> None:
    searcher = searcher_of(host_bytes=1000)
    assert [str(each.savers) for each in more_savers(searcher, searcher.best(PLENTY))] == RUNGS[:1]


def test_over_several_classes_the_plan_s_choice_is_priced_alike() -> None:
    cluster = machines((1, 1.0), (1, 2.0))
    parts = [replace(part, device=replace(part.device, host=HOST)) for part in cluster.joined]
    cluster = Cluster.of_parts(tuple(parts), name="mixed", network=cluster.levels[-1])
    graph = as_bfloat16(GRAPH)
    searcher = MixedSearcher(graph, cluster, global_batch=4, sequence=16, precision="bfloat16")
    found = searcher.best((PLENTY, PLENTY))
    savings = mixed_more_savers(searcher, found)
    assert [str(each.savers) for each in savings] == RUNGS
    for each in savings:
        plan = replace(found.best, gradient_dtype=each.savers.gradient_dtype, offload=each.savers.offload)
        alone = predict_mixed(graph, plan, found.cluster)
        assert each.prediction.step_time_s == pytest.approx(alone.step_time_s, rel=1e-9)
    assert searcher.pricing.savers == found.savers
