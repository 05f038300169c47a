"""``profile``: what every unit of a model costs one tensor-parallel rank, for one microbatch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from shardstage.cluster import Cluster, CollectiveKind
from shardstage.cost.collective import calls_of, is_communication
from shardstage.cost.compute import op_time
from shardstage.cost.fold import Folded
from shardstage.graph import ModelGraph
from shardstage.graph.blocks import find_blocks
from shardstage.graph.cuts import all_crossing_bytes
from shardstage.graph.flops import backward_flops, forward_flops
from shardstage.graph.saved import peak_extra_bytes, recompute_flops, saved_bytes, transient_bytes
from shardstage.sharding import localize, shard

__all__ = ["RECOMPUTES", "KeptOf", "Profile", "UnitCost", "profile"]

RECOMPUTES: Final = ("none", "selective", "full")
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptOf:
    """What a recompute choice means for a unit: bytes kept to backward, seconds to compute the rest again, bytes brought back by that."""

    saved_bytes: int
    recompute_s: float
    extra_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitCost:
    """One unit on one tensor-parallel rank, for one microbatch.

    ``tp_*_s`` is talk along tp, which compute waits for. ``input_bytes`` is what travels to the unit where it begins a stage.
    ``own_elements`` counts the local parameters that no other unit uses, ``shared`` names the others.
    """

    forward_s: float
    backward_s: float
    tp_forward_s: float
    tp_backward_s: float
    tp_bytes: tuple[tuple[CollectiveKind, int, int], ...]
    forward_flops: int
    backward_flops: int
    input_bytes: int
    transient_bytes: int
    own_elements: int
    num_parameters: int
    shared: tuple[str, ...]
    kept: dict[Recompute, KeptOf]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Costs of all units of the whole graph, in order; ``shared_elements`` are the local sizes of parameters that several units use.

    ``whole_flops`` is the forward of one microbatch on all ranks together: what MFU counts.
    """

    units: tuple[UnitCost, ...]
    shared_elements: dict[str, int]
    whole_flops: int


def profile(
    folded: Folded,
    cluster: Cluster,
    *,
    tp: int,
    microbatch: int,
    sequence: int | None,
    is_sequence_parallel: bool = False,
    replicate: Sequence[str] = (),
) -> Profile:
    """Prices the local graph of the first tensor-parallel rank, which has the largest shards."""
    graph = folded.graph.at(
        microbatch=microbatch if folded.graph.is_scalable else folded.graph.microbatch,
        sequence=sequence if folded.graph.is_sequence_scalable else folded.graph.sequence,
    )
    sharding = shard(
        graph, num_ranks=tp, is_sequence_parallel=is_sequence_parallel, replicate=tuple(replicate)
    )
    local = localize(sharding, 0)
    bounds = _local_bounds(folded, local)
    elements = {p.name: local.values[p.name].numel for p in local.parameters}
    shared = _shared_names(folded, elements)
    kept = _Pricing(local, cluster, tp, bounds).units(elements, shared)
    return Profile(
        units=tuple(kept[unit.twin] for unit in folded.units),
        shared_elements={name: elements[name] for name in shared},
        whole_flops=_whole_flops(folded, graph),
    )


