"""``resolve``, ``literal``: the callable of a graph's target and torch's form of its literals, for whoever runs a graph."""

from __future__ import annotations

from shardstage.graph.capture_targets import literal, resolve

__all__ = ["literal", "resolve"]
