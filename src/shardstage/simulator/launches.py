"""``launches``: what a stage's microbatch waits for a host that launches kernels slower than its device runs them.

As in the step formula (``cost.compute.launched_s``) each block is a race of its own, forward, backward and computed again: within it the
host runs ahead, while kernels run and while ranks talk along tp.

    kernels     ███████
    launches    ███████████
                       ░░░░     is added
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shardstage.cluster import Cluster, CollectiveKind
from shardstage.cost.collective import calls_of
from shardstage.cost.compute import dispatch_s, kernels_s, launched_s
from shardstage.cost.fusion import kernels_of
from shardstage.cost.kernels import Kernel, KernelReader
from shardstage.graph import Op
from shardstage.graph.cuts import Segment
from shardstage.graph.named_modules import Part, recompute_parts
from shardstage.graph.saved import recomputed_of
from shardstage.plan import Plan

__all__ = ["Launches", "launches"]


class Launches(NamedTuple):
    """Seconds that waiting for launches adds: to F, to I and W, which B adds up, and to computing again."""

    forward_s: float = 0.0
    input_s: float = 0.0
    weight_s: float = 0.0
    again_s: float = 0.0


def launches(segment: Segment, plan: Plan, cluster: Cluster) -> Launches:
    """Of one microbatch of a stage; none where the host keeps up."""
    if dispatch_s(cluster.device) == 0.0:
        return Launches()
    parts = recompute_parts(
        segment.graph, segment.blocks, plan.recompute_of(segment.index), plan.recompute_modules
    )
    runs = [(block.start, block.stop, own) for block, own in zip(segment.blocks, parts, strict=True)]
    # What is computed again of earlier stages is launched on the way into this one's first block.
    if segment.num_recomputed and len(runs) > 1:
        (start, _, _), (_, stop, own), *others = runs
        runs = [(start, stop, own), *others]
    host = _Host(segment, plan, cluster, [(start, stop) for start, stop, _ in runs])
    each = [host.run(number, own) for number, (_, _, own) in enumerate(runs)]
    return Launches(*map(sum, zip(*each, strict=True)))


class _Host:
    """What launching adds to runs of a stage's ops."""

    def __init__(
        self, segment: Segment, plan: Plan, cluster: Cluster, bounds: Sequence[tuple[int, int]]
    ) -> None:
        self._graph = segment.graph
        self._bounds = bounds
        self._reader = KernelReader(segment.graph, lambda _: False, bounds=bounds)
        self._is_compiled = plan.is_compiled
        self._device = cluster.device
        kinds: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter")
        self._links = {kind: cluster.collective(kind, range(plan.mesh.tp)) for kind in kinds}

    def run(self, number: int, parts: Sequence[Part]) -> Launches:
        """Of one run, of which ``parts`` may be computed again."""
        ops = self._graph.ops[slice(*self._bounds[number])]
        kernels = (*self._kernels(ops), *self._reader.received_sums(number))
        backward_s = self._added_s(kernels, ops, is_backward=True)
        weights = [kernel for kernel in kernels if kernel.is_weight]
        weight_s = min(backward_s, self._added_s(weights, (), is_backward=True))
        return Launches(
            forward_s=self._added_s(kernels, ops, is_backward=False),
            input_s=backward_s - weight_s,
            weight_s=weight_s,
            again_s=self._again_s(parts),
        )

    def _again_s(self, parts: Sequence[Part]) -> float:
        """Of a layer what its forward waits for, whatever products it spares; of named modules what is computed again."""
        again = [part for part in parts if part.mode != "none"]
        ops = [
            op
            for part in again
            for op in (
                recomputed_of(self._graph, part) if part.is_named else self._graph.ops[part.start : part.stop]
            )
        ]
        return self._added_s(self._kernels(ops), ops, is_backward=False)

    def _kernels(self, ops: Sequence[Op]) -> tuple[Kernel, ...]:
        return kernels_of(self._graph, self._reader, ops, is_compiled=self._is_compiled)

    def _added_s(self, kernels: Sequence[Kernel], ops: Sequence[Op], *, is_backward: bool) -> float:
        """To what the kernels of one direction take; ``ops`` may talk meanwhile."""
        own = [kernel for kernel in kernels if kernel.is_backward is is_backward]
        own_s = float(kernels_s(own, [self._graph.microbatch], self._device).sum())
        talk_s = sum(
            self._links[call.kind].seconds(call.num_bytes)
            for op in ops
            for call in calls_of(self._graph, op)
            if call.is_backward is is_backward
        )
        return float(launched_s(own_s, len(own), talk_s, self._device)) - own_s