class _Pricing:
    """One local graph while its units are priced."""

    def __init__(
        self, graph: ModelGraph, cluster: Cluster, tp: int, bounds: Sequence[tuple[int, int]]
    ) -> None:
        self.graph = graph
        self.device = cluster.device
        self.bounds = bounds
        self.blocks = find_blocks(graph)
        self.crossing = all_crossing_bytes(graph)
        kinds: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter")
        self.links = {kind: cluster.collective(kind, range(tp)) for kind in kinds}

    def units(self, elements: dict[str, int], shared: frozenset[str]) -> list[UnitCost]:
        saved = {recompute: self._increments(recompute) for recompute in RECOMPUTES}
        return [
            self._unit(
                start,
                stop,
                elements,
                shared,
                {recompute: saved[recompute][number] for recompute in RECOMPUTES},
            )
            for number, (start, stop) in enumerate(self.bounds)
        ]

    def _unit(
        self,
        start: int,
        stop: int,
        elements: dict[str, int],
        shared: frozenset[str],
        saved: dict[Recompute, int],
    ) -> UnitCost:
        graph = self.graph
        ops = graph.ops[start:stop]
        times = [op_time(graph, op, self.device) for op in ops if not is_communication(op)]
        calls = [call for op in ops for call in calls_of(graph, op)]
        talk = [
            sum(self.links[call.kind].seconds(call.num_bytes) for call in calls if call.is_backward is way)
            for way in (False, True)
        ]
        volume: Counter[CollectiveKind] = Counter()
        for call in calls:
            volume[call.kind] += call.num_bytes
        counts = Counter(call.kind for call in calls)
        names = {name for op in ops for name in op.inputs if name in elements}
        forward_s = sum(time.forward_s for time in times)
        forward = sum(forward_flops(graph, op) for op in ops)
        return UnitCost(
            forward_s=forward_s,
            backward_s=sum(time.backward_s for time in times),
            tp_forward_s=talk[0],
            tp_backward_s=talk[1],
            tp_bytes=tuple((kind, counts[kind], volume[kind]) for kind in counts),
            forward_flops=forward,
            backward_flops=sum(backward_flops(graph, op) for op in ops),
            input_bytes=self.crossing[start],
            transient_bytes=transient_bytes(graph, start, stop),
            own_elements=sum(elements[name] for name in names - shared),
            num_parameters=len(names),
            shared=tuple(sorted(names & shared)),
            kept={
                recompute: self._kept(start, stop, recompute, saved[recompute], forward, forward_s + talk[0])
                for recompute in RECOMPUTES
            },
        )

    def _increments(self, recompute: Recompute) -> list[int]:
        """Bytes that each unit adds to what those before it keep: a storage that two units keep counts with the first."""
        up_to = [saved_bytes(self.graph, 0, stop, recompute, blocks=self.blocks) for _, stop in self.bounds]
        return [stop - start for start, stop in zip([0, *up_to], up_to, strict=False)]

    def _kept(
        self, start: int, stop: int, recompute: Recompute, num_bytes: int, forward: int, forward_s: float
    ) -> KeptOf:
        """Recomputing takes the share of the forward's time that its FLOPs are of the forward's, selective at least what is not product."""
        is_layer = any(block.is_layer and block.start < stop and start < block.stop for block in self.blocks)
        if recompute == "none" or not is_layer:
            return KeptOf(saved_bytes=num_bytes, recompute_s=0.0, extra_bytes=0)
        flops = recompute_flops(self.graph, start, stop, recompute, blocks=self.blocks)
        products_s = self._products_s(start, stop)
        again_s = forward_s - products_s * (1 - flops / forward if forward else 0.0)
        extra = peak_extra_bytes(self.graph, start, stop, recompute, blocks=self.blocks)
        return KeptOf(saved_bytes=num_bytes, recompute_s=again_s, extra_bytes=extra)

    def _products_s(self, start: int, stop: int) -> float:
        graph = self.graph
        ops = (op for op in graph.ops[start:stop] if forward_flops(graph, op))
        return sum(op_time(graph, op, self.device).forward_s for op in ops)


def _local_bounds(folded: Folded, local: ModelGraph) -> list[tuple[int, int]]:
    """Where the kept units lie in the local graph; an op that sharding inserted goes with the one it serves."""
    position: dict[str, int] = {}
    for index, op in enumerate(local.ops):
        position.setdefault(op.name.split("@")[0], index)
    starts = [position[folded.graph.ops[start].name] for start, _ in folded.kept]
    return list(zip(starts, [*starts[1:], len(local.ops)], strict=True))


def _shared_names(folded: Folded, elements: dict[str, int]) -> frozenset[str]:
    """Parameters that several units of the whole graph use: those of a kept unit's twins are others, by other names."""
    uses = Counter(
        name
        for start, stop in folded.kept
        for name in {n for op in folded.graph.ops[start:stop] for n in op.inputs if n in elements}
    )
    return frozenset(name for name, count in uses.items() if count > 1)


def _whole_flops(folded: Folded, graph: ModelGraph) -> int:
    kept = [sum(forward_flops(graph, op) for op in graph.ops[start:stop]) for start, stop in folded.kept]
    return sum(kept[unit.twin] for unit in folded.units)
