"""Pipelines that run through all classes of devices are cut for the whole step: no other cut is quicker."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import combinations
from random import Random

import pytest
from tests.planner.brute import assert_least_of_cuts
from tests.planner.mixed.instances import PLENTY, every_choice, random_searcher

from shardstage.planner.mixed.priced import TooLong
from shardstage.planner.mixed.search import MixedSearcher
from shardstage.planner.mixed.space import MixedChoice

MOST_CUTS = 500


def seconds_of_all_cuts(
    searcher: MixedSearcher, choice: MixedChoice, limits: tuple[int, ...]
) -> Iterator[float]:
    """Of those that fit; every stage recomputes the least that it must."""
    pricing, (lane,) = searcher.pricing, choice.arrangement.lanes
    setup = pricing.setup(choice)
    stages = pricing.stages_of(choice, lane, setup, limits)
    for ends in combinations(range(1, stages.num_units), setup.mesh.pp - 1):
        starts, stops = (0, *ends), (*ends, stages.num_units)
        fitted = [stages.fitted(stage, *span) for stage, span in enumerate(zip(starts, stops, strict=True))]
        modes = tuple(each.recompute for each in fitted if each is not None)
        if len(modes) == len(starts):
            yield pricing.step_s(choice, [lane], setup.with_stages(starts, modes))


@pytest.mark.parametrize("seed", range(12))
def test_no_cut_of_one_pipeline_is_quicker_within_any_memory(seed: int) -> None:
    random = Random(seed)
    searcher = random_searcher(random)
    num_classes, inner = len(searcher.cluster.parts), searcher.pricing.num_units - 1
    choices = [
        choice
        for choice in every_choice(searcher)
        if choice.schedule.per_rank == 1
        and len(choice.arrangement.lanes) == 1
        and math.comb(inner, choice.arrangement.pp - 1) <= MOST_CUTS
    ]
    for choice in random.sample(choices, min(len(choices), 8)):
        price = searcher.pricing.price(choice, (PLENTY,) * num_classes)
        limits = (
            tuple(random.choice((PLENTY, int(random.uniform(0.3, 1.2) * peak))) for peak in price.peaks)
            if price
            else (PLENTY,) * num_classes
        )
        least_s = min(seconds_of_all_cuts(searcher, choice, limits), default=math.inf)
        if searcher.pricing.price(choice, limits) is not None:
            price = partial(searcher.pricing.price, choice, limits)
            assert_least_of_cuts(price, least_s, random=random, too_slow=TooLong)
