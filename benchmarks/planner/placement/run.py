"""Placement of the graphs of Tarnawski et al. (NeurIPS 2020), and the partitioners of others: the tables of README.md.

PYTHONPATH=src python benchmarks/planner/placement/run.py [--peers-python PYTHON] [--scotch GPART] [--only WORD]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardstage.planner.placement import (
    Placement,
    PlacementGraph,
    Tensor,
    device_memory_bytes,
    place,
    place_contiguous,
    stage_time_s,
)
from shardstage.planner.placement.limits import Limits

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "device-placement-graphs"
IMBALANCES = (0.01, 0.03, 0.1, 0.3, 1.0)
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    graph: PlacementGraph
    node_ids: tuple[int, ...]
    num_devices: int
    num_hosts: int
    memory_limit_bytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", help="a Python with pymetis, kahip, mtkahypar and networkx")
    parser.add_argument("--scotch", help="the gpart of Scotch", default="")
    parser.add_argument("--only", help="run the graphs whose name has this word", default="")
    arguments = parser.parse_args()
    if not DATA.is_dir():
        print(f"no graphs at {DATA}: nothing to measure")
        return
    paths = [path for path in sorted(DATA.glob("throughput-inputs/*/*.json")) if arguments.only in str(path)]
    cases = [read_case(path) for path in paths]
    print_contiguous(cases)
    print_experts(cases)
    print_free(cases, arguments.peers_python, arguments.scotch)


def read_case(path: Path) -> Case:
    """A file of msr-fiddle/dnn-partitioning; its times are milliseconds, those of the graph seconds."""
    data = json.loads(path.read_text())
    nodes = data["nodes"]
    number = {node["id"]: index for index, node in enumerate(nodes)}
    users: dict[int, list[int]] = {}
    transfer_s: dict[int, float] = {}
    for edge in data["edges"]:
        tail = number[edge["sourceId"]]
        users.setdefault(tail, []).append(number[edge["destId"]])
        transfer_s[tail] = edge["cost"] / 1e3  # the same on every edge out of a node
    graph = PlacementGraph(
        compute_s=tuple(node["fpgaLatency"] / 1e3 for node in nodes),
        host_compute_s=tuple(node["cpuLatency"] / 1e3 for node in nodes),
        memory_bytes=tuple(float(node.get("size", 0.0)) for node in nodes),
        colocation=tuple(node.get("colorClass") for node in nodes),
        is_backward=tuple(bool(node["isBackwardNode"]) for node in nodes),
        on_accelerator=tuple(bool(node["supportedOnFpga"]) for node in nodes),
        tensors=tuple(
            Tensor(producer=tail, consumers=tuple(heads), transfer_s=transfer_s[tail])
            for tail, heads in users.items()
        ),
    )
    return Case(
        name=f"{path.parent.name.removesuffix('Graphs').lower()} {path.stem.lower().replace('_', ' ')}",
        graph=graph,
        node_ids=tuple(number),
        num_devices=data["maxFPGAs"],
        num_hosts=data["maxCPUs"],
        memory_limit_bytes=data["maxSizePerFPGA"],
    )


def print_contiguous(cases: Sequence[Case]) -> None:
    print(
        "\n| graph | nodes | devices | hosts | stage time (ms) | CPU s | method |\n|---|---|---|---|---|---|---|"
    )
    for case in cases:
        for num_hosts in (case.num_hosts, 0):
            found, took_s = timed(case, num_hosts)
            print(
                f"| {case.name} | {case.graph.num_nodes} | {case.num_devices} | {num_hosts} | {1e3 * found.stage_time_s:.5f}"
                f" | {took_s:.2f} | {found.method} |",
                flush=True,
            )


def timed(case: Case, num_hosts: int) -> tuple[Placement, float]:
    began = time.thread_time()
    found = place_contiguous(
        case.graph, case.num_devices, num_hosts=num_hosts, memory_limit_bytes=case.memory_limit_bytes
    )
    return found, time.thread_time() - began


def print_experts(cases: Sequence[Case]) -> None:
    """Splits by hand, evaluated with our objective; nodes of the backward pass that a split leaves out follow their colour."""
    print("\n| graph | expert's split (ms) | ours, contiguous (ms) |\n|---|---|---|")
    for case in cases:
        model = case.name.removeprefix("layer ").replace(" ", "_")
        names = (f"{model}_expert.json", f"{model.replace('training', 'inference')}_expert.json")
        path = next(
            (DATA / "human-experts" / name for name in names if (DATA / "human-experts" / name).exists()),
            None,
        )
        if path is None or not case.name.startswith("layer"):
            continue
        device_of = expert_devices(case, json.loads(path.read_text()))
        expert_s = stage_time_s(case.graph, device_of, num_devices=case.num_devices, num_hosts=case.num_hosts)
        print(
            f"| {case.name} | {1e3 * expert_s:.3f} | {1e3 * timed(case, case.num_hosts)[0].stage_time_s:.3f} |"
        )


def expert_devices(case: Case, split: dict[str, Any]) -> list[int]:
    placed = {node: device for device, part in enumerate(split["fpgas"]) for node in part["nodes"]}
    placed |= {node: case.num_devices for part in split["cpus"] for node in part["nodes"]}
    of_colour = {
        colour: placed[node]
        for node, colour in zip(case.node_ids, case.graph.colocation, strict=True)
        if node in placed
    }
    return [
        placed.get(node, of_colour[colour])
        for node, colour in zip(case.node_ids, case.graph.colocation, strict=True)
    ]


def print_free(cases: Sequence[Case], peers_python: str | None, scotch: str) -> None:
    peers = ("METIS", "KaHIP", "mt-KaHyPar", "Scotch", "networkx KL")
    print(f"\n| graph | {' | '.join(peers)} | ours (ms) | CPU s | lower bound (ms) | gap | won |")
    print("|---" * (len(peers) + 6) + "|")
    notes: set[str] = set()
    for case in cases:
        best = best_of_peers(case, peers_python, scotch, notes) if peers_python else {}
        began = time.thread_time()
        found = place(case.graph, case.num_devices, memory_limit_bytes=case.memory_limit_bytes)
        took_s = time.thread_time() - began
        columns = " | ".join(f"{1e3 * best[peer]:.3f}" if peer in best else "–" for peer in peers)
        has_won = found.stage_time_s <= min(best.values(), default=math.inf) * (1 + 1e-9)
        print(
            f"| {case.name} | {columns} | {1e3 * found.stage_time_s:.3f} | {took_s:.2f} | {1e3 * found.lower_bound_s:.3f}"
            f" | {100 * found.gap_ratio:.1f} % | {'yes' if has_won else 'NO'} |",
            flush=True,
        )
    for note in sorted(notes):
        print(f"- {note}")


def best_of_peers(case: Case, python: str, scotch: str, notes: set[str]) -> dict[str, float]:
    """Of each peer the least true stage time over all imbalances and seeds, among the partitions that fit in memory."""
    limits = Limits(num_devices=case.num_devices, num_hosts=0, memory_limit_bytes=case.memory_limit_bytes)
    clusters = limits.clusters(case.graph, is_ordered=False)
    problem = {
        "num_parts": case.num_devices,
        "weights": clusters.compute_s.tolist(),
        "nets": clusters.nets,
        "net_costs": clusters.net_cost_s.tolist(),
        "imbalances": IMBALANCES,
        "seeds": SEEDS,
        "scotch": scotch,
    }
    script = Path(__file__).with_name("peers.py")
    done = subprocess.run(
        [python, str(script)], input=json.dumps(problem), capture_output=True, text=True, check=True
    )
    best: dict[str, float] = {}
    for result in json.loads(done.stdout.splitlines()[-1]):
        if "parts" not in result:
            notes.add(f"{result['peer']}: {result.get('missing') or result.get('failed')}")
            continue
        device_of = clusters.spread(result["parts"], case.graph.num_nodes)
        held = device_memory_bytes(case.graph, device_of, num_devices=case.num_devices)
        if max(held) > case.memory_limit_bytes:
            notes.add(
                f"{result['peer']}: some partitions of {case.name} exceed the memory limit and are left out"
            )
            continue
        time_s = stage_time_s(case.graph, device_of, num_devices=case.num_devices)
        best[result["peer"]] = min(time_s, best.get(result["peer"], math.inf))
    return best


if __name__ == "__main__":
    main()
