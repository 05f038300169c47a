"""``profile``: what every unit of a model costs one tensor-parallel rank, for one microbatch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np

from shardstage.cluster import Cluster, CollectiveKind, DeviceClass
from shardstage.cost.compute import dispatch_s, kernel_s, kernels_s
from shardstage.cost.fold import Folded
from shardstage.cost.kernels import Kernel
from shardstage.cost.links import Links, exposed_s
from shardstage.cost.reading import RECOMPUTES, Reading, Recompute, Work, fixed_values
from shardstage.graph import ModelGraph
from shardstage.graph.flops import forward_flops
from shardstage.sharding import localize, shard

__all__ = ["RECOMPUTES", "KeptOf", "Profile", "Profiler", "Recompute", "UnitCost", "profile"]

EXPERT_SKEW: Final = 1.1
"""The fullest expert's tokens over the mean: routers with a balancing loss stay near it; our estimate."""

REFERENCE_MICROBATCH: Final = 2
"""Graphs are sharded at this size: with a single sample, flattening samples and positions would keep any cut of the positions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptOf:
    """What a recompute choice means for a unit: bytes kept to backward, seconds to compute the rest again, bytes brought back by that."""

    saved_bytes: int
    recompute_s: float
    extra_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitCost:
    """One unit on one tensor-parallel rank, for one microbatch.

    ``tp_*_s`` is talk along tp, ``cp_*_s`` what of context parallelism's talk attention does not hide, ``ep_*_s`` tokens on their way to
    experts and back; compute waits for all of it. ``input_bytes`` is what travels to the unit where it begins a stage.
    ``own_elements`` counts the local parameters that no other unit uses, ``expert_elements`` of them an expert layer's experts; ``shared``
    names the others.
    """

    forward_s: float
    backward_s: float
    memory_s: tuple[float, float]
    host_s: tuple[float, float]
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
    expert_elements: int = 0
    cp_forward_s: float = 0.0
    cp_backward_s: float = 0.0
    ep_forward_s: float = 0.0
    ep_backward_s: float = 0.0

    def talk_s(self, *, forward: bool) -> float:
        """Seconds of one direction in which the unit waits for other ranks."""
        if forward:
            return self.tp_forward_s + self.cp_forward_s + self.ep_forward_s
        return self.tp_backward_s + self.cp_backward_s + self.ep_backward_s


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
    is_compiled: bool = False,
) -> Profile:
    """Prices the local graph of the first tensor-parallel rank, which has the largest shards."""
    return Profiler(
        folded,
        cluster,
        tp=tp,
        sequence=sequence,
        is_sequence_parallel=is_sequence_parallel,
        replicate=replicate,
        is_compiled=is_compiled,
    ).at(microbatch)


class Profiler:
    """One sharding of a model, priced at any microbatch: it is sharded once, and sizes that follow the microbatch scale with it.

    ``waits_for_kernels``: the host does not run ahead, each launch waits for the kernel before it (CUDA_LAUNCH_BLOCKING).
    """

    def __init__(
        self,
        folded: Folded,
        cluster: Cluster,
        *,
        tp: int,
        sequence: int | None,
        is_sequence_parallel: bool = False,
        replicate: Sequence[str] = (),
        is_compiled: bool = False,
        waits_for_kernels: bool = False,
    ) -> None:
        graph = folded.graph.at(
            microbatch=REFERENCE_MICROBATCH if folded.graph.is_scalable else folded.graph.microbatch,
            sequence=sequence if folded.graph.is_sequence_scalable else folded.graph.sequence,
        )
        sharding = shard(
            graph, num_ranks=tp, is_sequence_parallel=is_sequence_parallel, replicate=tuple(replicate)
        )
        local = localize(sharding, 0)
        self._folded = folded
        self._device = cluster.device
        self._waits_for_kernels = waits_for_kernels
        self._known: dict[tuple[int, float], _Seconds] = {}
        self._elements = {p.name: local.values[p.name].numel for p in local.parameters}
        self._shared = _shared_names(folded, self._elements)
        self._whole_flops = _whole_flops(folded, graph) / graph.microbatch
        kinds: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter")
        self._links = {kind: cluster.collective(kind, range(tp)) for kind in kinds}
        self._works = Reading(
            local, _local_bounds(folded, local), fixed_values(folded.graph), is_compiled=is_compiled
        ).works(self._elements, self._shared)

    def at(self, microbatch: int, links: Links | None = None) -> Profile:
        """Costs of all units for a microbatch of so many samples.

        ``links`` say which ranks share its sequences (cp) and its experts (ep). A rank's part of the sequences costs what so many fewer
        samples do, attention included: its queries meet all keys.
        """
        cp = 1 if links is None else links.mesh.cp
        kept = [self._unit(number, microbatch / cp, links) for number in range(len(self._works))]
        return Profile(
            units=tuple(kept[unit.twin] for unit in self._folded.units),
            shared_elements={name: self._elements[name] for name in self._shared},
            whole_flops=round(self._whole_flops * microbatch),
        )

    def least_s(self, microbatch: float, links: Links | None = None) -> float:
        """A lower bound of the seconds of all units, forward and backward: products at the best rate, or their bytes, and talk along tp."""
        flops, fixed, sample, calls = self._roofline
        device = self._device
        model = device.kernels
        if model is None:
            return 0.0
        rate = (
            max(device.flops_per_s.values())
            if not self._dtypes
            else max(device.rate(d) for d in self._dtypes)
        )
        best = rate * model.sustained_ratio * max(tile.ratio for tile in model.tiles)
        moved = (fixed + sample * microbatch) / (device.bytes_per_s * model.moved_ratio)
        seconds = float(np.maximum(flops * microbatch / best, moved).sum())
        if links is not None:
            seconds += sum(
                2 * number * _expert_s(work, microbatch, links)
                for work, number in zip(self._works, self._numbers, strict=True)
            )
        return seconds + sum(number * self._links[kind].seconds(b * microbatch) for kind, b, number in calls)

    @cached_property
    def _numbers(self) -> list[int]:
        """How many units of the whole model each kept one stands for."""
        numbers = Counter(unit.twin for unit in self._folded.units)
        return [numbers[twin] for twin in range(len(self._works))]

    @cached_property
    def _roofline(self) -> tuple[Any, Any, Any, list[tuple[CollectiveKind, float, int]]]:
        """FLOPs a sample, fixed bytes and bytes a sample of all kernels of the whole model, and its collectives."""
        flops, fixed, sample, calls = [], [], [], []
        numbers = Counter(unit.twin for unit in self._folded.units)
        for twin, work in enumerate(self._works):
            times = numbers[twin]
            for kernel in work.kernels:
                of_product = 2.0 * kernel.m * kernel.n * kernel.k * kernel.num_products
                flops.append(times * (of_product if kernel.kind == "product" and kernel.scaled else 0.0))
                fixed.append(times * kernel.fixed_bytes)
                sample.append(times * kernel.sample_bytes)
            calls += [(kind, moved.sample, times) for kind, _, moved in work.calls]
        return np.array(flops), np.array(fixed), np.array(sample), calls

    @cached_property
    def _dtypes(self) -> set[str]:
        return {kernel.dtype for work in self._works for kernel in work.kernels if kernel.dtype}

    def prepare(self, microbatches: Iterable[float]) -> None:
        """Prices all kernels at many microbatches in one go; ``at`` then adds up what is there."""
        sizes = sorted(set(microbatches))
        for number, work in enumerate(self._works):
            plain = [kernel for kernel in work.kernels if not kernel.is_expert]
            table = kernels_s(plain, sizes, self._device)
            for place, b in enumerate(sizes):
                self._known[number, b] = _sums_of(plain, table[:, place].tolist(), self._device)

    def _seconds(self, number: int, b: float, ep: int) -> _Seconds:
        """Seconds of a kept unit's kernels, by direction and kind; experts apart, as they depend on ``ep``."""
        kernels = self._works[number].kernels
        if (number, b) not in self._known:
            plain = [kernel for kernel in kernels if not kernel.is_expert]
            seconds = [kernel_s(kernel, b, self._device) for kernel in plain]
            self._known[number, b] = _sums_of(plain, seconds, self._device)
        experts = [_dealt_out(kernel, ep) for kernel in kernels if kernel.is_expert]
        if not experts:
            return self._known[number, b]
        more = _sums_of(experts, [kernel_s(kernel, b, self._device) for kernel in experts], self._device)
        return _Seconds(*(x + y for x, y in zip(self._known[number, b], more, strict=True)))

    def _unit(self, number: int, b: float, links: Links | None) -> UnitCost:
        device, work = self._device, self._works[number]
        ep = 1 if links is None else links.ep
        seconds = self._seconds(number, b, ep)
        device_s = (seconds.forward, seconds.backward)
        products_s = seconds.forward_products
        host_s = [dispatch_s(device) * number_of for number_of in work.num_kernels]
        talk = [0.0, 0.0]
        volume: Counter[CollectiveKind] = Counter()
        counts: Counter[CollectiveKind] = Counter()
        for kind, is_backward, moved in work.calls:
            num_bytes = moved.at(b)
            talk[is_backward] += self._links[kind].seconds(num_bytes)
            volume[kind] += num_bytes
            counts[kind] += 1
        if self._waits_for_kernels:
            forward_s, backward_s = device_s[0] + host_s[0], device_s[1] + host_s[1]
        else:
            forward_s, backward_s = (max(device_s[way], host_s[way] - talk[way]) for way in (False, True))
        attention_s = (seconds.forward_attention, seconds.backward_attention)
        cp_s = (0.0, 0.0) if links is None else _context_s(attention_s, work, b, links)
        ep_s = 0.0 if links is None else _expert_s(work, b, links)
        expert_elements = work.expert_elements // ep
        memory_s = (seconds.forward_memory, seconds.backward_memory)
        launches_s = (seconds.forward_launches, seconds.backward_launches)
        return UnitCost(
            forward_s=forward_s,
            backward_s=backward_s,
            memory_s=memory_s,
            host_s=(launches_s[0] + forward_s - device_s[0], launches_s[1] + backward_s - device_s[1]),
            tp_forward_s=talk[0],
            tp_backward_s=talk[1],
            tp_bytes=tuple((kind, counts[kind], volume[kind]) for kind in counts),
            forward_flops=round(work.forward_flops * b),
            backward_flops=round(work.backward_flops * b),
            input_bytes=work.input_bytes.at(b),
            transient_bytes=max((each.at(b) for each in work.working_sets), default=0),
            own_elements=work.own_elements - work.expert_elements + expert_elements,
            expert_elements=expert_elements,
            num_parameters=work.num_parameters,
            shared=work.shared,
            kept={
                recompute: KeptOf(
                    saved_bytes=kept.saved.at(b),
                    recompute_s=forward_s + talk[0] + cp_s[0] + ep_s - products_s * (1 - kept.flops_ratio)
                    if kept.is_recomputed
                    else 0.0,
                    extra_bytes=max((each.at(b) for each in kept.extras), default=0),
                )
                for recompute, kept in work.kept.items()
            },
            cp_forward_s=cp_s[0],
            cp_backward_s=cp_s[1],
            ep_forward_s=ep_s,
            ep_backward_s=ep_s,
        )


