"""``UnitCosts``: what a unit of a model costs one rank in many cases at once: microbatches, and ranks that share sequences or experts.

A search asks for thousands of cases of the same few units, so the figures are arrays over them; a prediction asks for one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shardstage.cluster import CollectiveKind, DeviceClass
from shardstage.cluster.links import LinearCost
from shardstage.cost.compute import added_launch_s, dispatch_s, kernels_s, launched_s
from shardstage.cost.kernels import Kernel
from shardstage.cost.links import Links, each_exposed_s
from shardstage.cost.reading import Again, Bytes, Recompute, Work

__all__ = ["Cases", "KeptOf", "UnitCost", "UnitCosts", "costs_of_unit"]

Array = npt.NDArray[np.float64]

EXPERT_SKEW: Final = 1.1
"""The fullest expert's tokens over the mean: routers with a balancing loss stay near it; our estimate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptOf:
    """What a recompute choice means for a unit: bytes kept to backward, seconds to compute the rest again, bytes brought back by that."""

    saved_bytes: int
    recompute_s: float
    extra_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitCost:
    """One unit on one tensor-parallel rank, for one microbatch.

    ``weight_s`` of ``backward_s`` can be put off (W): products that yield weights' gradients. ``tp_*_s`` is talk along tp, ``cp_*_s`` what
    of context parallelism's talk attention does not hide, ``ep_*_s`` tokens on their way to experts and back; compute waits for all of it.
    ``input_bytes`` is what travels to the unit where it begins a stage.
    ``own_elements`` counts the local parameters that no other unit uses, ``expert_elements`` of them an expert layer's experts; ``shared``
    names the others.
    """

    forward_s: float
    backward_s: float
    weight_s: float
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


class LinearCosts(NamedTuple):
    """Collectives of each case: seconds before the first byte, and bytes a second."""

    latency_s: Array
    bytes_per_s: Array

    def seconds(self, num_bytes: Any) -> Any:
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Cases:
    """How a unit is run, an array over cases each: samples of a microbatch, ranks that share its sequences and its experts, and what
    these cost: a step of a ring, dealing out by heads, sending tokens to experts. ``has_whole_experts`` goes for all."""

    microbatch: Array
    cp: Array
    ep: Array
    ring: LinearCosts
    deal: LinearCosts
    exchange: LinearCosts
    overlap_slowdown: float
    has_whole_experts: bool = False

    @property
    def size(self) -> Array:
        """Samples that a rank computes: its part of the sequences costs what so many fewer samples do, attention included, as its queries
        meet all keys."""
        return self.microbatch / self.cp

    @staticmethod
    def of(microbatches: Sequence[float], links: Sequence[Links]) -> Cases:
        """A case for each microbatch, over these links."""
        known = {id(each): each for each in links}
        place = {key: number for number, key in enumerate(known)}
        which, different = np.array([place[id(each)] for each in links]), [*known.values()]

        def talk(costs: Iterable[LinearCost]) -> LinearCosts:
            return LinearCosts(*np.array([*costs], dtype=np.float64)[which].T)

        return Cases(
            microbatch=np.array(microbatches, dtype=np.float64),
            cp=np.array([each.mesh.cp for each in different], dtype=np.float64)[which],
            ep=np.array([each.ep for each in different], dtype=np.float64)[which],
            ring=talk(each.ring_cost for each in different),
            deal=talk(each.deal_cost for each in different),
            exchange=talk(each.exchange_cost for each in different),
            overlap_slowdown=links[0].overlap_slowdown,
            has_whole_experts=links[0].has_whole_experts,
        )

    @staticmethod
    def alone(microbatch: float) -> Cases:
        """One case of ranks that share neither sequences nor experts."""
        one, free = np.ones(1), LinearCosts(np.zeros(1), np.full(1, np.inf))
        size = np.array([microbatch], dtype=np.float64)
        return Cases(
            microbatch=size, cp=one, ep=one, ring=free, deal=free, exchange=free, overlap_slowdown=0.0
        )


class Pair(NamedTuple):
    """Forward and backward."""

    forward: Any
    backward: Any


