"""Decisions that no choice keeps to are refused with the sizes that forbid them."""

from __future__ import annotations

from typing import Any

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph

from shardstage.errors import PlanError
from shardstage.plan import named_decisions, parse_request
from shardstage.planner import Searcher

GRAPH = toy_graph(num_layers=6, width=64, hidden=256)


def refusal(fix: str, **changes: Any) -> str:
    with pytest.raises(PlanError) as caught:
        Searcher(
            GRAPH,
            round_machine(16, latency_s=1e-5),
            sequence=64,
            fix=parse_request(fix),
            fixed=named_decisions(fix),
            **{"num_ranks": 8, "global_batch": 16, "is_runnable": False, **changes},
        ).best(2**40)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fix", "why", "hint"),
    [
        ("pp=100", "fixed: pp; pp=100 needs 100 ranks, and there are 8", "leave pp out of --fix"),
        ("dp=3,pp=3", "dp=3 × pp=3 needs 9 ranks, and there are 8", "leave dp or pp out of --fix"),
        ("mb=64", "mb=64 is more than the 16 samples of a data-parallel rank", "leave mb out of --fix"),
        ("dp=4,mb=8", "mb=8 is more than the 4 samples", "leave dp or mb out of --fix"),
        ("v=2,schedule=1f1b", "does not run so many stages on a rank", "leave schedule or v out of --fix"),
        ("v=4,pp=4", "16 stages are more than the 8 parts", "leave pp or v out of --fix"),
        ("zr=2,zero=0", "fixed: zero, zr\n", "leave zero or zr out of --fix"),
    ],
)
def test_a_refusal_says_which_sizes_do_not_go_together(fix: str, why: str, hint: str) -> None:
    said = refusal(fix)
    assert why in said and hint in said


def test_more_ranks_than_samples_are_said() -> None:
    assert "dp=8 leaves ranks without any of 4 samples" in refusal("dp=8", global_batch=4)


def test_what_runs_uses_all_ranks() -> None:
    assert "tp=7 needs a multiple of 7 ranks, and there are 8" in refusal("tp=7", is_runnable=True)


@pytest.mark.parametrize("fix", ["dtype=fp32", ""])
def test_a_decision_that_changes_nothing_is_not_blamed_for_ranks_that_stay_idle(fix: str) -> None:
    """Of five samples on eleven ranks it was said to leave the dtype out, which did not help, or that no ranks could share them."""
    said = refusal(fix, is_runnable=True, num_ranks=11, global_batch=5)
    assert "5 samples on 11 ranks leaves none of them idle" in said and "leave runnable out of --fix" in said
