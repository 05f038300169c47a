"""Where nothing fits on several classes of devices, the change that is proposed makes a plan fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from tests.planner.mixed.instances import PLENTY, machines, searcher_of

from shardstage.cluster import Cluster
from shardstage.errors import PlanError
from shardstage.plan import decision_named, named_decisions, parse_request
from shardstage.planner import MixedSearcher, nothing_fits
from shardstage.units import format_s, parse_bytes

CLUSTER = machines((2, 1.0), (2, 2.0))


def fixing(text: str) -> MixedSearcher:
    return searcher_of(CLUSTER, fix=parse_request(text), fixed=named_decisions(text))


def least(searcher: MixedSearcher) -> int:
    """Bytes of the fullest rank below which nothing fits, to a fiftieth."""
    low, high = 0, max(share.peak_bytes for share in searcher.best((PLENTY, PLENTY)).shares)
    while high - low > high // 50:
        middle = (low + high) // 2
        found = searcher.find((middle, middle))
        low, high = (middle, high) if found is None else (low, max(s.peak_bytes for s in found.shares))
    return high


def test_memory_that_is_proposed_is_enough_and_little_more_than_is_needed() -> None:
    searcher = searcher_of(CLUSTER)
    needed = least(searcher)
    said = nothing_fits(searcher, (needed // 2, needed // 2))
    assert "none of" in said.message and re.search(r'; "dp=.*" would hold [\d.]+ MiB and', said.message)
    assert said.hint is not None
    proposed = parse_bytes(said.hint.removeprefix("--max-memory "))
    assert searcher.find((proposed, proposed)) is not None
    assert proposed <= 1.1 * needed + 2**20


@pytest.mark.parametrize("fix", ["pp=1,tp=1,zero=0", "tp=2,mb=16", "recompute=none,mb=4"])
def test_a_decision_that_is_proposed_to_be_left_open_lets_a_plan_fit(fix: str) -> None:
    searcher = fixing(fix)
    limits = (least(searcher) * 9 // 10,) * 2
    seconds = {}
    names = ("pp", "tp", "zero", "microbatch", "recompute", "offload")
    for name in {*names} & searcher.fixed:
        found = searcher.without(name).find(limits)
        if found is not None:
            seconds[decision_named(name)] = found.prediction.step_time_s
    said = nothing_fits(searcher, limits)
    best = min(seconds, key=seconds.__getitem__)
    assert said.hint is not None and said.hint.startswith(f'leave {best} out of --fix: "dp=')
    assert said.hint.endswith(f"fits, {format_s(seconds[best])} a step")


def test_devices_too_small_for_any_plan_are_said_to_be() -> None:
    parts = [replace(part, device=replace(part.device, memory_bytes=2**20)) for part in CLUSTER.joined]
    small = Cluster.of_parts(tuple(parts), name="small", network=CLUSTER.levels[-1])
    said = nothing_fits(searcher_of(small), (2**20, 2**20))
    assert said.hint == "a --cluster of more or larger devices, or a smaller --batch or --seq"


def test_a_search_that_has_no_choice_at_all_is_refused_as_before() -> None:
    with pytest.raises(PlanError, match="keeps to all that is fixed"):
        fixing("tp=7").find((PLENTY, PLENTY))