def _dealt_out(kernel: Kernel, ep: int) -> Kernel:
    """The same product where a rank has its share of the experts, and the tokens of ``ep`` ranks for them."""
    if not kernel.is_expert:
        return kernel
    rows = {kernel.scaled: ep * getattr(kernel, kernel.scaled)} if kernel.scaled in ("m", "k") else {}
    return kernel._replace(num_products=max(1, kernel.num_products // ep), **rows)


class _Seconds(NamedTuple):
    """Seconds of a unit's kernels; products include attention."""

    forward: float
    backward: float
    forward_products: float
    forward_attention: float
    backward_attention: float
    forward_memory: float
    backward_memory: float
    forward_launches: float
    backward_launches: float


def _sums_of(kernels: Sequence[Kernel], seconds: Sequence[float], device: DeviceClass) -> _Seconds:
    forward = backward = products = attention_f = attention_b = 0.0
    for kernel, s in zip(kernels, seconds, strict=True):
        if kernel.is_backward:
            backward += s
            attention_b += s if kernel.kind == "attention" else 0.0
        else:
            forward += s
            products += s if kernel.kind != "moved" else 0.0
            attention_f += s if kernel.kind == "attention" else 0.0
    memory_s, launches_s = _bound_s(kernels, seconds, device)
    return _Seconds(forward, backward, products, attention_f, attention_b, *memory_s, *launches_s)


def _context_s(attention_s: tuple[float, float], work: Work, b: float, links: Links) -> tuple[float, float]:
    """Seconds forward and backward that a unit waits for keys and values of other parts of its sequences.

    Ring: they are passed on cp - 1 times beside attention (Liu et al., "Ring Attention", 2023), with their gradients on the way back.
    Ulysses: q, k, v and the result are dealt out by heads and back (Jacobs et al., "DeepSpeed Ulysses", 2023) where each gets a head.
    """
    cp = links.mesh.cp
    if cp == 1 or not work.attention:
        return 0.0, 0.0
    beside = [each * (cp - 1) / cp for each in attention_s]
    keys = sum(each.keys.at(b) for each in work.attention)
    whole = sum(each.whole.at(b) for each in work.attention)
    step_s = links.ring_step_s(keys)
    ring = ((cp - 1) * step_s, 2 * (cp - 1) * step_s)
    forward_s, backward_s = (
        exposed_s(*both, links.overlap_slowdown) for both in zip(ring, beside, strict=True)
    )
    rings = (forward_s, backward_s)
    if min(each.num_heads for each in work.attention) % cp:
        return rings
    exchange_s = links.cp_exchange_s(whole)
    return min(rings, (exchange_s, exchange_s), key=sum)


def _expert_s(work: Work, b: float, links: Links) -> float:
    """Seconds of one direction in which tokens travel to their experts and back."""
    if links.ep == 1 or not work.dispatched.sample:
        return 0.0
    return 2 * links.ep_exchange_s(EXPERT_SKEW * work.dispatched.at(b))


def _bound_s(
    kernels: Sequence[Kernel], seconds: Sequence[float], device: DeviceClass
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds, forward and backward, of memory-bound kernels, and of launches where a kernel's time holds the host's."""
    launch_s = device.op_latency_s if device.kernels is None else 0.0
    memory_s, launches_s = [0.0, 0.0], [0.0, 0.0]
    for kernel, kernel_time_s in zip(kernels, seconds, strict=True):
        launches_s[kernel.is_backward] += launch_s
        if kernel.kind == "moved":
            memory_s[kernel.is_backward] += kernel_time_s - launch_s
    return (memory_s[0], memory_s[1]), (launches_s[0], launches_s[1])


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
