"""Moves the point where a whole value begins to feed sharded computation backwards, where less data is then summed.

k = linear(x, w)          k I → R: sum the gradient of k     →     x I → R already, for the query: nothing more to sum,
attention(q cut, k whole)                                         and w has a summand of its gradient on each rank
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from shardstage.graph import ModelGraph
from shardstage.layout import Placement
from shardstage.sharding.batch import values_of_batch
from shardstage.sharding.state import SUMMED, WHOLE, Placing, State

__all__ = ["pull_back"]

_SAMPLES_PER_STEP = 8
"""Samples over which the once-a-step reduction of a weight's gradient is spread, and of tables that no sample has its own of: few."""


def pull_back(graph: ModelGraph, placings: Sequence[Placing], free: Iterable[str]) -> list[Placing]:
    """The placings with whole ops made R where that saves more reductions than it costs.

    ``free`` are the parameters and their transposes. Decided run by run: ops that are connected by whole values, all of whose graded
    results go to sharded computation. A run ends where its input is summed anyway. The weights of a run count too: their gradients
    are then summed, once a step.
    """
    pull = _Pull(graph, list(placings), frozenset(free))
    seen: set[int] = set()
    for index in sorted(pull.eligible, reverse=True):
        if index not in seen:
            run = pull.run_around(index)
            seen |= run
            pull.consider(run)
    return pull.placings


class _Pull:
    def __init__(self, graph: ModelGraph, placings: list[Placing], free: frozenset[str]) -> None:
        self.graph = graph
        self.placings = placings
        self.free = free
        self._of_batch = values_of_batch(graph)
        self.eligible: set[int] = set()
        for index in reversed(range(len(graph.ops))):
            if self._is_eligible(index):
                self.eligible.add(index)

    def run_around(self, start: int) -> set[int]:
        """The eligible ops that are connected with one."""
        run: set[int] = set()
        waiting = [start]
        while waiting:
            index = waiting.pop()
            if index in run or index not in self.eligible:
                continue
            run.add(index)
            op = self.graph.ops[index]
            for name in self._graded(op.inputs):
                if name in self.graph.producer and not self._is_summed_anyway(name):
                    waiting.append(self.graph.producer[name])
            for name in self._graded(op.outputs):
                if not self._is_summed_anyway(name):
                    waiting += self.graph.consumers[name]
        return run

    def consider(self, run: set[int]) -> None:
        """Makes the run R, if that pays."""
        made = {n for index in run for n in self._graded(self.graph.ops[index].outputs)}
        read = {n for index in run for n in self._graded(self.graph.ops[index].inputs)} - made - self.free
        weights = {n for index in run for n in self.graph.ops[index].inputs if n in self.free}
        gain = sum(self._elements(name) * len(self._asked_outside(name, run) - {WHOLE}) for name in made)
        cost = sum(self._elements(name) for name in read if SUMMED not in self._asked_outside(name, run))
        if cost + sum(map(self._elements, weights)) < gain:
            for index in run:
                self._make_summed(index)

    def _is_eligible(self, index: int) -> bool:
        """Whether the op is whole and each graded result of it goes to sharded or eligible ops only."""
        op = self.graph.ops[index]
        if not self._is_whole(index) or self.graph.output in op.outputs:
            return False
        results = self._graded(op.outputs)
        if any(WHOLE in self._asked_outside(name, self.eligible) for name in results):
            return False
        weights = [name for name in op.inputs if name in self.free]
        return all(self._asked_outside(name, {index}) <= {SUMMED} for name in weights)

    def _is_whole(self, index: int) -> bool:
        placing, op = self.placings[index], self.graph.ops[index]
        return (
            bool(self._graded(op.outputs))
            and not placing.form
            and not any(name in self.free for name in op.outputs)
            and all(state.placement == WHOLE for state in placing.outputs)
            and all(placement == WHOLE for placement in placing.inputs.values())
        )

    def _is_summed_anyway(self, name: str) -> bool:
        return SUMMED in self._asked_outside(name, self.eligible)

    def _make_summed(self, index: int) -> None:
        old = self.placings[index]
        inputs: dict[str, Placement] = dict.fromkeys(old.inputs, SUMMED)
        outputs = tuple(
            State(SUMMED) if name is not None and self.graph.values[name].requires_grad else State()
            for name in self.graph.ops[index].outputs
        )
        self.placings[index] = replace(old, inputs=inputs, outputs=outputs)

    def _asked_outside(self, name: str, run: set[int]) -> set[Placement]:
        """Placements in which ops outside the run need a value."""
        return {
            self.placings[index].inputs.get(name, WHOLE)
            for index in self.graph.consumers[name]
            if index not in run
        }

    def _graded(self, names: Iterable[str | None]) -> list[str]:
        return [name for name in names if name is not None and self.graph.values[name].requires_grad]

    def _elements(self, name: str) -> float:
        """What a reduction of the value costs for each sample: never a function of how many samples a microbatch has."""
        numel = self.graph.values[name].numel
        if name in self._of_batch:
            return numel / self.graph.microbatch
        return numel / _SAMPLES_PER_STEP
