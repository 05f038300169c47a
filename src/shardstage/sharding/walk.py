"""Chooses a placement for every value: one walk over the ops that goes back where a cut proves too fine."""

from __future__ import annotations

from dataclasses import replace

from shardstage.graph import ModelGraph, Op, Ref
from shardstage.layout import Partial, Placement
from shardstage.sharding.batch import values_of_batch
from shardstage.sharding.call import Call, Rule
from shardstage.sharding.cuts import Cuts
from shardstage.sharding.rules import RULES
from shardstage.sharding.state import PARTIAL, SUMMED, WHOLE, Blocked, Origin, Placing, Reconsider, State

__all__ = ["Free", "Walk"]

Free = tuple[str, tuple[int, ...]]
"""A parameter, and its dim for each dim of a value that is a transpose of it."""

_TRANSPOSES = ("aten.t.default", "aten.transpose.int", "aten.permute.default")
_COPIES = ("aten.to.dtype", "aten.detach.default", "aten.alias.default", "aten.contiguous.default")


_LINEAR = frozenset(
    f"aten.{name}"
    for name in (
        "mul.Tensor div.Scalar index.Tensor view.default reshape.default unsqueeze.default squeeze.dim sum.dim_IntList"
    ).split()
)
"""Ops that are linear in their first argument."""


class Walk:
    """Places every op in order.

    A product with a weight cuts the weight's output dim on trial, as fine as can be. The ops that follow take the cut as it comes, or
    ask for a coarser one: whole heads, sections of a fused weight, or none at all where an op needs the dim whole. The walk then goes
    back to the first use of that weight and goes on from there with the coarser cut. Cuts only become coarser, so it ends; and at the
    end no op has gathered a value that was cut because of a weight.
    """

    def __init__(self, graph: ModelGraph, cuts: Cuts, *, is_sequence_parallel: bool) -> None:
        self.graph = graph
        self.cuts = cuts
        self.placings: list[Placing] = []
        self.states: dict[str, State] = {}
        self.gathered: dict[int, str] = {}
        self.free: dict[str, Free] = _free_parameters(graph)
        self._is_sequence_parallel = is_sequence_parallel
        self._of_batch = values_of_batch(graph)
        self._first_use: dict[str, int] = {}
        self._pending: dict[str, str] = {}

    def run(self) -> None:
        """Fills ``placings``, one an op, and ``states``, those of the values that ops make."""
        while len(self.placings) < len(self.graph.ops):
            index = len(self.placings)
            op = self.graph.ops[index]
            try:
                placing = self._deferred(op, self._place(index, op))
            except _Restart as restart:
                self._go_back(restart.index)
                continue
            self.placings.append(placing)
            for name, state in zip(op.outputs, placing.results, strict=False):
                if name is not None:
                    self.states[name] = state

    def _place(self, index: int, op: Op) -> Placing:
        if (free := self._transposed(op)) is not None:
            self.free[op.outputs[0] or ""] = free
            return Placing(inputs={op.inputs[0]: WHOLE}, outputs=(State(),))
        call = Call(
            op=op,
            graph=self.graph,
            states=self.states,
            free=self.free,
            cuts=self.cuts,
            is_sequence_parallel=self._is_sequence_parallel,
            of_batch=self._of_batch,
        )
        for name in op.inputs:
            if name in self.free:
                self._first_use.setdefault(self.free[name][0], index)
        place = self._place_summand if any(name in self._pending for name in op.inputs) else _place_call
        while True:
            try:
                return place(call)
            except Reconsider as request:
                origins = _origins(call, request.values)
                if origins:
                    changed = self.cuts.reconsider(request, origins)
                    raise _Restart(min(self._first_use[name] for name in changed)) from None
                self.gathered[index] = str(request)
                call = call.whole(request.values)

    def _deferred(self, op: Op, placing: Placing) -> Placing:
        """A partial sum is reduced where it is smallest: several terms for each token may first be weighted and added up."""
        output = op.outputs[0] if op.outputs else None
        if output is None or output in self._pending or placing.bias:
            return placing
        if not isinstance(placing.outputs[0].placement, Partial):
            return placing
        path = smallest_on(self.graph, output)
        self._pending.update(dict.fromkeys(path[:-1], path[-1]))
        return replace(placing, is_deferred=len(path) > 1)

    def _place_summand(self, call: Call) -> Placing:
        """A linear op on a summand: what else it reads is whole, and gets a summand of its gradient."""
        summand = next(name for name in call.tensors if name in self._pending)
        cut = tuple(name for name in call.tensors if call.state(name).origins)
        if cut:
            raise Blocked(cut, f"{call.op.target} weights a partial sum by it")
        inputs: dict[str, Placement] = dict.fromkeys(call.tensors, SUMMED)
        inputs[summand] = PARTIAL
        is_last = self._pending[summand] in call.op.outputs
        return Placing(
            inputs=inputs,
            outputs=(State(PARTIAL),),
            reduced=call.reduced(call.output_shape),
            is_deferred=not is_last,
        )

    def _transposed(self, op: Op) -> Free | None:
        """What a transpose or a cast of a parameter stands for."""
        if len(op.inputs) != 1 or op.inputs[0] not in self.free or len(op.outputs) != 1:
            return None
        parameter, dims = self.free[op.inputs[0]]
        if op.target in _COPIES:
            return parameter, dims
        if op.target not in _TRANSPOSES:
            return None
        ndim = len(dims)
        if op.target == "aten.permute.default":
            order = tuple(d % ndim for d in op.args[1])
        else:
            a, b = (op.args[1] % ndim, op.args[2] % ndim) if len(op.args) == 3 else (0, ndim - 1)
            order = tuple({a: b, b: a}.get(d, d) for d in range(ndim))
        return parameter, tuple(dims[d] for d in order)

    def _go_back(self, index: int) -> None:
        for op in self.graph.ops[index : len(self.placings)]:
            for name in op.outputs:
                self.states.pop(name or "", None)
                self._pending.pop(name or "", None)
        del self.placings[index:]
        self.gathered = {at: reason for at, reason in self.gathered.items() if at < index}


