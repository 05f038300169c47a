"""Which plan is fastest among those that fit, and why no other is.

Owns ``search`` and ``predict``, and the placement of operators. In go a ModelGraph and a Cluster, out come the best Plan with its
predicted step, a certificate that it is the best of the declared space, and what comes after it. It refuses to know how a plan runs; it
imports no torch.

    found = search(graph, cluster, num_ranks=512, global_batch=1024, sequence=8192)
    found.best, found.prediction, found.certificate, found.runners_up
    predict(graph, plan, cluster)               the price of any plan
    MixedSearcher(graph, cluster, …).best(…)    the best plan for several classes of devices (``planner.mixed``)
    cheapest_fit(graph, cluster, plan, limit_bytes=…)    what to change about one that needs too much memory

What plans for several classes of devices loads on first use: a search over one class need not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from shardstage.planner.best import best_in_whole_blocks, search
from shardstage.planner.certificate import Certificate
from shardstage.planner.fit import Fit, cheapest_fit
from shardstage.planner.modules import NamedModules, named_modules
from shardstage.planner.predict import predict
from shardstage.planner.pricing import is_in_parts
from shardstage.planner.savings import Saving, mixed_more_savers, more_savers
from shardstage.planner.search import Candidate, Searcher, SearchResult, usable_bytes
from shardstage.planner.told import Alternative, Point
from shardstage.planner.verify import Verification, verify_certificate
from shardstage.planner.why import alternatives, best_of_other_meshes, front

if TYPE_CHECKING:
    from shardstage.planner.mixed import ClassShare, MixedResult, MixedSearcher, class_peaks, predict_mixed
    from shardstage.planner.mixed.fit import cheapest_mixed_fit
    from shardstage.planner.mixed.front import mixed_front
    from shardstage.planner.mixed.modules import mixed_named_modules
    from shardstage.planner.mixed.unfit import nothing_fits
    from shardstage.planner.mixed.verify import verify_mixed
    from shardstage.planner.mixed.why import mixed_alternatives

__all__ = [
    "Alternative",
    "Candidate",
    "Certificate",
    "ClassShare",
    "Fit",
    "MixedResult",
    "MixedSearcher",
    "NamedModules",
    "Point",
    "Saving",
    "SearchResult",
    "Searcher",
    "Verification",
    "alternatives",
    "best_in_whole_blocks",
    "best_of_other_meshes",
    "cheapest_fit",
    "cheapest_mixed_fit",
    "class_peaks",
    "front",
    "is_in_parts",
    "mixed_alternatives",
    "mixed_front",
    "mixed_more_savers",
    "mixed_named_modules",
    "more_savers",
    "named_modules",
    "nothing_fits",
    "predict",
    "predict_mixed",
    "search",
    "usable_bytes",
    "verify_certificate",
    "verify_mixed",
]

_MIXED: Final = MappingProxyType(
    {
        "ClassShare": "shardstage.planner.mixed",
        "MixedResult": "shardstage.planner.mixed",
        "MixedSearcher": "shardstage.planner.mixed",
        "cheapest_mixed_fit": "shardstage.planner.mixed.fit",
        "class_peaks": "shardstage.planner.mixed",
        "mixed_alternatives": "shardstage.planner.mixed.why",
        "mixed_front": "shardstage.planner.mixed.front",
        "mixed_named_modules": "shardstage.planner.mixed.modules",
        "nothing_fits": "shardstage.planner.mixed.unfit",
        "predict_mixed": "shardstage.planner.mixed",
        "verify_mixed": "shardstage.planner.mixed.verify",
    }
)


def __getattr__(name: str) -> Any:
    if name not in _MIXED:
        raise AttributeError(f"module 'shardstage.planner' has no attribute {name!r}")
    return getattr(import_module(_MIXED[name]), name)
