"""``StageCosts``: what the ops of a plan's stages take on a device, in seconds and bytes, one microbatch on one rank.

Seconds are those of ``cost.compute`` op by op (of compiled blocks kernel by kernel), by the cluster's factors of their causes, and what
``launches`` add; the collectives are left out: they are the Program's. A backward is cut as the engine cuts it:

    W    the products that yield the gradients of weights of linear maps, and adding these up        I    everything else
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shardstage.cluster import Cluster
from shardstage.cost.collective import is_communication
from shardstage.cost.compute import OpTime, compiled_time, gradient_sums_s, moved_s, op_time
from shardstage.cost.kernels import SPLIT_TARGETS
from shardstage.graph import ModelGraph, Op
from shardstage.graph.cuts import Segment
from shardstage.graph.flops import backward_flops, forward_flops
from shardstage.graph.named_modules import recompute_parts
from shardstage.graph.saved import peak_extra_bytes, recomputed_of, saved_values, transient_bytes
from shardstage.graph.saved_compiled import saved_compiled
from shardstage.graph.saved_on import saved_on
from shardstage.plan import Plan
from shardstage.program import StageGraphs
from shardstage.program.stage_parameters import gradient_dtype
from shardstage.simulator.launches import launches
from shardstage.units import dtype_bytes

__all__ = ["StageCost", "StageCosts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """One stage, one microbatch, one rank.

    ``saved`` are the values kept from F to the backward with their bytes, what was received left out: ``saved_bytes`` in all.
    ``deferred_bytes`` are what W needs after I: inputs of linear maps and the gradients of their outputs.
    """

    forward_s: float
    input_s: float
    weight_s: float
    saved: tuple[tuple[str, int], ...]
    deferred_bytes: int
    transient_bytes: int
    recompute_bytes: int

    @property
    def backward_s(self) -> float:
        return self.input_s + self.weight_s

    @property
    def saved_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes in self.saved)


class StageCosts:
    """Costs of all stages of a plan on a cluster's device, by a calibration's ``factors``; what was computed once is kept."""

    def __init__(self, stages: StageGraphs, cluster: Cluster, factors: Mapping[str, float]) -> None:
        self.stages = stages
        self._cluster = cluster
        self._device = cluster.device
        self._factors = factors
        self._known: dict[tuple[int, int, int], StageCost] = {}

    @property
    def plan(self) -> Plan:
        return self.stages.plan

    def segment(self, stage: int, *, tp: int, size: int) -> Segment:
        """A stage's graph as its devices run it."""
        found = self.stages.segments(tp=self.stages.twin(tp), microbatch=size)[stage]
        device = self._device
        return replace(found, graph=saved_on(found.graph, device.kind, device.compute_capability))

    def cost(self, stage: int, *, tp: int, size: int) -> StageCost:
        """Of a microbatch of ``size`` samples on tensor-parallel rank ``tp``."""
        key = (stage, self.stages.twin(tp), size)
        if key not in self._known:
            self._known[key] = self._cost(self.segment(stage, tp=tp, size=size))
        return self._known[key]

    def _cost(self, segment: Segment) -> StageCost:
        graph = segment.graph
        runs = (
            (graph.ops,)
            if not self.plan.is_compiled
            else (graph.ops[b.start : b.stop] for b in segment.blocks)
        )
        times = [time for ops in runs for time in self._times(graph, ops)]
        forward_s = sum(time.forward_s for time in times)
        sums_s = gradient_sums_s(graph, self._device, self._factors)
        backward_s = sum(time.backward_s for time in times) + sums_s
        weight_s = sum(time.weight_s for time in times)
        host, host_factor = launches(segment, self.plan, self._cluster), self._factors["host"]
        num_ops = len(graph.ops)
        return StageCost(
            forward_s=forward_s + host_factor * host.forward_s,
            input_s=backward_s
            - weight_s
            + self._recompute_s(segment)
            + host_factor * (host.input_s + host.again_s),
            weight_s=weight_s + self._accumulation_s(graph) + host_factor * host.weight_s,
            saved=tuple(self._saved(segment)),
            deferred_bytes=_deferred_bytes(graph),
            transient_bytes=transient_bytes(graph, 0, num_ops),
            recompute_bytes=peak_extra_bytes(
                self._keeping(segment),
                0,
                num_ops,
                self.plan.recompute_of(segment.index),
                blocks=segment.blocks,
                modules=self.plan.recompute_modules,
            ),
        )

    def _keeping(self, segment: Segment) -> ModelGraph:
        """The stage's graph with what its blocks keep, compiled or not."""
        return saved_compiled(segment.graph, segment.blocks) if self.plan.is_compiled else segment.graph

    def _times(self, graph: ModelGraph, ops: Sequence[Op]) -> list[OpTime]:
        """Of what computes among consecutive ops: of each, or of all that are compiled together."""
        computing = [op for op in ops if not is_communication(op)]
        if self.plan.is_compiled:
            return [compiled_time(graph, computing, self._device, self._factors)]
        return [self._time(graph, op) for op in computing]

    def _time(self, graph: ModelGraph, op: Op) -> OpTime:
        return op_time(graph, op, self._device, self._factors)

    def _accumulation_s(self, graph: ModelGraph) -> float:
        """Seconds of adding a microbatch's gradients to their sums: each element read once, its sum read and written (``cost.setup``)."""
        plan = self.plan
        if plan.num_microbatches == 1:
            return 0.0
        names = {p.name for p in graph.parameters if graph.values[p.name].requires_grad}
        elements = sum(graph.values[name].numel for name in names)
        if plan.zero >= 2:
            elements = -(-elements // plan.mesh.dp)
        sum_bytes = dtype_bytes(gradient_dtype(plan))
        return self._factors["memory"] * moved_s(
            elements * (dtype_bytes(plan.precision) + 2 * sum_bytes), self._device
        )

    def _recompute_s(self, segment: Segment) -> float:
        """Seconds of computing layers, or named modules of them, again: products by their FLOPs, all else whole."""
        graph, plan = segment.graph, self.plan
        parts = recompute_parts(
            graph, segment.blocks, plan.recompute_of(segment.index), plan.recompute_modules
        )
        total_s = 0.0
        for part in (part for of_block in parts for part in of_block):
            if part.mode == "none":
                continue
            ops = graph.ops[part.start : part.stop]
            products = [
                (self._time(graph, op).forward_s, count) for op in ops if (count := forward_flops(graph, op))
            ]
            flops = sum(count for _, count in products)
            again = sum(forward_flops(graph, op) for op in recomputed_of(graph, part))
            products_s = sum(seconds for seconds, _ in products)
            total_s += sum(time.forward_s for time in self._times(graph, ops)) - products_s * (
                1 - again / flops if flops else 0.0
            )
        return total_s

    def _saved(self, segment: Segment) -> Iterator[tuple[str, int]]:
        """What the engine keeps: what autograd saves, and what the stage hands on until its gradient comes."""
        graph = self._keeping(segment)
        received = {edge.value for edge in segment.receives}
        names = saved_values(
            graph,
            0,
            len(graph.ops),
            self.plan.recompute_of(segment.index),
            blocks=segment.blocks,
            modules=self.plan.recompute_modules,
        )
        sent = [
            edge.value
            for edge in segment.sends
            if edge.requires_grad and not graph.values[edge.value].alias_of
        ]
        for name in dict.fromkeys((*names, *sent)):
            value = graph.values[name]
            is_of_batch = value.kind == "input" and not value.requires_grad
            if name not in received and not is_of_batch:
                yield name, value.num_bytes


def _split_ops(graph: ModelGraph) -> Iterator[Op]:
    """Products with a trained weight whose gradient W computes."""
    parameters = {p.name for p in graph.parameters if graph.values[p.name].requires_grad}
    for op in graph.ops:
        if op.target in SPLIT_TARGETS and not parameters.isdisjoint(op.inputs) and backward_flops(graph, op):
            yield op


def _deferred_bytes(graph: ModelGraph) -> int:
    """Each input of a split product once, whatever views of it are read, and all gradients of outputs."""
    weights = {p.name for p in graph.parameters}
    inputs: dict[str, int] = {}
    outputs = 0
    for op in _split_ops(graph):
        for name in op.inputs:
            if name not in weights and graph.values[name].requires_grad:
                inputs[_storage(graph, name)] = graph.values[name].num_bytes
        outputs += sum(graph.values[name].num_bytes for name in op.outputs if name is not None)
    return sum(inputs.values()) + outputs


def _storage(graph: ModelGraph, name: str) -> str:
    while graph.values[name].alias_of:
        name = graph.values[name].alias_of
    return name
