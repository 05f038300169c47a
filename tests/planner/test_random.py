"""Random small models, machines and limits: the search finds what pricing every choice finds, and no bound is above its price."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph
from tests.planner.brute import all_priced, least_s

from shardstage.errors import PlanError
from shardstage.planner import Searcher

PLENTY = 2**40
CLOSE = 1 + 1e-9


def searcher_of(random: Random) -> Searcher:
    num_layers, width = random.randint(2, 7), random.choice((64, 128, 256))
    hidden = [width * random.choice((1, 2, 4, 8)) for _ in range(num_layers)]
    graph = toy_graph(
        num_layers=num_layers,
        width=width,
        hidden=hidden if random.random() < 0.6 else 4 * width,
        vocab=random.choice((128, 512, 4096)),
        is_tied=random.random() < 0.3,
    )
    machine = round_machine(
        8,
        node=random.choice((1, 2, 4)),
        latency_s=random.choice((0.0, 1e-6, 1e-4, 1e-3)),
        op_latency_s=random.choice((0.0, 1e-5)),
    )
    return Searcher(
        graph,
        machine,
        num_ranks=random.randint(2, 4),
        global_batch=random.randint(1, 7),
        sequence=random.choice((16, 64)),
        is_runnable=random.random() < 0.7,
        fixed=frozenset({"offload"}),
    )


@pytest.mark.parametrize("seed", range(24))
def test_the_best_of_a_random_space_is_found_within_any_memory(seed: int) -> None:
    random = Random(seed)
    searcher = searcher_of(random)
    try:
        plenty = searcher.best(PLENTY).prediction.peak_bytes
    except PlanError:
        assert not searcher.lattice.groups
        return
    for limit in (PLENTY, int(random.uniform(0.15, 1.0) * plenty)):
        priced = all_priced(searcher, limit)
        least = least_s(priced)
        if least is None:
            with pytest.raises(PlanError, match="no plan for"):
                searcher.best(limit)
            continue
        found = searcher.best(limit)
        assert math.isclose(found.prediction.step_time_s, least, rel_tol=1e-9)
        assert found.certificate.enumerated == len(priced)
        bounds = searcher.bounds(np.arange(len(searcher.lattice.groups)))
        bounded = {bounds.choice(int(i)): int(i) for i in np.flatnonzero(np.isfinite(bounds.seconds.ravel()))}
        for choice, price in priced.items():
            if price is not None and choice.schedule not in searcher.space.dominated:
                assert bounds.seconds.flat[bounded[choice]] <= price.seconds * CLOSE, choice
                assert bounds.least_bytes.flat[bounded[choice]] <= price.prediction.peak_bytes * CLOSE, choice
