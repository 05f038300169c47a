"""Random small models, machines and limits: the search finds what pricing every choice finds, and no bound is above its price."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import Experts, toy_graph
from tests.planner.brute import PLENTY, assert_best

from shardstage.cluster.links import LinearCost
from shardstage.errors import PlanError
from shardstage.plan import named_decisions, parse_request
from shardstage.planner import Searcher


def searcher_of(random: Random, *, shares_cores: bool = False) -> Searcher:
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
    if shares_cores:
        ratio, message = random.choice((1.2, 2.0, 2.4, 7.5)), random.choice((None, LinearCost(1e-4, 1e9)))
        machine = replace(machine, device=replace(machine.device, alone_ratio=ratio, message=message))
    return Searcher(
        graph,
        machine,
        num_ranks=random.randint(2, 4),
        global_batch=random.randint(1, 7),
        sequence=random.choice((16, 64)),
        is_runnable=random.random() < 0.7,
        fixed=frozenset({"offload"}),
    )


def searcher_of_experts(random: Random) -> Searcher:
    """Of a model with layers of experts, on ranks that may leave them whole; few microbatches and little else to choose."""
    width = random.choice((64, 256))
    graph = toy_graph(
        num_layers=random.randint(1, 3),
        width=width,
        hidden=width * random.choice((1, 4)),
        vocab=random.choice((128, 4096)),
        experts=Experts(
            number=random.choice((2, 4, 6)),
            hidden=width * random.choice((1, 4)),
            chosen=random.choice((1, 2)),
            has_shared=random.random() < 0.5,
        ),
    )
    machine = round_machine(8, node=random.choice((2, 4)), latency_s=random.choice((0.0, 1e-6, 1e-3)))
    fix = random.choice(("cp=1", "cp=2", "etp=1", "sp", "tp=2", "zero=2"))
    return Searcher(
        graph,
        machine,
        num_ranks=random.choice((2, 4, 4)),
        global_batch=random.randint(1, 4),
        sequence=16,
        is_runnable=False,
        fix=parse_request(fix),
        fixed=named_decisions(fix) | {"offload"},
    )


@pytest.mark.parametrize("seed", range(8))
def test_whole_experts_are_weighed_against_cut_ones(seed: int) -> None:
    random = Random(1000 + seed)
    searcher = searcher_of_experts(random)
    groups = searcher.lattice.groups
    assert any(group.has_whole_experts for group in groups) or all(group.tp == 1 for group in groups)
    assert_best(searcher, ratios=(random.uniform(0.15, 1.0),))


@pytest.mark.parametrize("seed", [*range(24), 700053])
def test_the_best_of_a_random_space_is_found_within_any_memory(seed: int) -> None:
    """The last one: of a tied embedding's sum and the last block's only one counted as after the backward, below a bound."""
    random = Random(seed)
    searcher = searcher_of(random)
    try:
        searcher.best(PLENTY)
    except PlanError:
        assert not searcher.lattice.groups
        return
    assert_best(searcher, ratios=(random.uniform(0.15, 1.0),))


@pytest.mark.parametrize("seed", range(8))
def test_so_is_that_of_ranks_that_share_cores(seed: int) -> None:
    """Whose talk, cores that idle and messages come on top of what bounds count."""
    random = Random(2000 + seed)
    searcher = searcher_of(random, shares_cores=True)
    searcher.best(PLENTY)
    assert_best(searcher, ratios=(random.uniform(0.15, 1.0),))
