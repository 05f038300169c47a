"""``Certificate``: why no plan of the space is better, in numbers that a second routine checks.

enumerated = priced + does not fit + by bound + by memory + by rule
gap        = (cost - best bound) / cost, where the best bound is the least of a choice that was not priced; 0 where it is no less
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from shardstage.cluster import Cluster
from shardstage.graph import ModelGraph
from shardstage.planner.space import Space

__all__ = ["Certificate", "Counts"]


@dataclass
class Counts:
    """How choices were dealt with: priced exactly, found to have no cut that fits and is fast enough, left out by a bound on time or on
    memory, or because another choice is as fast by the same formula and holds no more (``Space.dominated``)."""

    priced: int = 0
    unfit: int = 0
    by_bound: int = 0
    by_memory: int = 0
    by_rule: int = 0

    @property
    def enumerated(self) -> int:
        return self.priced + self.unfit + self.by_bound + self.by_memory + self.by_rule


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The proof of a search; hashes say what was searched.

    ``needs`` are the savers without which none of ``without`` choices fits; these were all searched, and are not enumerated here.
    """

    graph: str
    cluster: str
    space: str
    limit_bytes: int
    cost_s: float
    best_bound_s: float
    priced: int
    unfit: int
    by_bound: int
    by_memory: int
    by_rule: int
    needs: str = ""
    without: int = 0

    @staticmethod
    def of(
        *,
        graph: ModelGraph,
        cluster: Cluster,
        space: Space,
        limit_bytes: int,
        cost_s: float,
        counts: Counts,
        best_bound_s: float,
        needs: str = "",
        without: int = 0,
    ) -> Certificate:
        return Certificate(
            graph=graph.fingerprint,
            cluster=cluster_hash(cluster),
            space=space.fingerprint,
            limit_bytes=limit_bytes,
            cost_s=cost_s,
            best_bound_s=min(cost_s, best_bound_s),
            priced=counts.priced,
            unfit=counts.unfit,
            by_bound=counts.by_bound,
            by_memory=counts.by_memory,
            by_rule=counts.by_rule,
            needs=needs,
            without=without,
        )

    @property
    def enumerated(self) -> int:
        return self.priced + self.unfit + self.by_bound + self.by_memory + self.by_rule

    @property
    def gap(self) -> float:
        """How much faster an unpriced choice might be, as a share of the cost."""
        return max(0.0, 1.0 - self.best_bound_s / self.cost_s)

    def counted(self) -> tuple[tuple[int, str, str], ...]:
        """How choices were dealt with: how many, in a word or two, and what that means."""
        return (
            (self.priced, "priced", "cut into stages, and their seconds computed"),
            (self.by_bound, "too slow by their bounds", "whatever the cut, none takes less than the best"),
            (
                self.by_memory,
                "too large by their bounds",
                "whatever is recomputed, a rank would hold more than it may",
            ),
            (self.unfit, "too large when cut", "no cut into stages fits, whatever they recompute"),
            (
                self.by_rule,
                "no better by rule",
                "GPipe and breadth-first take as long as 1F1B and interleaved 1F1B, and hold no less",
            ),
        )

    def necessity(self) -> str:
        """Why savers were used, empty where they were not, or were asked for."""
        return f"nothing fits without {self.needs}: {self.without:,} plans were tried" if self.needs else ""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "enumerated": self.enumerated, "gap": self.gap}


def cluster_hash(cluster: Cluster) -> str:
    return hashlib.sha256(cluster.to_toml().encode()).hexdigest()[:16]
