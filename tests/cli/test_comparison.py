"""What is shown beside a plan: objectives that keep their word, tables that say what they are cut to, a page that escapes names."""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import replace
from html import unescape
from typing import Any

import pytest
from rich.console import Console
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph

from shardstage.cli.answer import Answer
from shardstage.cli.choosing import Chosen, KnownModel, Question
from shardstage.cli.comparison import (
    Comparison,
    Objective,
    as_table,
    choose,
)
from shardstage.cli.fixing import Fixed, parse_fixed
from shardstage.cli.plan import print_answer
from shardstage.cli.plan_page import answer_page
from shardstage.cluster import Cluster
from shardstage.errors import PlanError
from shardstage.plan import shorthand
from shardstage.planner import NamedModules, Saving, predict
from shardstage.planner.space import Savers

GRAPH = toy_graph(num_layers=6, width=64, hidden=256)
MACHINE = round_machine(8, latency_s=1e-5)
ANYTHING = Fixed()


def chosen_by(
    objective: Objective,
    plan: str = "auto",
    *,
    machine: Cluster = MACHINE,
    ranks: int = 8,
    memory_bytes: int | None = None,
    batch: int = 16,
    fixed: Fixed = ANYTHING,
) -> tuple[Chosen, Comparison]:
    question = Question(
        plan=plan,
        num_ranks=ranks,
        batch=batch,
        sequence=64,
        precision="float32",
        memory_bytes=memory_bytes,
        fixed=fixed,
    )
    return choose(question, KnownModel(graph=GRAPH), machine, objective)


def printed(chosen: Chosen, comparison: Comparison) -> str:
    out = io.StringIO()
    print_answer(Console(file=out, width=200, highlight=False), answer(chosen, comparison))
    return out.getvalue()


def answer(
    chosen: Chosen, comparison: Comparison, *, machine: Cluster = MACHINE, model: str = "toy", **more: Any
) -> Answer:
    return Answer(
        model=model,
        graph=GRAPH,
        machine=machine,
        num_ranks=machine.num_devices,
        chosen=chosen,
        comparison=comparison,
        **more,
    )


def device_s(chosen: Chosen) -> float:
    return chosen.plan.mesh.world_size * chosen.prediction.step_time_s


@pytest.mark.parametrize(("ranks", "memory_bytes"), [((8, 4, 2, 1), None), ((6, 4, 3), 800_000)])
def test_the_cheapest_step_takes_no_more_device_seconds_than_on_fewer_devices(
    ranks: tuple[int, ...], memory_bytes: int | None
) -> None:
    """Of six devices four were the cheapest, and only three were tried."""
    cheapest, _ = chosen_by("cost", ranks=ranks[0], memory_bytes=memory_bytes)
    for fewer in ranks:
        other, _ = chosen_by("time", ranks=fewer, memory_bytes=memory_bytes)
        assert device_s(cheapest) <= device_s(other) * (1 + 1e-9)


def test_the_cheapest_step_of_what_runs_may_leave_devices_idle() -> None:
    """Five samples run on five devices or fewer, and all seven were to run: the refusal of seven ended the search for the cheapest."""
    fixed = parse_fixed("runnable,tp=1,pp=1", plan="auto")
    with pytest.raises(PlanError):
        chosen_by("time", ranks=7, batch=5, fixed=fixed)
    cheapest, _ = chosen_by("cost", ranks=7, batch=5, fixed=fixed)
    assert cheapest.plan.mesh.world_size in (4, 3, 2, 1)


def test_the_smallest_plan_is_within_a_quarter_of_the_fastest_and_no_smaller_is() -> None:
    fastest, _ = chosen_by("time")
    smallest, _ = chosen_by("memory")
    assert smallest.prediction.step_time_s <= 1.25 * fastest.prediction.step_time_s
    assert smallest.prediction.peak_bytes < fastest.prediction.peak_bytes
    assert smallest.searcher is not None
    try:
        below = smallest.searcher.best(int(0.9 * smallest.prediction.peak_bytes))
    except PlanError:
        return
    assert below.prediction.step_time_s > 1.25 * fastest.prediction.step_time_s


