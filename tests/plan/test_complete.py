"""Completing a request: ranks, shares, microbatches and balanced stages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cost.toy import toy_graph
from transformers import GPT2Config, GPT2LMHeadModel

from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.recompute import PartialRecompute
from shardstage.layout import Mesh
from shardstage.plan import Plan, check, complete, parse_request
from shardstage.plan.complete import default_microbatch, proportional_shares

SEVEN_LAYERS = toy_graph(num_layers=7)


def plan_of(text: str, graph: ModelGraph = SEVEN_LAYERS, *, ranks: int = 4, batch: int = 16) -> Plan:
    return complete(parse_request(text), graph, num_ranks=ranks, global_batch=batch, sequence=64)


def num_layers_of_stages(plan: Plan, graph: ModelGraph = SEVEN_LAYERS) -> list[int]:
    index = {op.name: i for i, op in enumerate(graph.ops)}
    ranges = [range(index[stage.first], index[stage.last] + 1) for stage in plan.stages]
    return [sum(index[op.name] in r for op in graph.ops if op.name.startswith("add_")) for r in ranges]


@pytest.mark.parametrize(
    ("text", "mesh"),
    [
        ("", Mesh(dp=4)),
        ("tp=2", Mesh(dp=2, tp=2)),
        ("tp=2,pp=2", Mesh(tp=2, pp=2)),
        ("dp=4,zero=3", Mesh(dp=4)),
        ("pp=4", Mesh(pp=4)),
    ],
)
def test_missing_dp_fills_the_ranks(text: str, mesh: Mesh) -> None:
    assert plan_of(text).mesh == mesh


@pytest.mark.parametrize("text", ["", "tp=2", "pp=2", "pp=4,schedule=gpipe", "dp=4,zero=3", "tp=2,pp=2,sp"])
def test_a_completed_plan_passes_its_check(text: str) -> None:
    check(plan_of(text), SEVEN_LAYERS, num_ranks=4)


def test_seven_layers_make_three_uneven_stages() -> None:
    plan = plan_of("pp=3", ranks=3)
    assert num_layers_of_stages(plan) == [2, 3, 2]
    assert (plan.stages[0].first, plan.stages[-1].last) == ("embed", "loss")


def test_what_is_said_of_every_stage_is_said_once() -> None:
    alike = plan_of("pp=3,stages=full:2*3", ranks=3)
    assert (alike.recompute, alike.stage_recompute) == (PartialRecompute(full=2), ())
    apart = plan_of("pp=3,recompute=full,stages=full:2/none*2", ranks=3)
    assert (apart.recompute, apart.stage_recompute) == ("none", (PartialRecompute(full=2), "none", "none"))
    check(apart, SEVEN_LAYERS, num_ranks=3)


def test_more_layers_than_a_stage_has_are_a_remark_where_said_of_all() -> None:
    assert check(plan_of("pp=3,recompute=full:3,mb=1", ranks=3), SEVEN_LAYERS) == ()
    (note,) = check(plan_of("pp=3,recompute=full:4,mb=1", ranks=3), SEVEN_LAYERS)
    assert note == "recompute=full:4 counts 4 layers, and a stage has 3 at most: all of them are recomputed"


def test_a_heavy_head_takes_layers_off_its_stage() -> None:
    graph = toy_graph(num_layers=6, vocab=4096)
    assert num_layers_of_stages(plan_of("pp=2", graph, ranks=2), graph) == [6, 0]


def test_more_stages_than_blocks_cut_through_layers() -> None:
    plan = plan_of("pp=20", ranks=20)
    check(plan, SEVEN_LAYERS, num_ranks=20)
    assert len(plan.stages) == 20


def test_attention_that_drops_is_cut_off_from_the_products_before_it() -> None:
    """Where every op is a unit, those of queries, keys and values are alike, and priced as one: two of three names were missing."""
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=64, attn_pdrop=0.1)
    graph = capture(lambda: GPT2LMHeadModel(config), sequence=16)
    plan = complete(parse_request("pp=12"), graph, num_ranks=12, global_batch=16, sequence=16)
    check(plan, graph, num_ranks=12)
    assert len(plan.stages) == 12


def test_more_stages_than_positions_are_refused() -> None:
    with pytest.raises(PlanError, match="pp=99, and the model can be cut into 33 stages at most") as caught:
        plan_of("pp=99", ranks=99)
    assert caught.value.hint == '--plan "pp=33"'


@pytest.mark.parametrize(
    ("text", "ranks", "message", "hint"),
    [
        ("dp=2,tp=2", 3, "dp=2 × tp=2 × pp=1 needs 4 ranks, and there are 3", "--ranks 4"),
        ("dp=2", 4, "dp=2 × tp=1 × pp=1 needs 2 ranks", '--plan "dp=4,tp=1,pp=1"'),
        ("tp=3", 4, "tp=3 × pp=1 needs a multiple of 3 ranks, and there are 4", "--ranks 3"),
        ("tp=8", 4, "needs a multiple of 8 ranks", "--ranks 8"),
        ("dp=4,shares=5/3", 4, "shares=5/3 are 2, and dp is 4", '--plan "dp=2,shares=..."'),
        ("dp=17", 17, "a batch of 16 samples leaves one of 17 data-parallel ranks", "--batch 17"),
    ],
)
def test_a_request_that_does_not_fit_says_what_would(text: str, ranks: int, message: str, hint: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        plan_of(text, ranks=ranks)
    assert caught.value.hint == hint


def test_shares_are_proportional() -> None:
    assert plan_of("shares=5/3", ranks=2).shares == (10, 6)
    assert plan_of("", ranks=3).shares == (6, 5, 5)


@given(st.integers(1, 500), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_shares_add_up_and_lie_within_one_sample_of_the_proportion(batch: int, weights: list[int]) -> None:
    shares = proportional_shares(batch, weights)
    assert sum(shares) == batch
    assert all(
        abs(share - batch * weight / sum(weights)) < 1 for share, weight in zip(shares, weights, strict=True)
    )


@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=6), st.integers(1, 8), st.sampled_from([None, 64, 9000])
)
def test_the_default_microbatch_gives_every_rank_equally_many_none_empty(
    shares: list[int], num_stages: int, sequence: int | None
) -> None:
    microbatch = default_microbatch(shares, num_stages, sequence)
    assert -(-max(shares) // microbatch) <= min(shares)


def test_a_pipeline_gets_two_microbatches_a_stage_where_the_batch_allows() -> None:
    assert plan_of("pp=4").num_microbatches == 8
    assert plan_of("pp=4", batch=3).num_microbatches == 3
    assert plan_of("dp=4").num_microbatches == 1


def test_a_long_sample_makes_small_microbatches() -> None:
    assert default_microbatch((16,), 1, 8192) == 2
    assert default_microbatch((16,), 1, 100_000) == 1
