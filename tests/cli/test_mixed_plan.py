"""What ``shardstage plan`` shows of a mixed cluster: the share and the memory of each class, idle devices, every objective."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console
from tests.cost.toy import toy_graph
from tests.planner.mixed.instances import CLOSE, machines

from shardstage.cli.answer import Answer
from shardstage.cli.choosing import Chosen, KnownModel, Question
from shardstage.cli.comparison import (
    Comparison,
    Objective,
    as_table,
    choose,
)
from shardstage.cli.fixing import parse_fixed
from shardstage.cli.plan import print_answer
from shardstage.cli.plan_page import answer_page
from shardstage.cluster import Cluster
from shardstage.errors import PlanError
from shardstage.units import parse_bytes

GRAPH = toy_graph(num_layers=6, width=64, hidden=256)
MIXED = machines((3, 1.0), (2, 2.0))


def chosen_by(
    objective: Objective = "time",
    *,
    fix: str = "",
    memory_bytes: int | None = None,
    memory_ratio: float = 1.0,
    machine: Cluster = MIXED,
) -> tuple[Chosen, Comparison]:
    question = Question(
        plan="auto",
        num_ranks=5,
        batch=8,
        sequence=64,
        precision="float32",
        memory_bytes=memory_bytes,
        memory_ratio=memory_ratio,
        fixed=parse_fixed(fix, plan="auto"),
    )
    return choose(question, KnownModel(graph=GRAPH), machine, objective)


def shown(chosen: Chosen, comparison: Comparison) -> str:
    console = Console(width=80, file=io.StringIO(), highlight=False)
    print_answer(console, answer(chosen, comparison))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def answer(chosen: Chosen, comparison: Comparison) -> Answer:
    return Answer(model="toy", graph=GRAPH, machine=MIXED, num_ranks=5, chosen=chosen, comparison=comparison)


def test_each_class_says_what_it_takes_and_what_it_holds() -> None:
    by_stages = shown(*chosen_by(fix="pp=5"))
    assert "share      3 × class0: " in by_stages and " of 6 layers, " in by_stages
    by_shares = shown(*chosen_by(fix="pp=1"))
    assert "share      2 × class1: " in by_shares and " of 8 samples, " in by_shares
    assert "GiB" in by_shares and "gap 0.0 %" in by_shares


def test_idle_devices_are_named_with_the_cluster_whose_ranks_compute() -> None:
    text = shown(*chosen_by(fix="tp=2"))
    assert "share      2 × class0" in text
    assert "idle       1 × class0: ranks are those of --cluster class0:2+class1:2" in text
    assert "idle" not in shown(*chosen_by(fix="pp=5"))


def test_the_object_for_machines_has_classes_and_the_certificate() -> None:
    chosen, comparison = chosen_by()
    table = json.loads(json.dumps(as_table(chosen, comparison, ())))
    assert [each["name"] for each in table["classes"]] == ["class0", "class1"]
    assert table["classes"][0]["peak_bytes"] <= table["classes"][0]["limit_bytes"]
    assert table["certificate"]["gap"] == 0 and table["runners_up"]
    assert [(each["change"], each["reason"]) for each in table["why_not"]] == [
        (each.change, each.reason) for each in comparison.alternatives
    ]


def test_why_not_says_what_it_costs_to_leave_a_class_idle_and_of_each_decision_one_change() -> None:
    chosen, comparison = chosen_by(fix="pp=5")
    told = shown(chosen, comparison)
    assert "why not" in told and "class0 idle" not in told  # two devices make no pipeline of five
    chosen, comparison = chosen_by()
    told = shown(chosen, comparison)
    changes = [each.change for each in comparison.alternatives]
    assert len(changes) > 12
    assert {"class0 idle", "class1 idle"} <= {*changes}
    for kind in {change.split()[0].split("=")[0] for change in changes}:
        assert f"\n{kind}" in told


def test_the_objective_memory_holds_less_and_is_a_quarter_slower_at_most() -> None:
    fastest, smallest = chosen_by()[0], chosen_by("memory")[0]
    assert smallest.prediction.peak_bytes <= fastest.prediction.peak_bytes
    assert smallest.prediction.step_time_s <= 1.25 * fastest.prediction.step_time_s


def test_the_objective_cost_takes_no_more_device_seconds() -> None:
    fastest, cheapest = chosen_by()[0], chosen_by("cost")[0]
    seconds = [c.plan.mesh.world_size * c.prediction.step_time_s for c in (cheapest, fastest)]
    assert seconds[0] <= seconds[1]


def test_the_objective_cost_leaves_a_class_out_where_that_is_cheaper() -> None:
    """Only the whole cluster and halves of each class were compared: slow devices were paid for in vain."""
    slow, fast = machines((3, 1.0), (2, 50.0)).joined
    parts = [
        replace(part, device=replace(part.device, price_per_hour=price))
        for part, price in ((slow, 1.0), (fast, 2.0))
    ]
    cluster = Cluster.of_parts(tuple(parts), name="mixed", network=MIXED.levels[-1])
    chosen, comparison = chosen_by("cost", machine=cluster)
    assert chosen.alone is not None and chosen.alone.name == "class1" and chosen.mixed is None
    assert chosen.plan.mesh.world_size == chosen.alone.num_devices
    hours = chosen.prediction.step_time_s / 3600
    assert comparison.dollars == pytest.approx(2.0 * chosen.alone.num_devices * hours)
    fastest = chosen_by(machine=cluster)[1]
    assert fastest.dollars is not None and comparison.dollars < fastest.dollars


def test_the_memory_that_a_rank_may_hold_is_that_of_its_device_at_most() -> None:
    chosen, _ = chosen_by(memory_bytes=2**60)
    assert chosen.mixed is not None
    assert [share.limit_bytes for share in chosen.mixed.shares] == [2**40, 2**40]
    peak = chosen.prediction.peak_bytes
    less, _ = chosen_by(memory_bytes=peak - 1)
    assert less.prediction.peak_bytes < peak


def test_the_page_names_all_classes_and_says_that_it_was_searched() -> None:
    chosen, comparison = chosen_by()
    assert chosen.mixed is not None
    page = answer_page(answer(chosen, comparison))
    for share in chosen.mixed.shares:
        assert f"{share.num_used} × {share.name}" in page
    assert "Why not" in page and "class0 idle" in page and "not searched" not in page
    assert page.count("<circle") == len(comparison.front) > 1
    assert "fullest rank, of what its device can hold" in page
    ranks = [f"node {number}, class{number}" for number in (0, 1)]
    assert all(name in page for name in ranks)


def test_the_front_is_printed_by_the_share_of_the_fullest_device() -> None:
    """One class has less memory by far: its share counts, not the other's bytes."""
    sizes = (5 * 2**20, 20 * 2**20)
    parts = [
        replace(part, device=replace(part.device, memory_bytes=size))
        for part, size in zip(MIXED.joined, sizes, strict=True)
    ]
    cluster = Cluster.of_parts(tuple(parts), name="mixed", network=MIXED.levels[-1])
    chosen, comparison = chosen_by(machine=cluster, fix="pp=5")
    assert chosen.mixed_searcher is not None
    there = chosen.mixed_searcher.capacities
    told = shown(chosen, comparison)
    assert "less memory: of what the fullest device can hold" in told
    for point in comparison.front:
        held, of_large = (peak / most for peak, most in zip(point.class_peaks, there, strict=True))
        assert point.fill_ratio == held > of_large
        assert f"{math.ceil(1000 * point.fill_ratio) / 10:.1f} %: " in told
    table = json.loads(json.dumps(as_table(chosen, comparison, ())))
    assert [each["fill_ratio"] for each in table["front"]] == [p.fill_ratio for p in comparison.front]
    assert all(len(each["class_peak_bytes"]) == 2 for each in table["front"])