@pytest.mark.parametrize("objective", ["time", "cost", "memory"])
def test_every_objective_s_plan_knows_its_graph_and_has_its_price(objective: Objective) -> None:
    chosen, _ = chosen_by(objective)
    assert chosen.plan.graph_fingerprint
    assert predict(GRAPH, chosen.plan, MACHINE).step_time_s == pytest.approx(
        chosen.prediction.step_time_s, rel=1e-9
    )


def test_an_objective_leaves_a_plan_that_was_given_alone() -> None:
    given = [chosen_by(objective, "tp=2,pp=2,dp=2")[0] for objective in ("time", "cost", "memory")]
    assert given[0].plan == given[1].plan == given[2].plan
    assert given[0].found is None


def test_where_nothing_fits_every_objective_says_so() -> None:
    for objective in ("time", "cost", "memory"):
        with pytest.raises(PlanError, match="no plan for 8 ranks fits"):
            chosen_by(objective, memory_bytes=1024)


def test_the_proof_is_shown_with_what_was_told_of_others() -> None:
    chosen, comparison = chosen_by("time")
    text = printed(chosen, comparison)
    assert chosen.found is not None
    assert f"best of {chosen.found.certificate.enumerated:,} plans, gap 0" in text
    proof = chosen.found.certificate
    shown = [
        int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:priced|too|no better)", text)
    ]
    assert sum(shown) == proof.enumerated
    assert "why not" in text and "less memory" in text
    assert comparison.alternatives[0].change in text and comparison.alternatives[0].reason in text


def test_modules_that_would_be_faster_are_told_with_the_plan_to_paste() -> None:
    chosen, comparison = chosen_by("time")
    assert comparison.modules is None and "modules=" not in printed(chosen, comparison)
    plan = replace(chosen.plan, recompute="selective", recompute_modules=("*.up", "*.down"))
    text = shorthand(plan)
    told = NamedModules(
        plan=plan, text=text, asked=f'--plan "{text}"', prediction=chosen.prediction, gain=0.021
    )
    comparison = replace(comparison, modules=told)
    said = "recompute=selective,modules=*.up/*.down: 2.1 % faster, fits with "
    assert said in printed(chosen, comparison) and f'--plan "{told.text}"' in printed(chosen, comparison)
    assert said in answer_page(answer(chosen, comparison))
    assert as_table(chosen, comparison, [])["what_if"]["plan"] == told.text


def test_savers_that_would_be_faster_are_told_with_their_price_and_no_others() -> None:
    """A plan was called the best, and ``--fix grads=bf16`` was faster."""
    chosen, comparison = chosen_by("time")
    gains = {"grads": 0.031, "offload": -0.2, "both": 0.039}
    savers = (Savers("bfloat16"), Savers(None, "optimizer"), Savers("bfloat16", "optimizer"))
    savings = tuple(
        Saving(savers=each, prediction=chosen.prediction, gain=gain)
        for each, gain in zip(savers, gains.values(), strict=True)
    )
    comparison = replace(comparison, savings=savings)
    told = printed(chosen, comparison)
    assert "what if    grads=bfloat16: 3.1 % faster, fits with" in told
    assert "on the same mesh: --fix grads=bfloat16 searches with that" in told
    assert "offload=optimizer" not in told, "slower by itself, and no percent more with both"
    table = as_table(chosen, comparison, [])["savings"]
    assert [row["savers"] for row in table] == [str(each) for each in savers]
    searched = replace(comparison, savings=tuple(replace(each, plan="dp=8,x") for each in savings))
    told = printed(chosen, searched)
    assert "what if    offload=optimizer: 20.0 % slower, fits with" in told and told.count(": dp=8,x") == 3
    assert unescape(answer_page(answer(chosen, searched))).count(": dp=8,x") == 3


def test_the_tables_are_of_the_same_plans_as_the_json() -> None:
    chosen, comparison = chosen_by("time")
    found = as_table(chosen, comparison, ["a note"])
    assert found["notes"] == ["a note"]
    assert [row["change"] for row in found["why_not"]] == [a.change for a in comparison.alternatives]
    assert [row["plan"] for row in found["front"]] == [p.text for p in comparison.front]
    for faster, smaller in itertools.pairwise(found["front"]):
        assert faster["peak_bytes"] > smaller["peak_bytes"]
    assert found["dollars"] is None


