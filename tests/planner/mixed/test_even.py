"""What lanes with several stages a rank take at least: never more than their price."""

from __future__ import annotations

from random import Random

import pytest
from tests.planner.mixed.instances import CLOSE, PLENTY, every_choice, random_searcher

from shardstage.planner.mixed.priced import TooLong


@pytest.mark.parametrize("seed", range(6))
def test_a_choice_is_refused_as_too_long_only_where_it_is(seed: int) -> None:
    random = Random(seed)
    searcher = random_searcher(random)
    num_classes = len(searcher.cluster.parts)
    pricing = searcher.pricing
    choices = [choice for choice in every_choice(searcher) if choice.schedule.per_rank > 1]
    random.shuffle(choices)
    for choice in choices[:60]:
        plenty = pricing.price(choice, (PLENTY,) * num_classes)
        assert plenty is not None
        limits = tuple(int(random.uniform(0.5, 1.0) * max(plenty.peaks)) for _ in range(num_classes))
        exact = pricing.price(choice, limits)
        if exact is None:
            continue
        found = pricing.price(choice, limits, exact.seconds * CLOSE)
        assert found is not None and found.seconds == pytest.approx(exact.seconds, rel=1e-9)
        with pytest.raises(TooLong):
            pricing.price(choice, limits, exact.seconds * (2 - CLOSE))
