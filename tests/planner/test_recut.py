"""Stages of one rank each are cut for the whole step: no other cut is quicker, on thousands of choices of random small spaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from random import Random

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph
from tests.planner.brute import PLENTY, UNEVEN, assert_least_of_cuts, every_choice
from tests.planner.brute import searcher_of as shared_searcher_of
from tests.planner.test_random import searcher_of, searcher_of_experts

from shardstage.cost import step_seconds
from shardstage.errors import PlanError
from shardstage.plan import named_decisions, parse_request
from shardstage.planner import Searcher
from shardstage.planner.chain import ChainCosts
from shardstage.planner.pricing import TooSlow, _Uncut
from shardstage.planner.space import Choice
from shardstage.planner.stages import best_cut

MOST_CUTS = 500


def uncut(searcher: Searcher, choice: Choice, limit_bytes: int) -> tuple[_Uncut, ChainCosts]:
    pricing = searcher.pricing
    parts = _Uncut(choice, pricing.chain(choice.group), pricing.setup(choice), pricing.links(choice))
    return parts, pricing._stage_costs(parts, limit_bytes)


def seconds_of_all_cuts(searcher: Searcher, choice: Choice, limit_bytes: int) -> Iterator[float]:
    """Of those that fit; every stage recomputes the least that it must."""
    parts, costs = uncut(searcher, choice, limit_bytes)
    for ends in combinations(range(1, costs.num_units), choice.mesh.pp - 1):
        starts, stops = (0, *ends), (*ends, costs.num_units)
        fitted = [costs.fitted(stage, *span) for stage, span in enumerate(zip(starts, stops, strict=True))]
        modes = tuple(each.recompute for each in fitted if each is not None)
        if len(modes) == len(starts):
            yield step_seconds(parts.chain.profile, parts.setup.with_stages(starts, modes), parts.links)


def choices_with_stages(searcher: Searcher) -> list[Choice]:
    """Of one stage a rank, and not too many cuts."""
    inner = searcher.num_units - 1
    return [
        choice
        for choice in every_choice(searcher)
        if choice.schedule.per_rank == 1
        and 1 < choice.mesh.pp
        and math.comb(inner, choice.mesh.pp - 1) <= MOST_CUTS
    ]


@pytest.mark.parametrize("searcher_of", [searcher_of, searcher_of_experts])
@pytest.mark.parametrize("seed", range(15))
def test_no_cut_is_quicker_within_any_memory(searcher_of: Callable[[Random], Searcher], seed: int) -> None:
    random = Random(seed)
    searcher = searcher_of(random)
    try:
        plenty = searcher.best(PLENTY).prediction.peak_bytes
    except PlanError:
        assert not searcher.lattice.groups
        return
    choices = choices_with_stages(searcher)
    for choice in random.sample(choices, min(len(choices), 8)):
        limit_bytes = random.choice((PLENTY, int(plenty * random.uniform(0.2, 1.2))))
        least_s = min(seconds_of_all_cuts(searcher, choice, limit_bytes), default=None)
        price = partial(searcher.pricing.price, choice, limit_bytes)
        if least_s is None:
            assert price() is None
            continue
        assert_least_of_cuts(price, least_s, random=random, too_slow=TooSlow)


def test_over_slow_links_the_first_stage_is_left_what_its_backward_hides() -> None:
    """The cut whose pipeline is quickest gives the stage with the vocabulary an even share of the layers, too, and nothing hides the sum
    of their gradients in the end."""
    fix = "dp=2,pp=2,zero=0,mb=1,schedule=1f1b"
    searcher = Searcher(
        toy_graph(num_layers=6, width=256, hidden=512, vocab=4096),
        round_machine(8, latency_s=1e-3, node=1),
        num_ranks=4,
        global_batch=4,
        sequence=64,
        fix=parse_request(fix),
        fixed=named_decisions(fix),
    )
    best = searcher.best(PLENTY)
    choice = best.priced.choice
    parts, costs = uncut(searcher, choice, PLENTY)
    pipeline = best_cut(costs, 2, parts.setup.num_microbatches)
    assert pipeline is not None
    of_pipeline = parts.setup.with_stages(pipeline.starts, pipeline.recompute)
    assert best.priced.setup.starts[1] < pipeline.starts[1]
    assert best.prediction.step_time_s < 0.96 * step_seconds(parts.chain.profile, of_pipeline, parts.links)


def test_ranks_that_share_cores_are_cut_for_the_pipeline() -> None:
    """Who computes what hardly matters there: the whole step's cut of a GPT-2 left two of twelve units to the first stage, and was 8 %
    slower in the simulator."""
    searcher = shared_searcher_of(UNEVEN, batch=4, shared_cores=True)
    for choice in choices_with_stages(searcher):
        parts, costs = uncut(searcher, choice, PLENTY)
        counts_sum = choice.schedule.name in ("1f1b", "gpipe")
        pipeline = best_cut(costs, choice.mesh.pp, parts.setup.num_microbatches, counts_sum=counts_sum)
        price = searcher.pricing.price(choice, PLENTY)
        assert pipeline is not None
        assert price is not None
        assert price.setup.starts == pipeline.starts
