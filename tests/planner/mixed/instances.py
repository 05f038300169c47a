"""Random small mixed clusters and models, and a search that leaves nothing out."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from tests.cost.machines import round_machine
from tests.cost.toy import Experts, toy_graph

from shardstage.cluster import Cluster
from shardstage.graph import ModelGraph
from shardstage.planner.mixed.priced import MixedPriced
from shardstage.planner.mixed.search import MixedSearcher
from shardstage.planner.mixed.space import Arrangement, MixedChoice

PLENTY = 2**40
CLOSE = 1 + 1e-9
GRAPH = toy_graph(num_layers=5, width=128, hidden=512, vocab=512)


def machines(*classes: tuple[int, float], node: int = 4, latency_s: float = 0.0) -> Cluster:
    """A class of each (devices, speed over the round machine's)."""
    parts = []
    for number, (num_devices, speed) in enumerate(classes):
        machine = round_machine(num_devices, node=node, latency_s=latency_s)
        device = replace(
            machine.device,
            name=f"class{number}",
            bytes_per_s=speed * machine.device.bytes_per_s,
            flops_per_s={dtype: speed * rate for dtype, rate in machine.device.flops_per_s.items()},
        )
        parts.append(replace(machine, name=f"class{number}", device=device))
    return Cluster.of_parts(tuple(parts), name="mixed", network=parts[0].levels[-1])


def searcher_of(
    cluster: Cluster, *, graph: ModelGraph = GRAPH, batch: int = 16, sequence: int = 64, **more: Any
) -> MixedSearcher:
    """Where nothing fits, nothing is offloaded."""
    fixed = more.pop("fixed", frozenset()) | {"offload"}
    return MixedSearcher(
        graph, cluster, global_batch=batch, sequence=sequence, precision="float32", fixed=fixed, **more
    )


def random_graph(random: Random) -> ModelGraph:
    num_layers, width = random.randint(1, 5), random.choice((64, 128))
    hidden = [width * random.choice((1, 2, 4, 8)) for _ in range(num_layers)]
    return toy_graph(
        num_layers=num_layers,
        width=width,
        hidden=hidden if random.random() < 0.5 else 4 * width,
        vocab=random.choice((128, 1024)),
        is_tied=random.random() < 0.3,
    )


def random_searcher(random: Random) -> MixedSearcher:
    classes = [
        (random.randint(1, 3), random.choice((0.5, 1.0, 2.3))) for _ in range(random.choice((2, 2, 3)))
    ]
    latency_s = random.choice((0.0, 1e-6, 1e-3))
    return searcher_of(
        machines(*classes, node=random.choice((2, 4)), latency_s=latency_s),
        graph=random_graph(random),
        batch=random.randint(2, 9),
        sequence=random.choice((16, 64)),
        is_runnable=random.random() < 0.3,
    )


def random_sharing_searcher(random: Random) -> MixedSearcher:
    """Of a model with layers of experts, whose ranks may share sequences, too; there is little else to choose. It has as many blocks as
    there are devices, so that stages are cut between the blocks that ZeRO gathers."""
    classes = [(random.choice((2, 2, 3, 4)), random.choice((0.5, 1.0, 2.3))) for _ in range(2)]
    width = random.choice((64, 128))
    graph = toy_graph(
        num_layers=sum(number for number, _ in classes) - 2,
        width=width,
        hidden=width * random.choice((1, 4)),
        vocab=random.choice((128, 1024)),
        is_tied=random.random() < 0.3,
        experts=Experts(
            number=random.choice((2, 4, 6)),
            hidden=width * random.choice((1, 4)),
            chosen=random.choice((1, 2)),
            has_shared=random.random() < 0.5,
        ),
    )
    searcher = searcher_of(
        machines(*classes, node=random.choice((2, 4)), latency_s=random.choice((0.0, 1e-6, 1e-3))),
        graph=graph,
        batch=random.randint(2, 6),
        sequence=16,
    )
    declared = searcher.space.declared
    searcher.space = replace(
        searcher.space,
        declared=replace(
            declared,
            cps=random.choice(((1,), (1, 2), (2,))),
            zeros=random.choice(((0, 1), (2,), (3,))),
            schedules=tuple(random.sample([s for s in declared.schedules if s.per_rank <= 2], 3)),
        ),
    )
    return searcher


def every_arrangement(searcher: MixedSearcher) -> list[Arrangement]:
    return [
        arrangement
        for sharding in searcher.space.shardings
        for arrangement in searcher.arrangements(sharding)
    ]


def every_choice(searcher: MixedSearcher) -> list[MixedChoice]:
    space = searcher.space
    return [
        MixedChoice(arrangement, zero, schedule)
        for arrangement in every_arrangement(searcher)
        for zero in space.zeros_of(arrangement)
        for schedule in space.schedules_of(arrangement)
    ]


def all_priced(searcher: MixedSearcher, limits: tuple[int, ...]) -> dict[MixedChoice, MixedPriced | None]:
    """Every choice with its price, None where it does not fit."""
    return {choice: searcher.pricing.price(choice, limits) for choice in every_choice(searcher)}