@dataclass(frozen=True, kw_only=True)
class UnitCosts:
    """``UnitCost`` of one unit, an array over cases for each figure that differs between them."""

    work: Work
    deals_out_experts: Any
    compute_s: Pair
    weight_s: Array
    memory_s: Pair
    host_s: Pair
    tp_s: Pair
    cp_s: Pair
    ep_s: Array
    tp_bytes: Mapping[CollectiveKind, Array]
    input_bytes: Array
    transient_bytes: Array
    expert_elements: Array
    forward_flops: Array
    backward_flops: Array
    saved_bytes: Mapping[Recompute, Array]
    recompute_s: Mapping[Recompute, Array]
    extra_bytes: Mapping[Recompute, Array]

    @property
    def forward_s(self) -> Any:
        """With all waiting for other ranks."""
        return self.compute_s.forward + (self.tp_s.forward + self.cp_s.forward + self.ep_s)

    @property
    def backward_s(self) -> Any:
        return self.compute_s.backward + (self.tp_s.backward + self.cp_s.backward + self.ep_s)

    def shared_elements(self, elements: Mapping[str, int]) -> int:
        """Of these parameters, by name, what the unit shares with others."""
        return sum(elements[name] for name in self.work.shared)

    @property
    def own_elements(self) -> Array:
        found: Array = self.work.own_elements - self.work.expert_elements + self.expert_elements
        return found

    @property
    def replicated_elements(self) -> Array:
        """Those that all replicas hold, and no others: experts that are dealt out have holders of their own."""
        return self.own_elements - np.where(self.deals_out_experts, self.expert_elements, 0.0)

    def at(self, case: int) -> UnitCost:
        """Of one case."""
        work = self.work
        calls = Counter(kind for kind, _, _ in work.calls)
        return UnitCost(
            forward_s=float(self.compute_s.forward[case]),
            backward_s=float(self.compute_s.backward[case]),
            weight_s=float(self.weight_s[case]),
            memory_s=_floats(self.memory_s, case),
            host_s=_floats(self.host_s, case),
            tp_forward_s=float(self.tp_s.forward[case]),
            tp_backward_s=float(self.tp_s.backward[case]),
            tp_bytes=tuple((kind, calls[kind], int(self.tp_bytes[kind][case])) for kind in calls),
            forward_flops=int(self.forward_flops[case]),
            backward_flops=int(self.backward_flops[case]),
            input_bytes=int(self.input_bytes[case]),
            transient_bytes=int(self.transient_bytes[case]),
            own_elements=int(self.own_elements[case]),
            num_parameters=work.num_parameters,
            shared=work.shared,
            kept={
                mode: KeptOf(
                    saved_bytes=int(self.saved_bytes[mode][case]),
                    recompute_s=float(self.recompute_s[mode][case]),
                    extra_bytes=int(self.extra_bytes[mode][case]),
                )
                for mode in work.kept
            },
            expert_elements=int(self.expert_elements[case]),
            cp_forward_s=float(self.cp_s.forward[case]),
            cp_backward_s=float(self.cp_s.backward[case]),
            ep_forward_s=float(self.ep_s[case]),
            ep_backward_s=float(self.ep_s[case]),
        )


def costs_of_unit(
    work: Work,
    cases: Cases,
    device: DeviceClass,
    tp_links: Mapping[CollectiveKind, LinearCost],
    *,
    waits_for_kernels: bool = False,
) -> UnitCosts:
    """``waits_for_kernels``: the host does not run ahead, each launch waits for the kernel before it (CUDA_LAUNCH_BLOCKING)."""
    size = cases.size
    seconds = _seconds(work.kernels, cases, device)
    talk, volume = _tp_talk(work.calls, size, tp_links)
    compute_s, weight_s = _compute_s(seconds, work, talk, device, waits_for_kernels)
    cp_s, ep_s = _context_s(seconds, work, cases), _expert_s(work, cases)
    waits_s = _Waits(cp_s.forward, ep_s, waits_for_kernels)
    again_s = compute_s.forward + talk.forward + cp_s.forward + ep_s
    none = np.zeros_like(size)
    return UnitCosts(
        work=work,
        deals_out_experts=(cases.ep > 1) | cases.has_whole_experts,
        compute_s=compute_s,
        weight_s=weight_s,
        memory_s=Pair(seconds.forward_memory, seconds.backward_memory),
        host_s=Pair(
            seconds.forward_launches + compute_s.forward - seconds.forward,
            seconds.backward_launches + compute_s.backward - seconds.backward,
        ),
        tp_s=talk,
        cp_s=cp_s,
        ep_s=ep_s,
        tp_bytes=volume,
        input_bytes=_bytes_at(work.input_bytes, size),
        transient_bytes=_most_at(work.working_sets, size),
        expert_elements=np.floor(work.expert_elements / cases.ep),
        forward_flops=np.rint(work.forward_flops * size),
        backward_flops=np.rint(work.backward_flops * size),
        saved_bytes={mode: _bytes_at(kept.saved, size) for mode, kept in work.kept.items()},
        recompute_s={
            mode: _again_s(kept.again, cases, device, tp_links, waits_s)
            if kept.again
            else again_s - seconds.forward_products * (1 - kept.flops_ratio)
            if kept.is_recomputed
            else none
            for mode, kept in work.kept.items()
        },
        extra_bytes={mode: _most_at(kept.extras, size) for mode, kept in work.kept.items()},
    )


