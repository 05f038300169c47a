"""The price of an op, a collective, a stage and a step on a cluster.

Owns the folding of repeated blocks, the prices of compute, collectives and memory, and the model of a step's time. In go a ModelGraph and
a Cluster, out come seconds and bytes. It refuses to know plans: ``StepSetup`` holds the few numbers of one that a price depends on.
"""

from shardstage.cost.balance import balanced
from shardstage.cost.execution import OURS, Execution
from shardstage.cost.fold import Folded, Unit, by_op, fold
from shardstage.cost.links import Links
from shardstage.cost.memory import MemoryModel, MemoryUse, rank_memory, stage_memory
from shardstage.cost.profile import Profile, Profiler, UnitCost, profile
from shardstage.cost.setup import StepSetup
from shardstage.cost.step import (
    Prediction,
    StagePrediction,
    least_step_s,
    predict_step,
    stage_times,
    step_seconds,
)

__all__ = [
    "OURS",
    "Execution",
    "Folded",
    "Links",
    "MemoryModel",
    "MemoryUse",
    "Prediction",
    "Profile",
    "Profiler",
    "StagePrediction",
    "StepSetup",
    "Unit",
    "UnitCost",
    "balanced",
    "by_op",
    "fold",
    "least_step_s",
    "predict_step",
    "profile",
    "rank_memory",
    "stage_memory",
    "stage_times",
    "step_seconds",
]
