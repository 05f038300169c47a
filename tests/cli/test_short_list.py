"""The best plans are simulated act by act, and said to be so beside what the formula says."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from tests.cost.toy import toy_graph

from shardstage.cli.choosing import Chosen, KnownModel, Question
from shardstage.cli.comparison import choose
from shardstage.cli.fixing import parse_fixed
from shardstage.cli.short_list import (
    SHORT_LIST,
    Simulated,
    fastest,
    short_list,
    short_list_choice,
    short_list_rows,
    short_list_table,
)
from shardstage.cli.told import print_fact, print_rows
from shardstage.cluster import Cluster, load
from shardstage.graph import ModelGraph
from shardstage.plan import parse_request
from shardstage.program import lower
from shardstage.simulator import planned_prices, simulate

GRAPH: ModelGraph = toy_graph(num_layers=7, width=256, hidden=1024)
MACHINE: Cluster = load("a100-80:4")


def chosen(fix: str = "runnable", *, plan: str = "auto", machine: Cluster = MACHINE) -> Chosen:
    question = Question(
        plan=plan,
        num_ranks=machine.num_devices,
        batch=15,
        sequence=64,
        precision="float32",
        fixed=parse_fixed(fix, plan=plan),
    )
    return choose(question, KnownModel(graph=GRAPH), machine, "time")[0]


def printed(found: tuple[Simulated, ...]) -> str:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    print_rows(console, short_list_rows(found))
    for fact in short_list_choice(found):
        print_fact(console, fact)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_each_plan_has_the_seconds_of_its_own_simulated_program() -> None:
    best, told = chosen(), []
    found = short_list(best, GRAPH, MACHINE, 3, progress=told.append)
    assert best.found is not None
    plans = [best.plan, *(each.plan for each in best.found.runners_up)][:3]
    assert len(found) == len(plans) == 3 == len(told)
    for each, plan in zip(found, plans, strict=True):
        timeline = simulate(lower(GRAPH, plan), planned_prices(GRAPH, plan, MACHINE))
        assert each.simulated_s == pytest.approx(timeline.step_time_s)
    assert found[0].formula_s == best.prediction.step_time_s
    assert "2 of 3" in told[1]


def test_the_formula_and_the_simulation_are_near_each_other() -> None:
    """Both add up the same kernels; what they say of overlap and of waiting differs by little."""
    for each in short_list(chosen(), GRAPH, MACHINE, 3):
        assert each.simulated_s == pytest.approx(each.formula_s, rel=0.05)


def test_no_more_are_simulated_than_there_are() -> None:
    assert len(short_list(chosen(), GRAPH, MACHINE)) <= SHORT_LIST
    assert printed(()) == ""
    given = chosen("", plan="dp=2,pp=2,mb=2")
    assert [each.text for each in short_list(given, GRAPH, MACHINE, 9)] == ["dp=2,pp=2,mb=2"]


def test_what_this_release_does_not_run_is_not_simulated() -> None:
    given = chosen("", plan="dp=4,mb=2")
    outside = replace(given, plan=replace(given.plan, zero=1, zero_ranks=2))
    (found,) = short_list(outside, GRAPH, MACHINE, 1)
    assert found.simulated_s is None
    assert fastest(outside, (found,)).prediction is outside.prediction
    assert "not run" in printed((found,))
    assert short_list_table((found,))[0]["simulated_step_time_s"] is None


def test_plans_for_several_classes_are_simulated_on_the_devices_that_compute() -> None:
    machine = load("a100-80:2+h100:3")
    best = chosen("tp=2,cp=1,zero=1", machine=machine)
    found = short_list(best, GRAPH, machine)
    assert best.mixed is not None and best.mixed.cluster.num_devices == 4 and len(found) > 1
    listed = (best.mixed.priced, *best.mixed.runners_up)
    for each, priced in zip(found, listed, strict=False):
        assert each.formula_s == priced.seconds
        devices = machine.with_parts(priced.choice.arrangement.used)
        timeline = simulate(lower(GRAPH, each.plan), planned_prices(GRAPH, each.plan, devices))
        assert each.simulated_s == pytest.approx(timeline.step_time_s)


def test_what_classes_do_is_said_of_the_plan_that_the_simulation_chose() -> None:
    machine = load("a100-80:2+h100:2")
    best = chosen(machine=machine)
    first, second = (replace(each, simulated_s=1.0) for each in short_list(best, GRAPH, machine, 2))
    picked = fastest(best, (first, replace(second, simulated_s=0.9)))
    assert best.mixed is not None and picked.mixed is not None
    other = best.mixed.runners_up[0]
    assert picked.mixed.priced is other and picked.mixed.certificate is best.mixed.certificate
    assert picked.plan == replace(other.plan, graph_fingerprint=best.plan.graph_fingerprint)
    assert tuple(share.peak_bytes for share in picked.mixed.shares) == other.peaks
    kept = fastest(best, (first, second))
    assert kept.plan == best.plan and kept.mixed == best.mixed


def test_the_plan_that_the_simulation_finds_faster_is_chosen_and_said_to_be() -> None:
    best = chosen()
    first, second = (replace(each, simulated_s=1.0) for each in short_list(best, GRAPH, MACHINE, 2))
    slower, quicker = replace(first, simulated_s=1.2), replace(second, simulated_s=0.9)
    picked = fastest(best, (slower, quicker))
    assert picked.prediction is second.prediction
    assert picked.plan == replace(second.plan, graph_fingerprint=best.plan.graph_fingerprint)
    said = printed((slower, quicker)).replace("\n", " ")
    assert f"chosen     {second.text}: 25.0 % faster, simulated," in said
    assert fastest(best, (first, second)).plan == best.plan
    assert "chosen" not in printed((first, second))
    assert "chosen" not in printed((replace(first, simulated_s=None), quicker))


def test_the_table_of_machines_says_what_was_printed() -> None:
    best = chosen()
    found = short_list(best, GRAPH, MACHINE, 2)
    for entry, each in zip(short_list_table(found), found, strict=True):
        assert parse_request(entry["plan"]) is not None
        assert (entry["step_time_s"], entry["simulated_step_time_s"]) == (each.formula_s, each.simulated_s)
