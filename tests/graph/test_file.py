"""A graph survives its file, and its fingerprint names the computation, not its sizes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.graph.families import FAMILIES, source_of

import shardstage
from shardstage.errors import CaptureError
from shardstage.graph import ModelGraph, Op, Ref, Value
from shardstage.graph.capture import capture
from shardstage.graph.file import fingerprint, graph_from_json, graph_to_json

GraphOf = Callable[[str], ModelGraph]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_survives_its_file(family: str, graph_of: GraphOf) -> None:
    graph = graph_of(family)
    assert graph_from_json(graph_to_json(graph)) == graph


def test_all_kinds_of_literals_survive() -> None:
    literals = (None, True, 0, -1.5, math.inf, -math.inf, "tanh", (), (Ref("x"), (1, 2)), 2**63 - 1)
    graph = small_graph(*literals)
    read = graph_from_json(graph_to_json(graph))
    assert read == graph
    assert [type(item) for item in read.ops[0].args] == [type(item) for item in graph.ops[0].args]


def test_the_fingerprint_is_the_same_at_every_size(graph_of: GraphOf) -> None:
    graph = graph_of("gpt2-tiny")
    other = capture(source_of("gpt2-tiny"), sequence=300)
    assert graph.sequence != other.sequence
    expected = fingerprint(graph)
    assert fingerprint(graph.at(microbatch=3, sequence=24)) == fingerprint(other) == expected
    assert len(expected) == 12


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    program = """
from shardstage.graph import ModelGraph, Op, Ref, Value
from shardstage.graph.file import fingerprint
values = {n: Value(name=n, shape=(2,), dtype="float32", kind="input") for n in ("x", "y")}
op = Op(name="y", target="aten.gelu.default", args=(Ref("x"), 7, "tanh"), outputs=("y",))
print(fingerprint(ModelGraph(ops=(op,), values=values, inputs=("x",), parameters=(), output="y")))
import sys
assert "torch" not in sys.modules
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(shardstage.__file__).parents[1]),
        "PYTHONHASHSEED": "5",
    }
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert run.stdout.strip() == fingerprint(small_graph(Ref("x"), 7, "tanh"))


def test_the_fingerprint_tells_computations_apart(graph_of: GraphOf) -> None:
    graph = graph_of("gpt2-tiny")
    dropout = next(i for i, op in enumerate(graph.ops) if op.target == "aten.dropout.default")
    changed = replace(graph.ops[dropout], args=(graph.ops[dropout].args[0], 0.2, True))
    different = replace(graph, ops=(*graph.ops[:dropout], changed, *graph.ops[dropout + 1 :]))
    names = {fingerprint(graph), fingerprint(different), fingerprint(graph_of("bert-tiny"))}
    assert len(names) == 3


def test_the_fingerprint_does_not_see_lines_of_source() -> None:
    graph = small_graph(Ref("x"))
    moved = replace(graph, ops=(replace(graph.ops[0], source="elsewhere.py:1: y = f(x)"),))
    assert fingerprint(moved) == fingerprint(graph)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 1, "ops": [{"speed": 3}]}'])
def test_what_is_no_graph_is_refused(text: str) -> None:
    with pytest.raises(CaptureError, match="this is no graph file"):
        graph_from_json(text)


def test_a_file_of_another_version_is_refused() -> None:
    entries = {**json.loads(graph_to_json(small_graph(Ref("x")))), "version": 99}
    with pytest.raises(CaptureError, match="version 99, and this is the reader of version 1") as caught:
        graph_from_json(json.dumps(entries))
    assert caught.value.hint == "capture the model again"


def small_graph(*literals: object) -> ModelGraph:
    values = {n: Value(name=n, shape=(2,), dtype="float32", kind="input") for n in ("x", "y")}
    op = Op(name="y", target="aten.gelu.default", args=literals, outputs=("y",))
    return ModelGraph(ops=(op,), values=values, inputs=("x",), parameters=(), output="y")
