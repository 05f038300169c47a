"""Named modules in a search: kept to, exact, and told where they would be faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph
from tests.planner.brute import PLENTY, assert_best
from tests.runtime.dry_run_cases import graph_of

from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.plan import check, named_decisions, parse_request
from shardstage.planner import Searcher, cheapest_fit, named_modules, predict
from shardstage.planner.modules import module_sets

MACHINE = round_machine(8, latency_s=1e-6)


def with_activations(graph: ModelGraph) -> ModelGraph:
    """The toy with its relu in a module of its own."""
    ops = (replace(op, module=f"{op.module}.act") if op.name.startswith("relu") else op for op in graph.ops)
    return replace(graph, ops=tuple(ops))


def llama() -> ModelGraph:
    return graph_of("llama", "float32")


def searcher_of(text: str, *, ranks: int = 2, batch: int = 16) -> Searcher:
    return Searcher(
        llama(),
        MACHINE,
        num_ranks=ranks,
        global_batch=batch,
        sequence=64,
        fix=parse_request(text),
        fixed=named_decisions(text) | {"offload"},
    )


@pytest.mark.parametrize("modules", ["*.act", "*.up/*.act", "layers.[02468].act/layers.[1357]"])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_plan_with_modules_named_is_found_within_any_memory(seed: int, modules: str) -> None:
    """Even where naming them keeps more than without: of ``*.act`` the input stays, beside a result that is saved anyway."""
    random = Random(seed)
    width, num_layers = random.choice((64, 128)), random.randint(2, 6)
    hidden = [width * random.choice((1, 2, 4, 8)) for _ in range(num_layers)]
    searcher = Searcher(
        with_activations(toy_graph(num_layers=num_layers, width=width, hidden=hidden)),
        round_machine(8, node=random.choice((1, 4)), latency_s=random.choice((0.0, 1e-4))),
        num_ranks=random.randint(2, 4),
        global_batch=random.randint(3, 7),
        sequence=64,
        fix=parse_request(f"modules={modules}"),
        fixed=frozenset({"offload", "recompute_modules"}),
    )
    assert_best(searcher, ratios=(random.uniform(0.15, 1.0),))


@pytest.mark.parametrize(
    "text",
    ["mb=8,recompute=selective,modules=*.mlp/*norm", "pp=2,recompute=full:1+selective,modules=*.self_attn"],
)
def test_what_was_found_costs_what_its_plan_does(text: str) -> None:
    searcher = searcher_of(text)
    found = searcher.best(PLENTY)
    assert found.best.is_selective
    assert found.best.recompute_modules == searcher.recompute_modules
    check(found.best, llama(), num_ranks=2)
    assert predict(llama(), found.best, MACHINE) == found.prediction


def test_a_plan_that_recomputes_nothing_names_no_modules() -> None:
    found = searcher_of("modules=*.mlp").best(PLENTY)
    assert not found.best.is_selective and found.best.recompute_modules == ()


def test_the_space_knows_the_modules() -> None:
    plain, named, other = (searcher_of(text) for text in ("mb=8", "mb=8,modules=*.mlp", "mb=8,modules=*norm"))
    assert len({searcher.space.fingerprint for searcher in (plain, named, other)}) == 3


def test_modules_that_are_not_there_are_refused_before_the_search() -> None:
    with pytest.raises(PlanError, match=r"modules=\*.mpl matches no module in a layer") as caught:
        searcher_of("modules=*.mpl")
    assert "modules=*.mlp" in (caught.value.hint or "")


def test_a_plan_that_does_not_fit_is_changed_with_its_modules_kept() -> None:
    searcher = searcher_of("dp=1,tp=2,mb=8,recompute=selective:1,modules=*.mlp")
    plan = searcher.best(PLENTY).best
    limit = int(0.75 * predict(llama(), plan, MACHINE).peak_bytes)
    fit = cheapest_fit(llama(), MACHINE, plan, limit_bytes=limit)
    assert fit is not None and fit.peak_bytes <= limit
    assert fit.plan.recompute_modules == (("*.mlp",) if fit.plan.is_selective else ())


def tight() -> Iterator[tuple[Searcher, float]]:
    yield searcher_of("mb=8,tp=2"), 0.9
    yield searcher_of("mb=8,tp=2"), 0.8
    yield searcher_of("mb=8,pp=2"), 0.8


def test_modules_that_are_told_are_faster_fit_and_can_be_pasted() -> None:
    for searcher, ratio in tight():
        found = searcher.best(int(ratio * searcher.best(PLENTY).prediction.peak_bytes))
        told = named_modules(searcher, found)
        assert told is not None
        assert told.prediction.step_time_s == pytest.approx(
            (1 - told.gain) * found.prediction.step_time_s, rel=1e-9
        )
        assert told.gain > 0 and told.prediction.peak_bytes <= found.limit_bytes
        assert predict(llama(), told.plan, MACHINE) == told.prediction
        assert parse_request(told.text).recompute_modules == told.plan.recompute_modules
        check(told.plan, llama(), num_ranks=2)


def test_what_is_told_is_what_a_search_with_these_modules_prices() -> None:
    searcher = searcher_of("mb=8,tp=2")
    found = searcher.best(int(0.9 * searcher.best(PLENTY).prediction.peak_bytes))
    told = named_modules(searcher, found)
    assert told is not None
    again = searcher_of(f"mb=8,tp=2,modules={'/'.join(told.plan.recompute_modules)}")
    assert again.best(found.limit_bytes).prediction.step_time_s <= told.prediction.step_time_s
    priced = again.pricing.price(found.priced.choice, found.limit_bytes)
    assert priced is not None and priced.prediction == told.prediction


@pytest.mark.parametrize(
    ("text", "ratio"), [("recompute=full:1", 1.0), ("modules=*.self_attn", 0.9), ("compile", 0.9)]
)
def test_nothing_is_told_where_recomputation_was_decided(text: str, ratio: float) -> None:
    searcher = searcher_of(f"mb=8,tp=2,{text}")
    found = searcher.best(int(ratio * searcher.best(PLENTY).prediction.peak_bytes))
    assert named_modules(searcher, found) is None


def test_nothing_is_told_of_a_plan_that_recomputes_nothing() -> None:
    searcher = searcher_of("mb=8,tp=2")
    assert named_modules(searcher, searcher.best(PLENTY)) is None


def test_sets_are_of_a_layer_s_modules_and_those_without_products() -> None:
    norms = ("*.input_layernorm", "*.post_attention_layernorm")
    assert module_sets(llama()) == (
        ("*.self_attn",),
        ("*.mlp",),
        norms,
        (*norms, "*.act_fn"),
        (*norms, "*.self_attn"),
        (*norms, "*.mlp"),
    )
    assert module_sets(toy_graph()) == (("*.up",), ("*.down",))
