"""Shardstage makes one PyTorch model run as one program on many devices.

    model + cluster → plan → rehearse → run → prove → checkpoint / reshard → generate / serve

The names below load on first use, so that ``import shardstage`` stays fast and free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME_OF: dict[str, str] = {
    "Cluster": "shardstage.cluster",
    "ShardstageError": "shardstage.errors",
}

__all__ = ["Cluster", "ShardstageError", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'shardstage' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