def _compute_s(
    seconds: _Seconds, work: Work, talk: Pair, device: DeviceClass, waits_for_kernels: bool
) -> tuple[Pair, Array]:
    """Seconds of a unit's kernels and launches, and of what of the backward can be put off (W)."""
    num_forward, num_backward = work.num_kernels
    num_weights = sum(kernel.is_weight for kernel in work.kernels)
    if waits_for_kernels:
        launch_s = dispatch_s(device)
        compute_s = Pair(seconds.forward + launch_s * num_forward, seconds.backward + launch_s * num_backward)
        return compute_s, seconds.weight + launch_s * num_weights
    compute_s = Pair(
        launched_s(seconds.forward, num_forward, talk.forward, device),
        launched_s(seconds.backward, num_backward, talk.backward, device),
    )
    waited_s = compute_s.backward - seconds.backward  # of which W has no more than its own launches
    return compute_s, np.minimum(
        seconds.weight + waited_s, launched_s(seconds.weight, num_weights, 0.0, device)
    )


def _floats(pair: Pair, case: int) -> tuple[float, float]:
    return float(pair.forward[case]), float(pair.backward[case])


def _bytes_at(num_bytes: Bytes, size: Array) -> Array:
    """``Bytes.at`` of all cases."""
    found: Array = np.rint(num_bytes.fixed + num_bytes.sample * size)
    return found


def _most_at(sizes: Sequence[Bytes], size: Array) -> Array:
    found = np.zeros_like(size)
    for each in sizes:
        found = np.maximum(found, _bytes_at(each, size))
    return found


class _Waits(NamedTuple):
    """A unit's waiting in its forward: for keys and values, for its experts; whether each launch waits for the kernel before it."""

    cp_s: Array
    ep_s: Array
    for_kernels: bool


def _again_s(
    again: Again,
    cases: Cases,
    device: DeviceClass,
    tp_links: Mapping[CollectiveKind, LinearCost],
    waits: _Waits,
) -> Array:
    """Seconds of running kernels and calls of named modules again; what attention and experts wait for goes with them."""
    seconds = _seconds(again.kernels, cases, device).forward if again.kernels else np.zeros_like(cases.size)
    talk = _tp_talk(again.calls, cases.size, tp_links)[0].forward
    if waits.for_kernels:
        compute_s = seconds + dispatch_s(device) * len(again.kernels)
    else:
        compute_s = launched_s(seconds, len(again.kernels), talk, device)
    found: Array = compute_s + talk
    if any(kernel.kind == "attention" for kernel in again.kernels):
        found = found + waits.cp_s
    if any(kernel.is_expert for kernel in again.kernels):
        found = found + waits.ep_s
    return found


def _tp_talk(
    calls: Iterable[tuple[CollectiveKind, bool, Bytes]],
    size: Array,
    tp_links: Mapping[CollectiveKind, LinearCost],
) -> tuple[Pair, dict[CollectiveKind, Array]]:
    """Seconds along tp, and bytes of each kind of collective."""
    talk = [np.zeros_like(size), np.zeros_like(size)]
    volume: dict[CollectiveKind, Array] = {}
    for kind, is_backward, moved in calls:
        num_bytes = _bytes_at(moved, size)
        talk[is_backward] = talk[is_backward] + tp_links[kind].seconds(num_bytes)  # type: ignore[arg-type]
        volume[kind] = volume.get(kind, 0.0) + num_bytes
    return Pair(*talk), volume


class _Seconds(NamedTuple):
    """Seconds of a unit's kernels in each case; products include attention, the backward ``weight``."""

    forward: Array
    backward: Array
    weight: Array
    forward_products: Array
    forward_attention: Array
    backward_attention: Array
    forward_memory: Array
    backward_memory: Array
    forward_launches: Array
    backward_launches: Array


