"""``search``: the fastest plan that fits as it runs.

A model of few blocks is searched in parts of them (``pricing.fold_for``), so that there are enough to make stages of. What a block gathers,
computes again and works with at once is a little more than what its parts do: a plan may fit in parts and not in the whole blocks that the
engine runs. It is then searched for within as much less.
"""

from __future__ import annotations

from typing import Final

from shardstage.cluster import Cluster
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.plan import Precision, Request
from shardstage.planner.predict import predict
from shardstage.planner.pricing import is_in_parts
from shardstage.planner.search import Searcher, SearchResult, usable_bytes

__all__ = ["best_in_whole_blocks", "search"]

MOST_SEARCHED: Final = 6
"""So many limits are tried, each lower by the last plan's excess: one is mostly enough."""


def search(
    graph: ModelGraph,
    cluster: Cluster,
    *,
    num_ranks: int,
    global_batch: int,
    sequence: int | None,
    precision: Precision = "float32",
    memory_bytes: int | None = None,
    fix: Request | None = None,
    fixed: frozenset[str] = frozenset(),
    is_runnable: bool = True,
) -> SearchResult:
    """The fastest plan for ``num_ranks`` ranks that holds at most ``memory_bytes`` a rank.

    ``fixed`` names decisions that ``fix`` has taken (``tp``, ``zero``, ``microbatch``, …). ``is_runnable`` leaves out what this release
    prices but does not run. Raises ``PlanError`` if the cluster is too small, or nothing fits.
    """
    searcher = Searcher(
        graph,
        cluster,
        num_ranks=num_ranks,
        global_batch=global_batch,
        sequence=sequence,
        precision=precision,
        fix=fix,
        fixed=fixed,
        is_runnable=is_runnable,
    )
    return best_in_whole_blocks(searcher, memory_bytes or usable_bytes(cluster))


def best_in_whole_blocks(searcher: Searcher, limit_bytes: int) -> SearchResult:
    """The best plan within a limit, which is lower, as ``limit_bytes`` of the result says, where that lets it fit in whole blocks.

    The first one found where nothing does. Raises ``PlanError`` where nothing fits in parts.
    """
    first = found = searcher.best(limit_bytes)
    if not is_in_parts(searcher.pricing.folded, searcher.graph):
        return first
    for _ in range(MOST_SEARCHED):
        excess = predict(searcher.graph, found.best, searcher.cluster).peak_bytes - limit_bytes
        if excess <= 0:
            return found
        try:
            found = searcher.best(min(found.limit_bytes, found.prediction.peak_bytes) - excess)
        except PlanError:
            break
    return first
