"""Small random graphs, and the slow way to place them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from shardstage.planner.placement import PlacementGraph, Tensor, device_memory_bytes, stage_time_s


def random_graph(rng: np.random.Generator, num_nodes: int) -> PlacementGraph:
    """Forward nodes with random edges; sometimes a mirrored backward pass, colours, memory, hosts' times."""
    is_training = bool(rng.random() < 0.4)
    tensors = []
    for node in range(num_nodes):
        heads = [later for later in range(node + 1, num_nodes) if rng.random() < 0.4]
        if heads:
            tensors.append(
                Tensor(producer=node, consumers=tuple(heads), transfer_s=float(rng.integers(0, 4)))
            )
    colours: list[int | None] = [
        int(rng.integers(2)) if rng.random() < 0.3 else None for _ in range(num_nodes)
    ]
    backward = [False] * num_nodes
    if is_training:
        colours = [100 + node if colour is None else colour for node, colour in enumerate(colours)]
        mirrored = [
            Tensor(
                producer=num_nodes + head,
                consumers=(num_nodes + t.producer,),
                transfer_s=float(rng.integers(0, 4)),
            )
            for t in tensors
            for head in t.consumers[:1]
        ]
        tensors += mirrored
        colours += [
            None if rng.random() < 0.15 else colour for colour in colours
        ]  # None: a backward node without a mate
        backward += [True] * num_nodes
    total = len(colours)
    compute_s = tuple(float(rng.integers(0, 6)) for _ in range(total))
    return PlacementGraph(
        compute_s=compute_s,
        tensors=tuple(tensors),
        memory_bytes=tuple(float(rng.integers(0, 5)) for _ in range(total)),
        host_compute_s=tuple(float(one * rng.integers(1, 4)) for one in compute_s),
        colocation=tuple(colours),
        is_backward=tuple(backward),
        on_accelerator=tuple(bool(rng.random() < 0.95) for _ in range(total)),
    )


def assignments(
    graph: PlacementGraph, num_devices: int, num_hosts: int, limit_bytes: float
) -> Iterator[tuple[int, ...]]:
    """Every placement that obeys colours, kinds of device and memory."""
    names = [f"colour {c}" if c is not None else f"node {i}" for i, c in enumerate(graph.colocation)]
    distinct = list(dict.fromkeys(names))
    for choice in itertools.product(range(num_devices + num_hosts), repeat=len(distinct)):
        device_of = tuple(choice[distinct.index(name)] for name in names)
        if any(d < num_devices and not ok for d, ok in zip(device_of, graph.on_accelerator, strict=True)):
            continue
        held = device_memory_bytes(graph, device_of, num_devices=num_devices, num_hosts=num_hosts)
        if max(held[:num_devices]) <= limit_bytes:
            yield device_of


def is_contiguous(graph: PlacementGraph, device_of: tuple[int, ...], num_devices: int) -> bool:
    """Whether some order of the devices sends every forward edge onwards, and mateless backward edges backwards."""
    has_forward = {
        graph.colocation[node] for node in range(graph.num_nodes) if not graph.is_backward[node]
    } - {None}
    pairs = set()
    for tail, head, _ in graph.edges:
        if not graph.is_backward[tail] and not graph.is_backward[head]:
            pairs.add((device_of[tail], device_of[head]))
        elif graph.is_backward[tail] and graph.is_backward[head]:
            if graph.colocation[tail] not in has_forward or graph.colocation[head] not in has_forward:
                pairs.add((device_of[head], device_of[tail]))
    return any(
        all(order[first] <= order[last] for first, last in pairs)
        for order in itertools.permutations(range(num_devices))
    )


def slow_best(
    graph: PlacementGraph,
    num_devices: int,
    *,
    num_hosts: int = 0,
    limit_bytes: float = math.inf,
    contiguous: bool,
) -> float:
    """The least stage time of all placements, by trying them all; infinite where there is none."""
    best_s = math.inf
    for device_of in assignments(graph, num_devices, num_hosts, limit_bytes):
        time_s = stage_time_s(graph, device_of, num_devices=num_devices, num_hosts=num_hosts)
        if time_s < best_s and (not contiguous or is_contiguous(graph, device_of, num_devices + num_hosts)):
            best_s = time_s
    return best_s


@pytest.fixture
def make_graph() -> Callable[[np.random.Generator, int], PlacementGraph]:
    return random_graph


@pytest.fixture
def slow() -> Callable[..., float]:
    return slow_best
