"""Shardstage makes one PyTorch model run as one program on many devices.

    model + cluster → plan → rehearse → run → prove → checkpoint / reshard → generate / serve

    source  = load_model("llama-tiny")                           what to train
    graph   = capture(source, sequence=128)                      what is computed            ModelGraph
    plan    = complete(parse_request("dp=2,tp=2"), graph, …)     who does what               Plan
    program = lower(graph, plan)                                 every rank's ordered acts   Program
    engine  = build_engine(graph, plan, source, rank=…, …)       one rank of the real thing  Engine

The names below load on first use, so that ``import shardstage`` stays fast and free of torch.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import Any, Final

__version__ = "0.1.0"

_HOME_OF: Final = MappingProxyType(
    {
        "Cluster": "shardstage.cluster",
        "Engine": "shardstage.runtime.engine",
        "ModelGraph": "shardstage.graph",
        "ModelSource": "shardstage.graph.source",
        "OptimizerConfig": "shardstage.runtime.optimizer",
        "Plan": "shardstage.plan",
        "Program": "shardstage.program",
        "RunConfig": "shardstage.training",
        "ShardstageError": "shardstage.errors",
        "build_engine": "shardstage.runtime.build",
        "capture": "shardstage.graph.capture",
        "check": "shardstage.plan",
        "complete": "shardstage.plan",
        "explain": "shardstage.plan",
        "launch": "shardstage.runtime.launch",
        "load_model": "shardstage.graph.source",
        "load_plan": "shardstage.plan",
        "lower": "shardstage.program",
        "parse_request": "shardstage.plan",
        "predict": "shardstage.planner",
        "save_plan": "shardstage.plan",
        "search": "shardstage.planner",
        "verify": "shardstage.program",
    }
)

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'shardstage' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
