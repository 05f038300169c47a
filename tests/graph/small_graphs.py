"""Graphs of a few ops, written by hand or drawn at random, and an interpreter that needs no tensors."""

from __future__ import annotations

import random
from collections.abc import Iterable, MutableMapping
from dataclasses import replace
from typing import Any

from shardstage.graph import ModelGraph, Op, Parameter, Ref, Value, substitute


def value(name: str, shape: tuple[int, ...] = (2, 3), **fields: Any) -> Value:
    return Value(**{"name": name, "shape": shape, "dtype": "float32", "kind": "activation", **fields})


def call(name: str, target: str, *args: Any, module: str = "", **fields: Any) -> Op:
    """An op with one output of its own name; strings among the arguments are values."""
    refs = tuple(Ref(argument) if isinstance(argument, str) else argument for argument in args)
    return Op(
        **{"name": name, "target": target, "args": refs, "outputs": (name,), "module": module, **fields}
    )


def graph(ops: Iterable[Op], values: Iterable[Value], *, output: str) -> ModelGraph:
    """Inputs, parameters and buffers are those of the values of that kind."""
    known = {v.name: v for v in values}
    named = {kind: [name for name, v in known.items() if v.kind == kind] for kind in ("parameter", "buffer")}
    return ModelGraph(
        ops=tuple(ops),
        values=known,
        inputs=tuple(name for name, v in known.items() if v.kind == "input"),
        parameters=tuple(Parameter(name=name, fqn=f"net.{name}") for name in named["parameter"]),
        buffers=tuple(Parameter(name=name, fqn=f"net.{name}") for name in named["buffer"]),
        output=output,
    )


def random_graph(seed: int, *, num_ops: int = 14) -> ModelGraph:
    """Ops that read what comes before them at random: inputs, weights, cheap values, activations, now and then two outputs."""
    draw = random.Random(seed)
    values = [
        value("ids", kind="input", dtype="int64"),
        value("table", kind="buffer"),
        *(value(f"w{i}", kind="parameter", requires_grad=True) for i in range(3)),
    ]
    ops: list[Op] = []
    for number in range(num_ops):
        known = [v.name for v in values]
        read = draw.sample(known, k=min(len(known), draw.choice((1, 2, 2, 3))))
        if number == num_ops - 1:
            read = list(dict.fromkeys(["w0", *read]))
        needs_grad = any(v.requires_grad for v in values if v.name in read)
        target = draw.choice(
            ("aten.add.Tensor", "aten.mul.Tensor", "shardstage.all_reduce", "aten.rand.default")
        )
        name = f"op{number}" if draw.random() < 0.7 else f"op{number}@reduce"
        outputs = (name,) if draw.random() < 0.8 else (f"{name}_0", f"{name}_1")
        values += [value(out, (2, draw.randint(1, 9)), requires_grad=needs_grad) for out in outputs]
        op = call(name, target, *read)
        ops.append(replace(op, outputs=outputs, returns_sequence=len(outputs) > 1))
    last = next(name for name in ops[-1].outputs if name is not None)
    return graph(ops, values, output=last)


class Interpreter:
    """Runs ops on terms that say how a value was made, in place of tensors; equal terms have equal numbers.

    A random op draws anew each time that it runs, in a sequence that ``num_draws`` resets.
    """

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self.num_draws = 0

    def run(self, ops: Iterable[Op], known: MutableMapping[str, int]) -> None:
        """Adds to ``known`` what each op makes."""
        for op in ops:
            made = (op.target, *substitute((op.args, op.kwargs), lambda ref: ("value", known[ref.name])))
            if ".rand" in op.target:
                self.num_draws += 1
                made = (*made, self.num_draws)
            for index, name in enumerate(op.outputs):
                if name is not None:
                    known[name] = self.number((*made, index))

    def number(self, term: Any) -> int:
        return self._numbers.setdefault(term, len(self._numbers))
