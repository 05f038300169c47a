"""Simulated against measured step time of dp, tp and pp plans between two hosts on a slow network.

python benchmarks/shaped_network/run.py [--rates 1,5,20] [--steps 8]      (root: it makes network namespaces)

Prices are measured apart from what they predict: computations on ranks whose reductions do nothing (and that of pp on one host), links by
a probe of each shaped network, alone. Then each plan runs on the network, and the simulator says what it takes.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "simulator_fidelity"))

from cases import make_graph, model_file
from network import ADDRESSES, in_host, interface, two_hosts

from shardstage.cluster import LinearCost
from shardstage.cluster.fit import fit_linear
from shardstage.graph import ModelGraph
from shardstage.plan import Plan, check, complete, parse_request
from shardstage.program import Collective, Program, lower
from shardstage.program.instruction import InstructionKind
from shardstage.simulator import MeasuredPrices, Wire, measured_prices, step_time
from shardstage.timeline import Span, Timeline

SEQUENCE, BATCH, VOCABULARY = 128, 16, 2048
PLANS = ("dp=2", "dp=2,zero=1", "tp=2", "tp=2,sp", "pp=2,mb=2", "pp=2,mb=2,schedule=zb-h1")
RANK = Path(__file__).with_name("rank.py")


@dataclass(frozen=True, kw_only=True)
class NetworkPrices:
    """Computations of a silent run, talk at the rates of a probed network."""

    silent: MeasuredPrices
    links: dict[str, LinearCost]
    slowdown: float
    num_cores: int | None = None
    special_ranks: tuple[int, ...] = ()

    def compute_s(self, rank: int, stage: int, kind: InstructionKind, size: int) -> float:
        return self.silent.compute_s(rank, stage, kind, size)

    def collective(self, collective: Collective, group: Sequence[int]) -> Wire:
        cost = self.links[collective.kind]
        return Wire(cost.latency_s, collective.num_bytes / cost.bytes_per_s)

    def transfer(self, num_bytes: int, source: int, target: int) -> Wire:
        cost = self.links["p2p"]
        return Wire(cost.latency_s, num_bytes / cost.bytes_per_s)

    def own_s(self, rank: int, kind: InstructionKind, stage: int | None, num_bytes: int) -> float:
        return self.silent.own_s(rank, kind, stage, num_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="1,5,20", help="Gbit/s")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = model_file(folder)
        graph = make_graph(model, SEQUENCE)
        plans = [plan_of(text, graph) for text in PLANS]
        programs = [lower(graph, plan) for plan in plans]
        asked = {
            "graph": graph,
            "model": str(model),
            "cases": plans,
            "num_steps": options.steps,
            "sequence": SEQUENCE,
            "vocabulary": VOCABULARY,
        }
        silent_run = start(folder, asked, has_network=False)
        silent = [
            measured_prices(timelines_of(steps), program)
            for steps, program in zip(silent_run["steps"], programs, strict=True)
        ]
        print("| Gbit/s | plan | simulated | measured | error |\n|---|---|---|---|---|")
        errors: list[float] = []
        for rate in map(float, options.rates.split(",")):
            with two_hosts(rate):
                found = start(folder, asked, has_network=True)
            errors += list(report(rate, programs, silent, found))
    print(f"\nmedian error {median(errors):.1%}, worst {max(errors):.1%}")


def plan_of(text: str, graph: ModelGraph) -> Plan:
    plan = complete(parse_request(text), graph, num_ranks=2, global_batch=BATCH, sequence=SEQUENCE)
    plan = replace(plan, bucket_bytes=2 << 20)
    check(plan, graph, num_ranks=2)
    return plan


def start(folder: Path, asked: dict[str, Any], *, has_network: bool) -> dict[str, Any]:
    """Runs the two ranks, each on a host of its own or both on this one; returns what rank 0 wrote."""
    job, out = folder / "job", folder / "out.json"
    backend = "gloo" if has_network else "shardstage"
    job.write_bytes(
        pickle.dumps(
            {
                **asked,
                "backend": backend,
                "port": 29511,
                "is_silent": not has_network,
                "has_links": has_network,
            }
        )
    )
    address = ADDRESSES[0] if has_network else "127.0.0.1"
    started = []
    for rank in range(2):
        command = [sys.executable, str(RANK), str(rank), address, str(job), str(out)]
        if has_network:
            command = in_host(rank, ["env", f"GLOO_SOCKET_IFNAME={interface(rank)}", *command])
        started.append(subprocess.Popen(command))
    codes = [each.wait() for each in started]
    if any(codes):
        raise SystemExit(f"the ranks ended with {codes}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def report(
    rate: float, programs: Sequence[Program], silent: Sequence[MeasuredPrices], found: dict[str, Any]
) -> list[float]:
    """Prints a line for each plan; returns the errors."""
    links = {
        kind: fit_linear([size for size, _ in points], [s for _, s in points])
        for kind, points in found["links"].items()
    }
    errors = []
    for text, program, prices, steps in zip(PLANS, programs, silent, found["steps"], strict=True):
        predicted_s = step_time(
            program, NetworkPrices(silent=prices, links=links, slowdown=found["slowdown"])
        )
        measured_s = median(step_s(timeline) for timeline in timelines_of(steps))
        error = predicted_s / measured_s - 1
        errors.append(abs(error))
        print(
            f"| {rate:g} | `{text}` | {predicted_s * 1e3:.1f} ms | {measured_s * 1e3:.1f} ms | {error:+.1%} |",
            flush=True,
        )
    return errors


def timelines_of(steps: Sequence[Sequence[Sequence[Any]]]) -> list[Timeline]:
    return [Timeline(source="measured", spans=tuple(Span(*span) for span in step)) for step in steps]


def step_s(timeline: Timeline) -> float:
    return timeline.step_time_s - min(span.start_s for span in timeline.spans)


if __name__ == "__main__":
    main()
