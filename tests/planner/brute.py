"""A search that leaves nothing out: every choice of a space, enumerated a second time and priced one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph

from shardstage.cluster import LinearCost
from shardstage.graph import ModelGraph
from shardstage.planner import Searcher
from shardstage.planner.pricing import Priced
from shardstage.planner.space import Choice

EVEN = toy_graph(num_layers=6, width=256, hidden=1024, vocab=512)
UNEVEN = toy_graph(num_layers=4, width=128, hidden=(256, 2048, 512, 128), vocab=4096, is_tied=True)
MACHINE = round_machine(8, latency_s=1e-6)
SLOW_LINKS = round_machine(8, latency_s=1e-3, node=2)
SHARED_CORES = replace(
    SLOW_LINKS, device=replace(SLOW_LINKS.device, alone_ratio=1.5, message=LinearCost(1e-4, 1e9))
)


def searcher_of(
    graph: ModelGraph = EVEN,
    *,
    ranks: int = 4,
    batch: int = 16,
    slow_links: bool = False,
    shared_cores: bool = False,
    is_runnable: bool = False,
) -> Searcher:
    """Of one space: where nothing fits, nothing is offloaded."""
    return Searcher(
        graph,
        SHARED_CORES if shared_cores else SLOW_LINKS if slow_links else MACHINE,
        num_ranks=ranks,
        global_batch=batch,
        sequence=64,
        is_runnable=is_runnable,
        fixed=frozenset({"offload"}),
    )


def every_choice(searcher: Searcher) -> Iterator[Choice]:
    """By the words of ``planner.space``: groups × meshes × orders × ZeRO × schedules, of as many stages as there are units at most."""
    space = searcher.space
    for group in space.groups():
        for mesh in space.meshes(group.tp, group.cp):
            share = -(-space.global_batch // mesh.dp)
            if not bool(space.takes(group, mesh.dp, share)):
                continue
            for order in space.orders_of(mesh):
                for zero in space.zeros_of(mesh):
                    for schedule in space.schedules_of(mesh.pp):
                        if mesh.pp * schedule.per_rank <= searcher.num_units:
                            ordered = replace(mesh, order=order)
                            yield Choice(mesh=ordered, group=group, zero=zero, schedule=schedule)


def all_priced(searcher: Searcher, limit_bytes: int) -> dict[Choice, Priced | None]:
    """Every choice with its price, None where it does not fit."""
    return {choice: searcher.pricing.price(choice, limit_bytes) for choice in every_choice(searcher)}


def least_s(priced: dict[Choice, Priced | None]) -> float | None:
    return min((p.seconds for p in priced.values() if p is not None), default=None)
