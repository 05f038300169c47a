"""``graph_to_json`` and back, and ``fingerprint``: a graph as text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from shardstage.errors import CaptureError
from shardstage.graph.model_graph import Constant, ModelGraph, Op, Parameter, Ref, Value

__all__ = ["fingerprint", "graph_from_json", "graph_to_json"]

_VERSION = 1


def graph_to_json(graph: ModelGraph) -> str:
    """The graph as JSON text, one op and one value a line; ``Ref``s are ``{"ref": name}``."""
    parts = [f'"version": {_VERSION}']
    for field in fields(graph):
        content = getattr(graph, field.name)
        if field.name == "values":
            content = tuple(content.values())
        parts.append(f'"{field.name}": {_lines(content)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def graph_from_json(text: str) -> ModelGraph:
    """The graph of ``graph_to_json``. Raises CaptureError where the text is no graph of this version."""
    try:
        entries = json.loads(text)
        version = entries.pop("version")
        if version != _VERSION:
            raise CaptureError(
                f"the graph file has version {version}, and this is the reader of version {_VERSION}",
                hint="capture the model again",
            )
        return ModelGraph(
            **{
                **{name: _decoded(content) for name, content in entries.items()},
                "ops": tuple(Op(**_members(op)) for op in entries["ops"]),
                "values": {value["name"]: Value(**_members(value)) for value in entries["values"]},
                "parameters": tuple(Parameter(**_members(item)) for item in entries["parameters"]),
                "buffers": tuple(Parameter(**_members(item)) for item in entries["buffers"]),
                "constants": tuple(Constant(**_members(item)) for item in entries["constants"]),
            }
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CaptureError(f"this is no graph file: {error}", hint="capture the model again") from error


def fingerprint(graph: ModelGraph) -> str:
    """Twelve hex digits that name the computation: equal across machines, captures, dtypes of a run and sizes of a batch.

    It covers the ops, how they are connected, their literals but for integers (sizes among them), and every parameter with its
    name, shape and ties. It leaves out the lines of source.
    """
    digest = hashlib.sha256()
    for line in _identity(graph):
        digest.update(line.encode())
        digest.update(b"\n")
    return digest.hexdigest()[:12]


def _identity(graph: ModelGraph) -> Iterator[str]:
    numbers: dict[str, int] = {}
    for name in graph.inputs:
        numbers[name] = len(numbers)
        yield f"input {name}"
    for item in (*graph.parameters, *graph.buffers):
        numbers[item.name] = len(numbers)
        yield f"{item.fqn} {item.ties} {graph.values[item.name].shape}"
    for constant in graph.constants:
        numbers[constant.name] = len(numbers)
        yield f"constant {constant.elements}"
    for op in graph.ops:
        for output in op.outputs:
            if output is not None:
                numbers[output] = len(numbers)
        yield f"{op.target} {_without_sizes((op.args, op.kwargs), numbers)}"
    yield f"output {numbers.get(graph.output)}"


def _without_sizes(argument: Any, numbers: dict[str, int]) -> str:
    if isinstance(argument, Ref):
        return f"%{numbers[argument.name]}"
    if isinstance(argument, tuple | list):
        return f"({','.join(_without_sizes(item, numbers) for item in argument)})"
    if isinstance(argument, int) and not isinstance(argument, bool):
        return "n"
    return repr(argument)


def _lines(content: Any) -> str:
    if isinstance(content, tuple) and content and hasattr(content[0], "__dataclass_fields__"):
        return "[\n  " + ",\n  ".join(json.dumps(_encoded_members(item)) for item in content) + "\n]"
    return json.dumps(_encoded(content))


def _encoded_members(item: Any) -> dict[str, Any]:
    """Members that differ from their defaults."""
    return {
        field.name: _encoded(getattr(item, field.name))
        for field in fields(item)
        if getattr(item, field.name) != field.default
    }


def _encoded(argument: Any) -> Any:
    if isinstance(argument, Ref):
        return {"ref": argument.name}
    return [_encoded(item) for item in argument] if isinstance(argument, tuple | list) else argument


def _members(entries: dict[str, Any]) -> dict[str, Any]:
    return {name: _decoded(content) for name, content in entries.items()}


def _decoded(content: Any) -> Any:
    if isinstance(content, dict) and set(content) == {"ref"}:
        return Ref(content["ref"])
    return tuple(_decoded(item) for item in content) if isinstance(content, list) else content
