"""Plans for clusters of several device classes: each class gets its share of the layers, or of the batch.

Owns the price of a plan whose pipelines lie on unlike devices, and the search for the best one. It refuses to know clusters of one class.

    found = MixedSearcher(graph, cluster, global_batch=256, sequence=4096, precision="bfloat16").best((40 * 10**9, 80 * 10**9))
    found.best, found.cluster, found.prediction, found.shares, found.certificate
    predict_mixed(graph, plan, cluster)         the price of any plan
"""

from shardstage.planner.mixed.lanes import class_peaks, predict_mixed
from shardstage.planner.mixed.search import MixedResult, MixedSearcher
from shardstage.planner.mixed.shares import ClassShare

__all__ = ["ClassShare", "MixedResult", "MixedSearcher", "class_peaks", "predict_mixed"]
