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
    reader = _Reader(prefix, taken=set(names.values()))
    placeholders = {n: Ref(names[n.name]) for n in graph_module.graph.nodes if n.op == "placeholder"}
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

    def __init__(self, prefix: str, taken: set[str]) -> None:
        self.ops: list[TracedOp] = []
        self._prefix = prefix
        self._taken = taken
        self._inputs = frozenset(taken)

    def read(
        self, module: fx.GraphModule, given: Mapping[fx.Node, Any], *, is_without_grad: bool
    ) -> Sequence[Any]:
        """What the graph returns."""
        env: dict[fx.Node, Any] = dict(given)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                returned = _lookup(node.args[0], env)
                return returned if isinstance(returned, tuple) else (returned,)
            if node.op == "get_attr":
                env[node] = getattr(module, node.target)
            else:
                env[node] = self._call(node, env, is_without_grad=is_without_grad)
        raise AssertionError("a graph without output")

    def _call(self, node: fx.Node, env: dict[fx.Node, Any], *, is_without_grad: bool) -> Any:
        args, kwargs = _lookup(node.args, env), {key: _lookup(v, env) for key, v in node.kwargs.items()}
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
        return self._add(node, target, args, kwargs, env, is_without_grad=is_without_grad)

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
        self,
        node: fx.Node,
        target: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        env: dict[fx.Node, Any],
        *,
        is_without_grad: bool,
    ) -> Any:
        written = self._written(node, args)
        if written is not None:
            target = _functional(target)
        name = self._fresh(node.name)
        value = node.meta.get("val")
        is_sequence = isinstance(value, tuple | list)
        outputs = (
            (name,) if value is None or not is_sequence else tuple(f"{name}.{i}" for i in range(len(value)))
        )
        module, module_type = self._module(node)
        op = Op(
            name=name,
            target=target,
            args=_plain_arguments(args, node),
            kwargs=tuple((key, _plain_argument(item, node)) for key, item in kwargs.items()),
            outputs=outputs,
            returns_sequence=is_sequence,
            module=module,
            module_type=module_type,
            source=source_of(node),
        )
        if is_sequence or isinstance(value, Tensor):
            self.ops.append(TracedOp(op=op, is_without_grad=is_without_grad))
        result = tuple(Ref(output) for output in outputs) if is_sequence else Ref(name)
        if written is not None:
            for earlier, reference in env.items():
                if reference == written:
                    env[earlier] = result
        return result

    def _written(self, node: fx.Node, args: tuple[Any, ...]) -> Ref | None:
        """The value that an op such as ``relu_`` overwrites, if it is one of the graph's own; buffers are really written to."""
        is_in_place = is_mutating(str(node.target)) and args and isinstance(args[0], Ref)
        if not is_in_place or args[0].name in self._inputs:
            return None
        written: Ref = args[0]
        return written

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


def _functional(target: str) -> str:
    """``aten.relu.default`` for ``aten.relu_.default``, ``aten.__and__.Tensor`` for ``aten.__iand__.Tensor``."""
    namespace, name, overload = target.split(".")
    plain_name = name.replace("__i", "__", 1) if name.startswith("__") else name.removesuffix("_")
    functional = f"{namespace}.{plain_name}.{overload}"
    resolve(functional)
    return functional


def _lookup(argument: Any, env: Mapping[fx.Node, Any]) -> Any:
    if isinstance(argument, fx.Node):
        return env[argument]
    if isinstance(argument, tuple | list):
        return tuple(_lookup(item, env) for item in argument)
    return argument


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
