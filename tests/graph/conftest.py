"""What the tests of graphs share: each family is captured once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from tests.graph.families import source_of

from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture


@pytest.fixture(scope="session")
def graph_of() -> Callable[[str], ModelGraph]:
    """The graph of a family at marker sizes."""
    return cache(lambda family: capture(source_of(family)))
