"""Runs the partitioners of others on one hypergraph; started by run.py under a Python that has them, away from the project's own.

In on standard input: ``{"num_parts", "weights": [n], "nets": [[pins]], "net_costs": [nets], "imbalances", "seeds", "scotch"}``.
Out on standard output: ``[{"peer", "imbalance", "seed", "seconds", "parts": [n]} …]``;
``{"peer", "missing": why}`` for what is not there. Every peer gets the same graph; those for graphs get the clique
expansion, cost / (size - 1) an edge. Weights and costs are scaled to integers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Edges = dict[tuple[int, int], int]
Runner = Callable[[dict[str, Any], Edges, float, int], list[int]]


def main() -> None:
    problem = json.load(sys.stdin)
    edges = clique_edges(problem)
    results = [result for peer, run in PEERS.items() for result in runs_of(peer, run, problem, edges)]
    json.dump(results, sys.stdout)


def runs_of(peer: str, run: Runner, problem: dict[str, Any], edges: Edges) -> Iterator[dict[str, Any]]:
    """One result for each imbalance and seed; or the reason why there is none."""
    for imbalance in problem["imbalances"]:
        for seed in problem["seeds"]:
            began = time.perf_counter()
            try:
                parts = run(problem, edges, imbalance, seed)
            except (ImportError, OSError) as error:
                yield {"peer": peer, "missing": str(error)}
                return
            except (RuntimeError, subprocess.CalledProcessError) as error:
                yield {"peer": peer, "failed": f"imbalance {imbalance}, seed {seed}: {error}"}
                continue
            took_s = time.perf_counter() - began
            yield {
                "peer": peer,
                "imbalance": imbalance,
                "seed": seed,
                "seconds": took_s,
                "parts": [int(p) for p in parts],
            }


def clique_edges(problem: dict[str, Any]) -> Edges:
    """Integer weight of each pair of pins that share a net."""
    weights: dict[tuple[int, int], float] = {}
    for pins, cost in zip(problem["nets"], problem["net_costs"], strict=True):
        for index, one in enumerate(pins):
            for other in pins[index + 1 :]:
                pair = (min(one, other), max(one, other))
                weights[pair] = weights.get(pair, 0.0) + cost / (len(pins) - 1)
    unit = scale(list(weights.values()))
    return {pair: max(1, round(weight * unit)) for pair, weight in weights.items()}


def scale(values: list[float]) -> float:
    """What makes the largest of ``values`` 1e5, so that sums stay within 31 bits."""
    return 1e5 / (max(values, default=0.0) or 1.0)


def whole(values: list[float], *, least: int) -> list[int]:
    unit = scale(values)
    return [max(least, round(value * unit)) for value in values]


def adjacency(problem: dict[str, Any], edges: Edges) -> tuple[list[int], list[int], list[int]]:
    """The graph in compressed rows: starts, neighbours, edge weights."""
    rows: list[list[tuple[int, int]]] = [[] for _ in problem["weights"]]
    for (one, other), weight in edges.items():
        rows[one].append((other, weight))
        rows[other].append((one, weight))
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    flat = [pair for row in rows for pair in row]
    return starts, [other for other, _ in flat], [weight for _, weight in flat]


def run_metis(problem: dict[str, Any], edges: Edges, imbalance: float, seed: int) -> list[int]:
    import pymetis

    starts, neighbours, weights = adjacency(problem, edges)
    options = pymetis.Options(seed=seed, ufactor=max(1, round(1000 * imbalance)))
    _, parts = pymetis.part_graph(
        problem["num_parts"],
        xadj=starts,
        adjncy=neighbours,
        vweights=whole(problem["weights"], least=0),
        eweights=weights,
        options=options,
    )
    return list(parts)


def run_kahip(problem: dict[str, Any], edges: Edges, imbalance: float, seed: int) -> list[int]:
    import kahip

    starts, neighbours, weights = adjacency(problem, edges)
    vertex_weights = whole(problem["weights"], least=0)
    strong = 2
    _, parts = kahip.kaffpa(
        vertex_weights, starts, weights, neighbours, problem["num_parts"], imbalance, True, seed, strong
    )
    return list(parts)


def run_mt_kahypar(problem: dict[str, Any], edges: Edges, imbalance: float, seed: int) -> list[int]:
    import mtkahypar

    library = mtkahypar.initialize(1)
    mtkahypar.set_seed(seed)
    context = library.context_from_preset(mtkahypar.PresetType.QUALITY)
    context.set_partitioning_parameters(problem["num_parts"], imbalance, mtkahypar.Objective.SOED)
    context.logging = False
    graph = library.create_hypergraph(
        context,
        len(problem["weights"]),
        len(problem["nets"]),
        problem["nets"],
        whole(problem["weights"], least=0),
        whole(problem["net_costs"], least=1),
    )
    partitioned = graph.partition(context)
    return [partitioned.block_id(one) for one in range(len(problem["weights"]))]


def run_scotch(problem: dict[str, Any], edges: Edges, imbalance: float, seed: int) -> list[int]:
    """``gpart`` on a graph file with vertex and edge weights (the 011 format)."""
    if not problem["scotch"]:
        raise OSError("no --scotch given")
    starts, neighbours, weights = adjacency(problem, edges)
    sizes = whole(problem["weights"], least=0)
    lines = ["0", f"{len(sizes)} {len(neighbours)}", "0 011"]
    for one, size in enumerate(sizes):
        row = range(starts[one], starts[one + 1])
        lines.append(f"{size} {len(row)} " + " ".join(f"{weights[i]} {neighbours[i]}" for i in row))
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "graph.grf", Path(folder) / "graph.map"
        source.write_text("\n".join(lines) + "\n")
        command = [problem["scotch"], str(problem["num_parts"]), str(source), str(target), f"-b{imbalance}"]
        subprocess.run(command, check=True, capture_output=True)
        pairs = [line.split() for line in target.read_text().splitlines()[1:]]
    part_of = {int(one): int(part) for one, part in pairs}
    return [part_of[one] for one in range(len(sizes))]


def run_networkx(problem: dict[str, Any], edges: Edges, imbalance: float, seed: int) -> list[int]:
    """Kernighan–Lin bisection, again and again of the heaviest part (it balances numbers of nodes, not weights)."""
    import networkx
    from networkx.algorithms.community import kernighan_lin_bisection

    graph = networkx.Graph()
    graph.add_nodes_from(range(len(problem["weights"])))
    graph.add_weighted_edges_from((one, other, weight) for (one, other), weight in edges.items())
    parts = [set(graph.nodes)]
    while len(parts) < problem["num_parts"]:
        splittable = [part for part in parts if len(part) > 1]
        if not splittable:
            break
        heaviest = max(splittable, key=lambda part: sum(problem["weights"][one] for one in part))
        parts.remove(heaviest)
        parts.extend(
            set(half) for half in kernighan_lin_bisection(graph.subgraph(heaviest), seed=seed, max_iter=50)
        )
    part_of = {one: index for index, part in enumerate(parts) for one in part}
    return [part_of[one] for one in range(len(problem["weights"]))]


PEERS: dict[str, Runner] = {
    "METIS": run_metis,
    "KaHIP": run_kahip,
    "mt-KaHyPar": run_mt_kahypar,
    "Scotch": run_scotch,
    "networkx KL": run_networkx,
}

if __name__ == "__main__":
    main()