def _seconds(kernels: Sequence[Kernel], cases: Cases, device: DeviceClass) -> _Seconds:
    """Seconds by direction and kind; experts apart, as they depend on ``ep``."""
    plain = [kernel for kernel in kernels if not kernel.is_expert]
    experts = [kernel for kernel in kernels if kernel.is_expert]
    sizes, places = np.unique(cases.size, return_inverse=True)
    of_sizes = _sums_of(plain, kernels_s(plain, sizes.tolist(), device), device)
    found = [each[places] for each in of_sizes]
    if experts:
        eps, parts = np.unique(cases.ep, return_inverse=True)
        dealt = [_dealt_out(kernel, int(ep)) for kernel in experts for ep in eps.tolist()]
        table = kernels_s(dealt, sizes.tolist(), device).reshape(len(experts), -1)  # [kernel, ep and size]
        of_parts = _sums_of(experts, table, device)
        found = [a + b[parts * len(sizes) + places] for a, b in zip(found, of_parts, strict=True)]
    return _Seconds(*found)


def _dealt_out(kernel: Kernel, ep: int) -> Kernel:
    """The same product where a rank has its share of the experts, which it reads alone, and the tokens of ``ep`` ranks for them."""
    rows = {kernel.scaled: ep * getattr(kernel, kernel.scaled)} if kernel.scaled in ("m", "k") else {}
    return kernel._replace(
        fixed_bytes=kernel.fixed_bytes / ep, num_products=max(1, kernel.num_products // ep), **rows
    )


def _sums_of(kernels: Sequence[Kernel], table: Any, device: DeviceClass) -> _Seconds:
    """Of seconds [kernel, case]; sums go kernel by kernel. Launches count where a kernel's time holds the host's."""
    launch_s = added_launch_s(device)

    def total(is_counted: Callable[[Kernel], bool], beside_s: float = 0.0) -> Any:
        rows = [number for number, kernel in enumerate(kernels) if is_counted(kernel)]
        return (table[rows] - beside_s).cumsum(axis=0)[-1] if rows else np.zeros(table.shape[1])

    def launches(is_backward: bool) -> Any:
        number = sum(kernel.is_backward is is_backward for kernel in kernels)
        return np.full(table.shape[1], sum([launch_s] * number))

    return _Seconds(
        forward=total(lambda k: not k.is_backward),
        backward=total(lambda k: k.is_backward),
        weight=total(lambda k: k.is_weight),
        forward_products=total(lambda k: not k.is_backward and k.cause == "products"),
        forward_attention=total(lambda k: not k.is_backward and k.kind == "attention"),
        backward_attention=total(lambda k: k.is_backward and k.kind == "attention"),
        forward_memory=total(lambda k: not k.is_backward and k.cause == "memory", launch_s),
        backward_memory=total(lambda k: k.is_backward and k.cause == "memory", launch_s),
        forward_launches=launches(False),
        backward_launches=launches(True),
    )


def _context_s(seconds: _Seconds, work: Work, cases: Cases) -> Pair:
    """Seconds forward and backward that a unit waits for keys and values of other parts of its sequences.

    Ring: they are passed on cp - 1 times beside attention (Liu et al., "Ring Attention", 2023), with their gradients on the way back.
    Ulysses: q, k, v and the result are dealt out by heads and back (Jacobs et al., "DeepSpeed Ulysses", 2023) where each gets a head.
    """
    cp, size = cases.cp, cases.size
    if not work.attention or cp.max(initial=1.0) == 1:
        return Pair(np.zeros_like(size), np.zeros_like(size))
    keys = sum(_bytes_at(each.keys, size) for each in work.attention)
    whole = sum(_bytes_at(each.whole, size) for each in work.attention)
    step_s = cases.ring.seconds(keys)
    ring = Pair(
        each_exposed_s((cp - 1) * step_s, seconds.forward_attention * (cp - 1) / cp, cases.overlap_slowdown),
        each_exposed_s(
            2 * (cp - 1) * step_s, seconds.backward_attention * (cp - 1) / cp, cases.overlap_slowdown
        ),
    )
    exchange_s = cases.deal.seconds(whole)
    is_dealt = min(each.num_heads for each in work.attention) % cp == 0
    is_ring = ~is_dealt | (ring.forward + ring.backward <= exchange_s + exchange_s)
    return Pair(*(np.where(cp > 1, np.where(is_ring, each, exchange_s), 0.0) for each in ring))


def _expert_s(work: Work, cases: Cases) -> Array:
    """Seconds of one direction in which tokens travel to their experts and back."""
    if not work.dispatched.sample:
        return np.zeros_like(cases.size)
    num_bytes = EXPERT_SKEW * _bytes_at(work.dispatched, cases.size)
    found: Array = np.where(cases.ep > 1, 2 * cases.exchange.seconds(num_bytes), 0.0)
    return found
