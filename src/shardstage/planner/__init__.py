"""Which plan is fastest among those that fit, and why no other is.

Owns ``search`` and ``predict``, and the placement of operators. In go a ModelGraph and a Cluster, out come the best Plan with its
predicted step, a certificate that it is the best of the declared space, and what comes after it. It refuses to know how a plan runs; it
imports no torch.

    found = search(graph, cluster, num_ranks=512, global_batch=1024, sequence=8192)
    found.best, found.prediction, found.certificate, found.runners_up
    predict(graph, plan, cluster)               the price of any plan
    MixedSearcher(graph, cluster, …).best(…)    the best plan for several classes of devices (``planner.mixed``)
    cheapest_fit(graph, cluster, plan, limit_bytes=…)    what to change about one that needs too much memory
"""

from shardstage.planner.certificate import Certificate
from shardstage.planner.fit import Fit, cheapest_fit
from shardstage.planner.mixed import (
    ClassShare,
    MixedResult,
    MixedSearcher,
    class_peaks,
    predict_mixed,
)
from shardstage.planner.mixed.verify import verify_mixed
from shardstage.planner.modules import NamedModules, named_modules
from shardstage.planner.predict import predict
from shardstage.planner.search import Candidate, Searcher, SearchResult, search, usable_bytes
from shardstage.planner.verify import Verification, verify_certificate
from shardstage.planner.why import Alternative, Point, alternatives, front

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
    "SearchResult",
    "Searcher",
    "Verification",
    "alternatives",
    "cheapest_fit",
    "class_peaks",
    "front",
    "named_modules",
    "predict",
    "predict_mixed",
    "search",
    "usable_bytes",
    "verify_certificate",
    "verify_mixed",
]
