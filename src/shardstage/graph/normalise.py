"""``normalise``: an exported program as plain ops, in order, without the tracer's own.

wrap_with_set_grad_enabled(False, …)   its ops, marked as made without gradients
wrap_with_autocast(enabled=False)      its ops
getitem(split, 1)                      output 1 of split
relu_(x), add_(x, y)                   relu(x), add(x, y): later readers of x read the result
lift_fresh_copy(constant)              the constant
_assert_tensor_metadata, dead ops      gone
"""

from __future__ import annotations

import operator
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from shardstage.errors import CaptureError
from shardstage.graph.capture_targets import plain, resolve
from shardstage.graph.capture_writes import Storages
from shardstage.graph.model_graph import Op, Ref

__all__ = [
    "TracedOp",
    "is_mutating",
    "is_of_the_model",
    "normalise",
    "remove_dead",
    "short_path",
    "source_of",
]

# The same value under another name: what the tracer writes around a constant.
_LIFTS = frozenset({"aten.lift_fresh_copy.default", "aten.lift_fresh.default"})
_INLINED = frozenset(
    {"wrap_with_set_grad_enabled", "wrap_with_autocast", "tag_activation_checkpoint", "wrap"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedOp:
    """An op and whether the model made it under ``torch.no_grad()``."""

    op: Op
    is_without_grad: bool


def normalise(
    graph_module: fx.GraphModule, names: Mapping[str, str], prefix: str
) -> tuple[list[TracedOp], str]:
    """Ops of the traced graph in order, and the name of the value that it returns.

    ``names`` gives the value that each placeholder stands for; ``prefix`` is the model's own path within what was traced.
    Raises CaptureError for what cannot be one flat list of operators, with the model's line.
    """
    nodes = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    placeholders = {node: Ref(names[node.name]) for node in nodes}
    reader = _Reader(
        prefix, taken=set(names.values()), storages=Storages({n.name: n.meta["val"] for n in nodes})
    )
    (output,) = reader.read(graph_module, placeholders, is_without_grad=False)
    if not isinstance(output, Ref):
        raise CaptureError(
            "the loss does not depend on the model", hint="return a tensor from the task's loss"
        )
    return remove_dead(reader.ops, output.name), output.name


def remove_dead(ops: Sequence[TracedOp], output: str) -> list[TracedOp]:
    """The ops that the output needs, and those that write to what outlives the step."""
    live = {output}
    kept = []
    for traced in reversed(ops):
        op = traced.op
        if not live.isdisjoint(op.outputs) or is_mutating(op.target):
            used = tuple(name if name in live else None for name in op.outputs)
            kept.append(replace(traced, op=replace(op, outputs=used) if op.returns_sequence else op))
            live.update(op.inputs)
    return kept[::-1]


@cache
def is_mutating(target: str) -> bool:
    return bool(_schema(resolve(target)).is_mutable)


class _Reader:
    """Reads nodes into ops; submodules are read in place."""

    def __init__(self, prefix: str, taken: set[str], storages: Storages) -> None:
        self.ops: list[TracedOp] = []
        self._prefix = prefix
        self._taken = taken
        self._storages = storages
        self._present: dict[str, str] = {}  # of a value that was written to: the one that holds its content

    def read(
        self, module: fx.GraphModule, given: Mapping[fx.Node, Any], *, is_without_grad: bool
    ) -> Sequence[Any]:
        """What the graph returns."""
        env: dict[fx.Node, Any] = dict(given)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                returned = self._lookup(node.args[0], env)
                return returned if isinstance(returned, tuple) else (returned,)
            if node.op == "get_attr":
                env[node] = getattr(module, node.target)
            else:
                env[node] = self._call(node, env, is_without_grad=is_without_grad)
        raise AssertionError("a graph without output")

    def _call(self, node: fx.Node, env: dict[fx.Node, Any], *, is_without_grad: bool) -> Any:
        args = self._lookup(node.args, env)
        kwargs = {key: self._lookup(item, env) for key, item in node.kwargs.items()}
        if node.target is operator.getitem:
            return args[0][args[1]]
        target = str(node.target)
        if target in _INLINED:
            return self._inline(node, target, args, is_without_grad=is_without_grad)
        if not _is_operator(node.target):
            raise CaptureError(
                f"the model's control flow cannot be one list of operators ({target})\n  at {source_of(node)}",
                hint="capture falls back to whole modules: capture_or_blocks(...)",
            )
        if target in _LIFTS:
            return args[0]
        return self._add(node, args, kwargs, is_without_grad=is_without_grad)

    def _inline(self, node: fx.Node, target: str, args: tuple[Any, ...], *, is_without_grad: bool) -> Any:
        position = next(i for i, item in enumerate(args) if isinstance(item, fx.GraphModule))
        options, inner, inputs = args[:position], args[position], args[position + 1 :]
        if target == "wrap_with_autocast" and options[2]:
            raise CaptureError(
                f"the model switches autocast on by itself\n  at {source_of(node)}",
                hint='leave the dtype to the run: precision = "bfloat16"',
            )
        without = not options[0] if target == "wrap_with_set_grad_enabled" else is_without_grad
        placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
        given = dict(zip(placeholders, inputs, strict=True))
        return tuple(self.read(inner, given, is_without_grad=without))

    def _add(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_without_grad: bool
    ) -> Any:
        """Adds the node's op; returns what later nodes read."""
        name, value = self._fresh(node.name), node.meta.get("val")
        values = tuple(value) if isinstance(value, tuple | list) else (value,)
        is_sequence = isinstance(value, tuple | list)
        outputs = tuple(f"{name}.{i}" for i in range(len(values))) if is_sequence else (name,)
        module, module_type = self._module(node)
        op = Op(
            name=name,
            target=str(node.target),
            args=_plain_arguments(args, node),
            kwargs=tuple((key, _plain_argument(item, node)) for key, item in kwargs.items()),
            outputs=outputs,
            returns_sequence=is_sequence,
            module=module,
            module_type=module_type,
            source=source_of(node),
        )
        if is_mutating(op.target) and isinstance(value, Tensor) and args and isinstance(args[0], Ref):
            return self._write(op, args[0], value, is_without_grad=is_without_grad)
        if any(isinstance(item, Tensor) for item in values):
            self.ops.append(TracedOp(op=op, is_without_grad=is_without_grad))
        for index, (output, item) in enumerate(zip(outputs, values, strict=True)):
            if isinstance(item, Tensor):
                self._storages.note(output, item, op, index)
        return tuple(Ref(output) for output in outputs) if is_sequence else Ref(name)

    def _write(self, op: Op, written: Ref, value: Tensor, *, is_without_grad: bool) -> Ref:
        """Adds an op such as ``relu_``: as it is where it changes a buffer, else as one that makes a new value."""

        def emit(further: Op) -> str:
            name = self._fresh(further.name)
            outputs = tuple(output and name for output in further.outputs)
            renamed = replace(further, name=name, outputs=outputs)
            self.ops.append(TracedOp(op=renamed, is_without_grad=is_without_grad))
            return name

        if self._storages.outlives_the_graph(value):
            self.ops.append(TracedOp(op=op, is_without_grad=is_without_grad))
            return written
        for made in _functional(op, value):
            self.ops.append(TracedOp(op=made, is_without_grad=is_without_grad))
        self._present.update(self._storages.write(written.name, value, op.name, emit))
        return written

    def _lookup(self, argument: Any, env: Mapping[fx.Node, Any]) -> Any:
        if isinstance(argument, fx.Node):
            return self._now(env[argument])
        if isinstance(argument, tuple | list):
            return tuple(self._lookup(item, env) for item in argument)
        return argument

    def _now(self, found: Any) -> Any:
        """References to what was written to, as references to what it became."""
        if isinstance(found, tuple):
            return tuple(self._now(item) for item in found)
        while isinstance(found, Ref) and found.name in self._present:
            found = Ref(self._present[found.name])
        return found

    def _fresh(self, name: str) -> str:
        fresh, number = name, 1
        while fresh in self._taken:
            fresh, number = f"{name}_{number}", number + 1
        self._taken.add(fresh)
        return fresh

    def _module(self, node: fx.Node) -> tuple[str, str]:
        """Path within the model and class name of the innermost module that made the node; the task's own ops have neither."""
        stack = node.meta.get("nn_module_stack") or {}
        if len(stack) < 2:
            return "", ""
        path, kind = list(stack.values())[-1]
        inner = path.split("@")[0].removeprefix(self._prefix).removeprefix(".")
        return inner, (kind if isinstance(kind, str) else kind.__name__).rsplit(".", 1)[-1]


def source_of(node: fx.Node) -> str:
    """``file:line: code`` of the innermost line that is neither torch's nor this package's; empty where there is none."""
    return _source(node.meta.get("stack_trace") or "")


@cache
def _source(trace: str) -> str:
    lines = trace.splitlines()
    frames = [i for i, line in enumerate(lines) if line.lstrip().startswith('File "')]
    for i in reversed(frames):
        _, file, rest = lines[i].split('"', 2)
        if is_of_the_model(file):
            number = rest.split("line ")[1].split(",")[0]
            code = lines[i + 1].strip() if i + 1 < len(lines) else ""
            return f"{short_path(file)}:{number}: {code}"
    return ""


def is_of_the_model(file: str) -> bool:
    """Whether a line of code is neither torch's nor this package's."""
    return not file.startswith(_NOT_THE_MODEL)


def short_path(file: str) -> str:
    """The path as an import would name it, or relative to where the user stands."""
    for root in (*_PACKAGE_ROOTS, str(Path.cwd())):
        if file.startswith(root + "/"):
            return file[len(root) + 1 :]
    return file


_NOT_THE_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_PACKAGE_ROOTS = tuple(dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))))


