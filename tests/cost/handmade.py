"""A graph written op by op, each with the sizes that a test reads off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardstage.graph import ModelGraph, Op, Parameter, Ref, Value


class Sketch:
    """Values and ops in order; ``microbatch`` is the first size of what scales with it."""

    def __init__(self, microbatch: int = 2) -> None:
        self.microbatch = microbatch
        self.ops: list[Op] = []
        self.values: dict[str, Value] = {}

    def value(self, name: str, *shape: int, kind: Any = "activation", **fields: Any) -> Ref:
        fields = {"dtype": "float16", "requires_grad": True, **fields}
        self.values[name] = Value(name=name, shape=shape, kind=kind, **fields)
        return Ref(name)

    def parameter(self, name: str, *shape: int) -> Ref:
        return self.value(name, *shape, kind="parameter")

    def op(
        self,
        name: str,
        family: str,
        args: Sequence[Any],
        *shape: int,
        saved: Sequence[str] = (),
        **fields: Any,
    ) -> Ref:
        """An op with one output, which is called as the op is."""
        self.value(name, *shape, **fields)
        self.ops.append(
            Op(
                name=name,
                target=f"aten.{family}.default",
                args=tuple(args),
                outputs=(name,),
                saved=tuple(saved),
            )
        )
        return Ref(name)

    def graph(self) -> ModelGraph:
        values = self.values
        return ModelGraph(
            ops=tuple(self.ops),
            values=values,
            inputs=tuple(n for n, v in values.items() if v.kind == "input"),
            parameters=tuple(Parameter(name=n, fqn=n) for n, v in values.items() if v.kind == "parameter"),
            output=self.ops[-1].name,
            microbatch=self.microbatch,
        )
