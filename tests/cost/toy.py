"""A small model as a graph written by hand: embedding, residual layers of two linear modules, head, loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardstage.graph import ModelGraph, Op, Parameter, Ref, Value


def toy_graph(
    *,
    num_layers: int = 4,
    width: int = 8,
    hidden: int | Sequence[int] = 32,
    vocab: int = 64,
    is_tied: bool = False,
    microbatch: int = 31,
    sequence: int = 37,
) -> ModelGraph:
    """Four ops a layer: ``up``, ``relu``, ``down``, ``add``, between ``embed`` and ``head``, ``flat``, ``targets``, ``loss``.

    ``hidden`` may differ from layer to layer. ``relu`` keeps its output, ``add`` nothing, other ops their inputs.
    """
    widths = [hidden] * num_layers if isinstance(hidden, int) else list(hidden)
    return _Builder(microbatch, sequence).build(width, widths, vocab, is_tied=is_tied)


class _Builder:
    def __init__(self, microbatch: int, sequence: int) -> None:
        self.microbatch = microbatch
        self.sequence = sequence
        self.ops: list[Op] = []
        self.values: dict[str, Value] = {}
        self.parameters: list[Parameter] = []

    def build(self, width: int, widths: Sequence[int], vocab: int, *, is_tied: bool) -> ModelGraph:
        whole = (self.microbatch, self.sequence)
        ids, labels = self.batch_input("input_ids"), self.batch_input("labels")
        table = self.parameter("embed.weight", (vocab, width))
        x = self.op("embed", "aten.embedding.default", (table, ids), (*whole, width), "embed")
        for n, hidden in enumerate(widths):
            module = f"layers.{n}"
            up = self.parameter(f"{module}.up.weight", (hidden, width))
            down = self.parameter(f"{module}.down.weight", (width, hidden))
            h = self.op(f"up_{n}", "aten.linear.default", (x, up), (*whole, hidden), f"{module}.up")
            a = self.op(f"relu_{n}", "aten.relu.default", (h,), (*whole, hidden), module, saved="out")
            d = self.op(f"down_{n}", "aten.linear.default", (a, down), (*whole, width), f"{module}.down")
            x = self.op(f"add_{n}", "aten.add.Tensor", (x, d), (*whole, width), module, saved="")
        head = table if is_tied else self.parameter("head.weight", (vocab, width))
        logits = self.op("head", "aten.linear.default", (x, head), (*whole, vocab), "head")
        tokens = self.microbatch * self.sequence
        flat = self.op(
            "flat", "aten.view.default", (logits, (-1, vocab)), (tokens, vocab), "", alias_of=logits.name
        )
        targets = self.op("targets", "aten.view.default", (labels, (-1,)), (tokens,), "", alias_of="labels")
        self.op("loss", "aten.cross_entropy_loss.default", (flat, targets, None, 2), (), "", saved="in")
        return ModelGraph(
            ops=tuple(self.ops),
            values=self.values,
            inputs=("input_ids", "labels"),
            parameters=tuple(self.parameters),
            output="loss",
            microbatch=self.microbatch,
            sequence=self.sequence,
            is_scalable=True,
            is_sequence_scalable=True,
        )

    def batch_input(self, name: str) -> Ref:
        shape = (self.microbatch, self.sequence)
        self.values[name] = Value(name=name, shape=shape, dtype="int64", kind="input")
        return Ref(name)

    def parameter(self, fqn: str, shape: tuple[int, ...]) -> Ref:
        name = f"p_{fqn.replace('.', '_')}"
        self.values[name] = Value(
            name=name, shape=shape, dtype="float32", kind="parameter", requires_grad=True
        )
        self.parameters.append(Parameter(name=name, fqn=fqn))
        return Ref(name)

    def op(
        self,
        name: str,
        target: str,
        args: tuple[Any, ...],
        shape: tuple[int, ...],
        module: str,
        *,
        alias_of: str = "",
        saved: str = "in",
    ) -> Ref:
        requires_grad = any(isinstance(a, Ref) and self.values[a.name].requires_grad for a in args)
        dtype = "float32" if requires_grad else "int64"
        self.values[name] = Value(
            name=name,
            shape=shape,
            dtype=dtype,
            kind="activation",
            requires_grad=requires_grad,
            alias_of=alias_of,
        )
        inputs = tuple(a.name for a in args if isinstance(a, Ref))
        self.ops.append(
            Op(
                name=name,
                target=target,
                args=args,
                outputs=(name,),
                module=module,
                saved={"in": inputs, "out": (name,), "": ()}[saved],
            )
        )
        return Ref(name)
