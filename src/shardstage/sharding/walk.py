"""Chooses a placement for every value: one walk over the ops that goes back where a cut proves too fine."""

from __future__ import annotations

from collections.abc import Mapping

from shardstage.graph import ModelGraph, Op
from shardstage.layout import Placement
from shardstage.sharding.call import Call, Rule
from shardstage.sharding.cuts import Cuts
from shardstage.sharding.rules import RULES
from shardstage.sharding.state import WHOLE, Blocked, Origin, Placing, Reconsider, State

__all__ = ["Free", "Walk"]

Free = tuple[str, tuple[int, ...]]
"""A parameter, and its dim for each dim of a value that is a transpose of it."""

_TRANSPOSES = ("aten.t.default", "aten.transpose.int", "aten.permute.default")
_COPIES = ("aten.to.dtype", "aten.detach.default", "aten.alias.default", "aten.contiguous.default")


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
        self._batch_inputs = _from_batch(graph)
        self._first_use: dict[str, int] = {}

    def run(self) -> None:
        """Fills ``placings``, one an op, and ``states``, those of the values that ops make."""
        while len(self.placings) < len(self.graph.ops):
            index = len(self.placings)
            op = self.graph.ops[index]
            try:
                placing = self._place(index, op)
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
            batch_inputs=self._batch_inputs,
        )
        for name in op.inputs:
            if name in self.free:
                self._first_use.setdefault(self.free[name][0], index)
        while True:
            try:
                return _place_call(call)
            except Reconsider as request:
                origins = _origins(call, request.values)
                if origins:
                    changed = self.cuts.reconsider(request, origins)
                    raise _Restart(min(self._first_use[name] for name in changed)) from None
                self.gathered[index] = str(request)
                call = call.whole(request.values)

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


def _from_batch(graph: ModelGraph) -> frozenset[str]:
    """Values without gradient that depend on the batch: ids, not positions."""
    found = set(graph.inputs)
    for op in graph.ops:
        if not found.isdisjoint(op.inputs):
            found.update(n for n in op.outputs if n is not None and not graph.values[n].requires_grad)
    return frozenset(found)


def placements_of(states: Mapping[str, State]) -> dict[str, Placement]:
    return {name: state.placement for name, state in states.items()}