class _Restart(Exception):
    """The walk goes on from ``index``."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index


def _place_call(call: Call) -> Placing:
    rule: Rule | None = RULES.get(call.op.target)
    if rule is not None:
        return rule.place(call)
    if call.sharded:
        raise Blocked(call.sharded, f"no rule for {call.op.target}")
    return call.all_whole()


def _origins(call: Call, values: tuple[str, ...]) -> tuple[Origin, ...]:
    return tuple(dict.fromkeys(origin for name in values for origin in call.state(name).origins))


def _free_parameters(graph: ModelGraph) -> dict[str, Free]:
    return {
        parameter.name: (parameter.name, tuple(range(len(graph.values[parameter.name].shape))))
        for parameter in graph.parameters
    }


def smallest_on(graph: ModelGraph, start: str) -> list[str]:
    """The values from ``start`` to the smallest that is a linear function of it alone, by ops that nobody else reads."""
    path = [start]
    while (step := _linear_step(graph, path[-1])) is not None:
        path.append(step)
    sizes = [graph.values[name].numel for name in path]
    if min(sizes) == sizes[0]:
        return [start]
    return path[: max(i for i, size in enumerate(sizes) if size == min(sizes)) + 1]


def _linear_step(graph: ModelGraph, name: str) -> str | None:
    """The value that follows by one linear op."""
    readers = graph.consumers[name]
    if len(readers) != 1 or name == graph.output:
        return None
    op = graph.ops[readers[0]]
    is_first = bool(op.args) and op.args[0] == Ref(name)
    if op.target not in _LINEAR or not is_first or len(op.outputs) != 1:
        return None
    return op.outputs[0]
