"""Which plan is fastest among those that fit.

Owns ``search`` and ``predict``. In go a ModelGraph and a Cluster, out come the best Plan with its predicted step, and every candidate with
its price or the reason why it was rejected. It refuses to know how a plan runs; it imports no torch.

    found = search(graph, cluster, num_ranks=512, global_batch=1024, sequence=8192)
    found.best, found.prediction, found.considered
    predict(graph, plan, cluster)               the price of any plan
    cheapest_fit(graph, cluster, plan, limit_bytes=…)    what to change about one that needs too much memory
"""

from shardstage.planner.fit import Fit, cheapest_fit
from shardstage.planner.predict import predict
from shardstage.planner.search import Candidate, SearchResult, search, usable_bytes

__all__ = ["Candidate", "Fit", "SearchResult", "cheapest_fit", "predict", "search", "usable_bytes"]
