"""``placement_graph``: the ops of a captured model as nodes to place, priced as a plan's stages are.

    node       an op, with the views of what it makes, and what it is the first to read of the tables that every device makes for itself
    seconds    forward and backward of one microbatch: the op's share of its block's seconds, so that all nodes together take what the
               profile says (the host races its device block by block, as in a plan)
    tensor     a value with the ops that read it, a view of the same size being the value itself; moving it takes its transfer to the
               neighbour, and its gradient's back where it has one
    memory     parameters with gradients and optimizer state, and what autograd keeps of so many microbatches

Values that follow cheaply from the batch (rotary tables, masks: ``graph.cuts.cheap_ops``) never travel; their seconds and bytes count once,
with their first reader. What a step does once, whatever its microbatches are (the optimizer, sums of gradients of shared parameters), is in
no node. Ops on both sides of a change in place share a device; so do ops of one block that use the same parameter. Where ops of several
blocks use one (tied embeddings), each block counts a copy of it, which is too much for those that lie together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardstage.cluster import Cluster
from shardstage.cost import Folded, Links, Profiler, by_op, fold
from shardstage.cost.memory import MOMENTS
from shardstage.graph import ModelGraph, Op
from shardstage.graph.cuts import cheap_ops
from shardstage.graph.mutation import inseparable, mutated, storage_owner
from shardstage.layout import Mesh
from shardstage.planner.placement.clusters import Groups
from shardstage.planner.placement.graph import PlacementGraph, Tensor
from shardstage.units import dtype_bytes

__all__ = ["OpGraph", "placement_graph"]


@dataclass(frozen=True, kw_only=True)
class OpGraph:
    """What is placed, and ``ops_of_node``: the ops of the model that each node stands for, by index; nodes follow the captured order."""

    placement: PlacementGraph
    ops_of_node: tuple[tuple[int, ...], ...]


def placement_graph(
    graph: ModelGraph,
    cluster: Cluster,
    *,
    microbatch: int,
    sequence: int | None,
    in_flight: int = 1,
) -> OpGraph:
    """The ops of ``graph`` on devices of ``cluster``, for microbatches of so many samples, all links being those of neighbours.

    ``in_flight`` microbatches are held by every device. A graph that was captured at one size is taken at that size alone: PlanError for
    another.
    """
    sized = graph
    if (microbatch, sequence) != (graph.microbatch, graph.sequence):
        sized = graph.at(microbatch=microbatch, sequence=sequence)
    folded = fold(graph)
    prices = _Prices(folded, cluster, microbatch, sequence)
    nodes = _Nodes(sized)
    links = Links(cluster, Mesh(pp=2))
    memory_bytes = [
        float(in_flight * sum(prices.saved_bytes[op] for op in members)) for members in nodes.members
    ]
    groups = Groups(len(nodes.members))
    for users, num_bytes in _parameters(sized, folded, nodes):
        groups.join_all([nodes.node_of[op] for op in users])
        memory_bytes[nodes.node_of[users[0]]] += num_bytes
    for together in _kept_together(sized):
        groups.join_all([nodes.node_of[op] for op in together])
    return OpGraph(
        placement=PlacementGraph(
            compute_s=tuple(sum(prices.seconds[op] for op in members) for members in nodes.members),
            tensors=tuple(nodes.tensors(links)),
            memory_bytes=tuple(memory_bytes),
            colocation=tuple(groups.find(node) for node in range(len(nodes.members))),
        ),
        ops_of_node=tuple(tuple(members) for members in nodes.members),
    )


class _Prices:
    """``seconds`` of both directions and ``saved_bytes`` of each op, for one microbatch."""

    def __init__(self, folded: Folded, cluster: Cluster, microbatch: int, sequence: int | None) -> None:
        of_units = Profiler(folded, cluster, tp=1, sequence=sequence).at(microbatch).units
        of_ops = Profiler(by_op(folded), cluster, tp=1, sequence=sequence).at(microbatch).units
        self.saved_bytes = [cost.kept["none"].saved_bytes for cost in of_ops]
        self.seconds: list[float] = []
        for unit, whole in zip(folded.units, of_units, strict=True):
            alone_s = [cost.forward_s + cost.backward_s for cost in of_ops[unit.start : unit.stop]]
            ratio = (whole.forward_s + whole.backward_s) / (sum(alone_s) or 1.0)
            self.seconds += [ratio * each for each in alone_s]


class _Nodes:
    """``members`` are the ops of each node, and ``node_of`` is the node of each op."""

    def __init__(self, graph: ModelGraph) -> None:
        self._graph = graph
        self._is_repeated = cheap_ops(graph)  # where its results are read, as are views of parameters
        self._base_of: dict[str, str] = {}
        root = self._roots()
        anchors = sorted(set(root))
        number = {anchor: node for node, anchor in enumerate(anchors)}
        self.node_of = [number[anchor] for anchor in root]
        self.members: list[list[int]] = [[] for _ in anchors]
        for op, node in enumerate(self.node_of):
            self.members[node].append(op)

    def _roots(self) -> list[int]:
        """For each op the one that its node is named after: views go with the maker of what they view, repeated ops with a reader."""
        graph = self._graph
        root = list(range(len(graph.ops)))
        for index, op in enumerate(graph.ops):
            makers = {root[graph.producer[name]] for name in op.inputs if self._travels(name)}
            base = self._viewed(op)
            self._is_repeated[index] |= bool(base) and not makers
            if base and len(makers) == 1 and self._travels(base):
                root[index] = makers.pop()
                self._base_of |= {name: base for name in op.outputs if name is not None}
        for index in reversed(range(len(graph.ops))):
            if self._is_repeated[index]:
                root[index] = min((root[reader] for reader in self._readers_of(index)), default=index)
        return root

    def _readers_of(self, index: int) -> list[int]:
        """The ops that read what an op makes."""
        graph = self._graph
        return [reader for name in graph.ops[index].outputs if name for reader in graph.consumers[name]]

    def users(self, stored: str) -> list[int]:
        """The ops that compute with a parameter, or with views of it."""
        found: set[int] = set()
        waiting = [*self._graph.consumers[stored]]
        while waiting:
            index = waiting.pop()
            if self._is_repeated[index]:
                waiting += self._readers_of(index)
            else:
                found.add(index)
        return sorted(found)

    def _travels(self, name: str) -> bool:
        """Whether a value is made by an op, and sent to devices that read it."""
        maker = self._graph.producer.get(name)
        return maker is not None and not self._is_repeated[maker]

    def _viewed(self, op: Op) -> str:
        """The value that all results of an op are views of; empty where it computes, or changes one in place."""
        values = self._graph.values
        if mutated(op) or not all(name is None or values[name].alias_of for name in op.outputs):
            return ""
        owners = {storage_owner(self._graph, name).name for name in op.outputs if name is not None}
        bases = [name for name in op.inputs if storage_owner(self._graph, name).name in owners]
        return bases[0] if len(owners) == 1 and bases else ""

    def tensors(self, links: Links) -> Iterator[Tensor]:
        """What travels between nodes: each value once, with all its views that are no smaller."""
        graph, readers = self._graph, self._readers()
        for name, nodes in readers.items():
            value, maker = graph.values[name], self.node_of[graph.producer[name]]
            others = tuple(sorted(nodes - {maker}))
            if others:
                one_way_s = links.transfer_s(value.num_bytes)
                yield Tensor(
                    producer=maker,
                    consumers=others,
                    transfer_s=2 * one_way_s if value.requires_grad else one_way_s,
                )

    def _readers(self) -> dict[str, set[int]]:
        readers: dict[str, set[int]] = {}
        for index, op in enumerate(self._graph.ops):
            for name in op.inputs:
                if self._travels(name):
                    readers.setdefault(self._carrier(name), set()).add(self.node_of[index])
        return readers

    def _carrier(self, name: str) -> str:
        """What is sent where ``name`` is needed: what it views, unless it is a part of that."""
        values = self._graph.values
        while name in self._base_of and values[name].numel >= values[self._base_of[name]].numel:
            name = self._base_of[name]
        return name


def _parameters(graph: ModelGraph, folded: Folded, nodes: _Nodes) -> Iterator[tuple[list[int], float]]:
    """For each parameter and block that uses it the ops that do, and the bytes of its copy, gradient, moments and own master weight."""
    unit_of = [number for number, unit in enumerate(folded.units) for _ in range(unit.start, unit.stop)]
    for parameter in graph.parameters:
        value = graph.values[parameter.name]
        compute_bytes = dtype_bytes(value.dtype)
        master_bytes = max(4, compute_bytes)
        num_wide = 1 + MOMENTS + (master_bytes != compute_bytes)
        num_bytes = float(value.numel * (compute_bytes + num_wide * master_bytes))
        of_units: dict[int, list[int]] = {}
        for user in nodes.users(parameter.name):
            of_units.setdefault(unit_of[user], []).append(user)
        for users in of_units.values():
            yield users, num_bytes


def _kept_together(graph: ModelGraph) -> Iterator[Sequence[int]]:
    """Ops that touch a tensor from its making to its last change in place; for a buffer that is changed, all that touch it."""
    apart = inseparable(graph)

    def touched(index: int) -> set[str]:
        op = graph.ops[index]
        names = (*op.inputs, *(name for name in op.outputs if name is not None))
        return {storage_owner(graph, name).name for name in names if name in apart.values}

    for first, last in apart.spans:
        storages = touched(first) & touched(last)
        yield [index for index in range(first, last + 1) if touched(index) & storages]