def test_what_does_not_fit_has_no_price_in_the_json() -> None:
    free, _ = chosen_by("time")
    chosen, comparison = chosen_by("time", memory_bytes=int(0.6 * free.prediction.peak_bytes))
    unfit = [row for row in as_table(chosen, comparison, [])["why_not"] if row["step_time_s"] is None]
    assert unfit
    assert all(row["peak_bytes"] is None and row["reason"].startswith("does not fit") for row in unfit)


def test_a_step_costs_its_devices_hours() -> None:
    priced = replace(MACHINE, device=replace(MACHINE.device, price_per_hour=3.6))
    chosen, comparison = chosen_by("time", machine=priced)
    assert comparison.dollars == pytest.approx(3.6 / 3600 * device_s(chosen))
    assert "a step at its devices' hourly price" in printed(chosen, comparison)


def test_the_page_escapes_the_name_of_the_model() -> None:
    chosen, comparison = chosen_by("time")
    page = answer_page(answer(chosen, comparison, model="<script>"))
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_the_page_says_whatever_the_terminal_says() -> None:
    """It had no runners-up, no price, no notes, and of the proof the number of plans alone."""
    machine = replace(MACHINE, device=replace(MACHINE.device, price_per_hour=3.6))
    chosen, comparison = chosen_by("time", machine=machine)
    notes = ("of <few> samples", "& that is all")
    whole = answer(chosen, comparison, machine=machine, notes=notes, explained="rank 0 does < all")
    page = unescape(re.sub(r"<[^>]*>", "", answer_page(whole)))
    facts = [*whole.plan_facts(), *whole.search_facts()]
    assert {"plan", "step time", "memory", "cost", "proof"} <= {fact.name for fact in facts}
    rows = (whole.runners_up(), whole.why_not(), whole.less_memory(), whole.counted())
    assert all(told.rows for told in rows)
    for text in (
        *(fact.text for fact in facts),
        *(cell for told in rows for row in told.rows for cell in (*told.heads, *row)),
        *(*notes, "rank 0 does < all", "toy"),
    ):
        assert text in page


def test_the_page_has_all_changes_that_are_known_where_the_terminal_has_the_first_ones() -> None:
    chosen, comparison = chosen_by("time")
    more = (replace(comparison.alternatives[-1], change=f"mb 1 → {size}") for size in range(2, 20))
    comparison = replace(comparison, alternatives=(*comparison.alternatives, *more))
    whole = answer(chosen, comparison)
    page = answer_page(whole)
    assert len(whole.why_not().rows) < len(whole.why_not(is_whole=True).rows) == len(comparison.alternatives)
    assert all(f"<td>{a.change}</td>" in page for a in comparison.alternatives)


def test_the_counts_of_the_page_are_those_of_the_certificate() -> None:
    chosen, comparison = chosen_by("time", memory_bytes=700_000)
    assert chosen.found is not None
    rows = answer(chosen, comparison).counted().rows
    numbers = [int(number.replace(",", "")) for _, number, _ in rows]
    assert sum(numbers) == chosen.found.certificate.enumerated
    assert all(why for _, _, why in rows)


def test_the_page_draws_each_rank_once_and_each_point_of_the_front() -> None:
    chosen, comparison = chosen_by("time")
    page = answer_page(answer(chosen, comparison))
    assert page.count("<rect") == chosen.plan.mesh.world_size == 8
    assert page.count("<circle") == len(comparison.front)
    assert "node 0" in page and "node 1" in page and "more ranks" not in page


def test_the_page_tells_context_parallel_ranks_apart() -> None:
    """Two boxes of a mesh with cp=2 had one name."""
    chosen, comparison = chosen_by("time", "dp=4,cp=2")
    page = answer_page(answer(chosen, comparison))
    names = re.findall(r">(p\d+ d\d+ t\d+ c\d+)<", page)
    assert len(names) == len(set(names)) == 8
    assert "c: context-parallel rank." in page


def test_of_many_ranks_the_page_draws_the_first_nodes_and_counts_the_rest() -> None:
    machine = round_machine(64, latency_s=1e-5)
    chosen, comparison = chosen_by("time", "dp=16,tp=4", machine=machine, ranks=64)
    page = answer_page(answer(chosen, comparison, machine=machine))
    assert page.count("<rect") == 32
    assert "and 32 more ranks" in page
