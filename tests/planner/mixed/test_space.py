"""What is enumerated for a mixed cluster: shares that add up, classes that keep pace, meshes on whole groups."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import numpy as np
import pytest
from tests.planner.mixed.instances import every_arrangement, machines, random_searcher, searcher_of

from shardstage.layout import AXES
from shardstage.planner.mixed.space import Arrangement, Sharding


@pytest.mark.parametrize("seed", range(20))
def test_arrangements_deal_the_batch_out_as_they_say(seed: int) -> None:
    searcher = random_searcher(Random(seed))
    batch = searcher.space.declared.global_batch
    found = every_arrangement(searcher)
    assert len({*found}) == len(found)
    for of in found:
        shares, m = of.shares(batch), of.num_microbatches
        assert sum(shares) == batch and len(shares) == of.dp and min(shares) >= m
        assert -(-max(shares) // max(of.sizes)) == m
        assert all(used <= there for used, there in zip(of.used, searcher.space.num_devices, strict=True))
        assert of.mesh.world_size == sum(of.used)
        if of.by == "shares":
            ends = np.cumsum([0, *of.ways])
            of_classes = [max(shares[a:b]) for a, b in pairwise(ends)]
            assert tuple(-(-share // m) for share in of_classes) == of.sizes


def test_a_class_of_twice_the_speed_takes_about_twice_the_samples() -> None:
    searcher = searcher_of(machines((2, 1.0), (2, 2.0)), batch=48)
    shares = [of for of in every_arrangement(searcher) if of.by == "shares" and of.pp == 1]
    assert any(of.samples(48) == (16, 32) for of in shares)
    assert all(slow <= fast for slow, fast in (of.samples(48) for of in shares))


def test_pipelines_on_one_class_each_lie_outside_and_pipelines_through_all_inside() -> None:
    through = Arrangement("stages", Sharding(2, True), 3, 4, (1, 2), (2, 2), 8)
    apart = Arrangement("shares", Sharding(2, True), 3, 3, (1, 2), (1, 2), 8)
    assert through.mesh.order == AXES and through.used == (8, 16)
    assert [lane.classes for lane in through.lanes] == [(0, 1, 1)]
    assert apart.mesh.order[0] == "dp" and apart.used == (6, 12)
    assert [(lane.classes, lane.size) for lane in apart.lanes] == [((0, 0, 0), 1), ((1, 1, 1), 2)]
