"""A small model as a graph written by hand: embedding, residual layers of two linear modules, head, loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardstage.graph import ModelGraph, Op, Parameter, Ref, Value, refs_in


def toy_graph(
    *,
    num_layers: int = 4,
    width: int = 8,
    hidden: int | Sequence[int] = 32,
    vocab: int = 64,
    is_tied: bool = False,
    microbatch: int = 31,
    sequence: int = 37,
    experts: Experts | None = None,
) -> ModelGraph:
    """Four ops a layer: ``up``, ``relu``, ``down``, ``add``, between ``embed`` and ``head``, ``flat``, ``targets``, ``loss``.

    ``hidden`` may differ from layer to layer. ``relu`` keeps its output, ``add`` nothing, other ops their inputs. With ``experts`` a
    layer of them follows in each layer.
    """
    widths = [hidden] * num_layers if isinstance(hidden, int) else list(hidden)
    return _Builder(microbatch, sequence).build(width, widths, vocab, is_tied=is_tied, experts=experts)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """``number`` experts of ``hidden`` features, of which each token meets ``chosen``; a shared one of as many features beside them."""

    number: int
    hidden: int
    chosen: int = 2
    has_shared: bool = False


class _Builder:
    def __init__(self, microbatch: int, sequence: int) -> None:
        self.microbatch = microbatch
        self.sequence = sequence
        self.ops: list[Op] = []
        self.values: dict[str, Value] = {}
        self.parameters: list[Parameter] = []

    def build(
        self,
        width: int,
        widths: Sequence[int],
        vocab: int,
        *,
        is_tied: bool,
        experts: Experts | None = None,
    ) -> ModelGraph:
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
            if experts is not None:
                x = self.expert_layer(x, n, width, experts)
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

    def expert_layer(self, x: Ref, n: int, width: int, experts: Experts) -> Ref:
        """Tokens are sorted by expert, multiplied with the matrices of theirs, weighted, and summed."""
        whole, module = (self.microbatch, self.sequence), f"layers.{n}.moe"
        num_experts, k, hidden = experts.number, experts.chosen, experts.hidden
        tokens = self.microbatch * self.sequence
        routed = tokens * k
        gate = self.parameter(f"{module}.gate.weight", (num_experts, width))
        first = self.parameter(f"{module}.up", (num_experts, width, hidden))
        second = self.parameter(f"{module}.down", (num_experts, hidden, width))
        t = self.op(
            f"tokens_{n}", "aten.view.default", (x, (-1, width)), (tokens, width), module, alias_of=x.name
        )
        scores = self.op(f"gate_{n}", "aten.linear.default", (t, gate), (tokens, num_experts), module)
        ratios = self.op(
            f"softmax_{n}", "aten.softmax.int", (scores, -1), (tokens, num_experts), module, saved="out"
        )
        top = self.op(f"top_{n}", "aten.amax.default", (ratios, (-1,), True), (tokens, 1), module)
        which = self.op(
            f"which_{n}", "aten.argsort.default", (ratios, -1), (tokens, k), module, dtype="int64"
        )
        flat = self.op(
            f"flat_{n}",
            "aten.view.default",
            (which, (-1,)),
            (routed,),
            module,
            dtype="int64",
            alias_of=which.name,
        )
        order = self.op(f"order_{n}", "aten.argsort.default", (flat,), (routed,), module, dtype="int64")
        place = self.op(
            f"place_{n}", "aten.floor_divide.default", (order, k), (routed,), module, dtype="int64"
        )
        rows = self.op(f"rows_{n}", "aten.index.Tensor", (t, (place,)), (routed, width), module)
        ends = self.op(
            f"ends_{n}", "aten.histc.default", (flat, num_experts), (num_experts,), module, dtype="int32"
        )
        h = self.op(
            f"expert_up_{n}", "aten._grouped_mm.default", (rows, first, ends), (routed, hidden), module
        )
        a = self.op(f"expert_relu_{n}", "aten.relu.default", (h,), (routed, hidden), module, saved="out")
        d = self.op(
            f"expert_down_{n}", "aten._grouped_mm.default", (a, second, ends), (routed, width), module
        )
        each = self.op(
            f"each_{n}", "aten.view.default", (d, (-1, k, width)), (tokens, k, width), module, alias_of=d.name
        )
        y = self.op(f"sum_{n}", "aten.sum.dim_IntList", (each, (1,)), (tokens, width), module, saved="")
        y = self.op(f"weighted_{n}", "aten.mul.Tensor", (y, top), (tokens, width), module)
        y = self.op(
            f"result_{n}",
            "aten.view.default",
            (y, (self.microbatch, self.sequence, width)),
            (*whole, width),
            module,
            alias_of=y.name,
        )
        if experts.has_shared:
            up = self.parameter(f"{module}.shared.up.weight", (hidden, width))
            down = self.parameter(f"{module}.shared.down.weight", (width, hidden))
            h = self.op(f"shared_up_{n}", "aten.linear.default", (x, up), (*whole, hidden), module)
            s = self.op(f"shared_down_{n}", "aten.linear.default", (h, down), (*whole, width), module)
            y = self.op(f"shared_add_{n}", "aten.add.Tensor", (y, s), (*whole, width), module, saved="")
        return self.op(f"moe_add_{n}", "aten.add.Tensor", (x, y), (*whole, width), module, saved="")

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
        dtype: str = "",
    ) -> Ref:
        inputs = tuple(ref.name for ref in refs_in(args))
        requires_grad = not dtype and any(self.values[name].requires_grad for name in inputs)
        dtype = dtype or ("float32" if requires_grad else "int64")
        self.values[name] = Value(
            name=name,
            shape=shape,
            dtype=dtype,
            kind="activation",
            requires_grad=requires_grad,
            alias_of=alias_of,
        )
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