def _is_operator(target: Any) -> bool:
    return hasattr(target, "_schema")


def _schema(function: Any) -> Any:
    return function._schema


def _functional(op: Op, written: Tensor) -> tuple[Op, ...]:
    """``relu`` for ``relu_``, ``__and__`` for ``__iand__``; for ``copy_`` and ``zero_``, whose like autograd does not know, others."""
    namespace, name, overload = op.target.split(".")
    if name == "copy_":
        cast, spread = f"{op.name}.cast", f"{op.name}.spread"
        dtype = str(written.dtype).removeprefix("torch.")
        return (
            replace(op, name=cast, target="aten.to.dtype", args=(op.args[1], dtype), outputs=(cast,)),
            replace(
                op,
                name=spread,
                target="aten.expand.default",
                args=(Ref(cast), tuple(written.shape)),
                outputs=(spread,),
            ),
            replace(op, target="aten.clone.default", args=(Ref(spread),)),
        )
    if name == "zero_":
        return (replace(op, target="aten.zeros_like.default"),)
    plain_name = name.replace("__i", "__", 1) if name.startswith("__") else name.removesuffix("_")
    functional = f"{namespace}.{plain_name}.{overload}"
    resolve(functional)
    return (replace(op, target=functional),)


def _plain_arguments(arguments: Iterable[Any], node: fx.Node) -> tuple[Any, ...]:
    return tuple(_plain_argument(item, node) for item in arguments)


def _plain_argument(argument: Any, node: fx.Node) -> Any:
    if isinstance(argument, Ref):
        return argument
    if isinstance(argument, tuple):
        return _plain_arguments(argument, node)
    try:
        return plain(argument)
    except CaptureError as error:
        raise CaptureError(f"{error.message}\n  at {source_of(node)}", hint=error.hint) from error
