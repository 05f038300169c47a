"""The certificate: its counts add up, its gap is what it says, and its hashes name what was searched."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tests.planner.brute import EVEN, MACHINE, UNEVEN, searcher_of

from shardstage.graph.file import fingerprint
from shardstage.planner import Certificate
from shardstage.planner.certificate import Counts, cluster_hash

PLENTY = 2**40


def made(*, cost_s: float = 2.0, best_bound_s: float = 2.0) -> Certificate:
    return Certificate.of(
        graph=EVEN,
        cluster=MACHINE,
        space=searcher_of().space,
        limit_bytes=PLENTY,
        cost_s=cost_s,
        counts=Counts(priced=1, unfit=2, by_bound=30, by_memory=400, by_rule=5000),
        best_bound_s=best_bound_s,
    )


def test_the_counts_add_up() -> None:
    assert made().enumerated == 5433


@pytest.mark.parametrize(("best_bound_s", "gap"), [(1.5, 0.25), (2.0, 0.0), (3.0, 0.0), (float("inf"), 0.0)])
def test_the_gap_is_how_much_faster_an_unpriced_choice_might_be(best_bound_s: float, gap: float) -> None:
    certificate = made(best_bound_s=best_bound_s)
    assert certificate.gap == pytest.approx(gap)
    assert certificate.best_bound_s <= certificate.cost_s


def test_a_certificate_is_a_json_object_of_numbers_and_hashes() -> None:
    table = json.loads(json.dumps(made().to_dict(), allow_nan=False))
    assert (table["enumerated"], table["gap"], table["limit_bytes"]) == (5433, 0.0, PLENTY)
    assert all(isinstance(table[name], str) and table[name] for name in ("graph", "cluster", "space"))


def test_its_hashes_name_the_graph_the_cluster_and_the_space() -> None:
    searcher = searcher_of()
    certificate = searcher.best(PLENTY).certificate
    assert certificate.graph == fingerprint(EVEN)
    assert certificate.cluster == cluster_hash(MACHINE)
    assert certificate.space == searcher.space.fingerprint
    assert certificate.limit_bytes == PLENTY


def test_another_graph_cluster_or_space_has_another_hash() -> None:
    slower = replace(MACHINE, device=replace(MACHINE.device, bytes_per_s=1.0))
    assert cluster_hash(slower) != cluster_hash(MACHINE)
    assert fingerprint(UNEVEN) != fingerprint(EVEN)
    spaces = {
        searcher.space.fingerprint
        for searcher in (
            searcher_of(),
            searcher_of(ranks=6),
            searcher_of(batch=8),
            searcher_of(is_runnable=True),
        )
    }
    assert len(spaces) == 4


def test_two_searches_of_the_same_have_the_same_certificate() -> None:
    assert searcher_of().best(PLENTY).certificate == searcher_of().best(PLENTY).certificate