@pytest.mark.parametrize("place", [1, -1])
def test_a_share_of_all_devices_leads_to_a_point_of_the_front(place: int) -> None:
    _, comparison = chosen_by(fix="pp=5,mb=1")
    point = comparison.front[place]
    again, _ = chosen_by(fix="pp=5,mb=1", memory_ratio=point.fill_ratio * CLOSE)
    assert again.prediction.step_time_s == pytest.approx(point.prediction.step_time_s, rel=1e-9)


@pytest.mark.parametrize(
    ("fix", "why"),
    [
        ("tp=7", "keeps to all that is fixed: tp; tp=7 needs 7 ranks, and there are 5"),
        ("pp=5,dp=2", "dp=2 × pp=5 needs 10 ranks"),
    ],
)
def test_what_cannot_be_is_said(fix: str, why: str) -> None:
    with pytest.raises(PlanError, match=why) as caught:
        chosen_by(fix=fix)
    assert "out of --fix" in str(caught.value.hint)


def test_a_request_that_nothing_fits_is_refused_with_memory_that_would_do() -> None:
    with pytest.raises(PlanError, match=r"none of .* would hold [\d.]+ MiB and [\d.]+ MiB") as caught:
        chosen_by(fix="pp=5,offload=none", memory_bytes=2**19)
    assert caught.value.hint is not None
    with_it, _ = chosen_by(
        fix="pp=5,offload=none", memory_bytes=parse_bytes(caught.value.hint.removeprefix("--max-memory "))
    )
    assert with_it.mixed is not None
