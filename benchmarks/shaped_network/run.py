"""Simulated against measured step time of dp, tp and pp plans between two hosts on a slow network.

python benchmarks/shaped_network/run.py [--rates 1,5,20] [--steps 8]      (root: it makes network namespaces)

Prices are measured apart from what they predict. Computations: beside every step over the network one is run by the same two processes
whose groups talk through memory, where sums do nothing. Links: by a probe of each shaped network, alone, after a pause each, as messages
of a step have one. The simulator puts them together.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "simulator_fidelity"))

import numpy
from cases import make_graph, model_file
from network import ADDRESSES, in_host, interface, two_hosts

from shardstage.graph import ModelGraph
from shardstage.plan import Plan, check, complete, parse_request
from shardstage.program import Collective, Program, lower
from shardstage.program.instruction import InstructionKind
from shardstage.simulator import MeasuredPrices, Wire, measured_prices, step_time
from shardstage.timeline import Span, Timeline

SEQUENCE, BATCH, VOCABULARY = 256, 16, 2048
PLANS = ("dp=2", "dp=2,zero=1", "tp=2", "tp=2,sp", "pp=2,mb=2", "pp=2,mb=2,schedule=zb-h1")
RANK = Path(__file__).with_name("rank.py")


@dataclass(frozen=True, kw_only=True)
class NetworkPrices:
    """Computations of a silent run, talk at the rates of a probed network."""

    silent: MeasuredPrices
    links: dict[str, list[tuple[int, float]]]
    slowdown: float
    num_cores: int | None = None
    special_ranks: tuple[int, ...] = ()
    classes: tuple[range, ...] = ()
    levels: tuple[str, ...] = ()

    @property
    def overlap_slowdown(self) -> float:
        return self.slowdown - 1.0

    def level_of(self, group: Sequence[int]) -> str:
        return ""

    def compute_s(self, rank: int, stage: int, kind: InstructionKind, size: int) -> float:
        return self.silent.compute_s(rank, stage, kind, size)

    def pace(self, rank: int, stage: int, kind: InstructionKind, size: int) -> float:
        return 1.0

    def collective(self, collective: Collective, group: Sequence[int]) -> Wire:
        return self._wire(collective.kind, collective.num_bytes)

    def transfer(self, num_bytes: int, source: int, target: int) -> Wire:
        return self._wire("p2p", num_bytes)

    def _wire(self, kind: str, num_bytes: int) -> Wire:
        """Between two sizes that were probed on the line that joins them, beyond the largest by its rate."""
        sizes, seconds = zip(*self.links[kind], strict=True)
        if num_bytes >= sizes[-1]:
            return Wire(seconds[0], seconds[-1] * num_bytes / sizes[-1] - seconds[0])
        return Wire(seconds[0], max(0.0, float(numpy.interp(num_bytes, sizes, seconds)) - seconds[0]))

    def own_s(self, rank: int, kind: InstructionKind, stage: int | None, num_bytes: int) -> float:
        return self.silent.own_s(rank, kind, stage, num_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="1,5,20", help="Gbit/s")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path, help="where to write what was measured")
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
        print("| Gbit/s | plan | simulated | measured | error |\n|---|---|---|---|---|")
        errors: list[float] = []
        for rate in map(float, options.rates.split(",")):
            with two_hosts(rate):
                found = start(folder, asked)
            if options.json:
                options.json.with_suffix(f".{rate:g}.json").write_text(json.dumps(found))
            errors += list(report(rate, programs, found))
    print(f"\nmedian error {median(errors):.1%}, worst {max(errors):.1%}")


def plan_of(text: str, graph: ModelGraph) -> Plan:
    plan = complete(parse_request(text), graph, num_ranks=2, global_batch=BATCH, sequence=SEQUENCE)
    check(plan, graph, num_ranks=2)
    return plan


def start(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Runs the two ranks, each on a host of its own; returns what rank 0 wrote."""
    job, out = folder / "job", folder / "out.json"
    job.write_bytes(pickle.dumps({**asked, "port": 29511}))
    started = []
    for rank in range(2):
        command = [sys.executable, str(RANK), str(rank), ADDRESSES[0], str(job), str(out)]
        command = in_host(rank, ["env", f"GLOO_SOCKET_IFNAME={interface(rank)}", *command])
        started.append(subprocess.Popen(command))
    codes = [each.wait() for each in started]
    if any(codes):
        raise SystemExit(f"the ranks ended with {codes}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def report(rate: float, programs: Sequence[Program], found: dict[str, Any]) -> list[float]:
    """Prints a line for each plan; returns the errors: of each the median over rounds, whose silent step predicts the other."""
    links = found["links"]
    for kind, points in links.items():
        shown = ", ".join(f"{size / 2**20:.3g} MiB {seconds * 1e3:.2f} ms" for size, seconds in points)
        print(f"{rate:g} Gbit/s {kind}: {shown}; slowdown {found['slowdown']:.2f}", file=sys.stderr)
    errors = []
    for text, program, rounds in zip(PLANS, programs, found["steps"], strict=True):
        predicted, measured = [], []
        for silent, real in rounds:
            prices = measured_prices([timeline_of(silent)], program)
            network = NetworkPrices(silent=prices, links=links, slowdown=found["slowdown"])
            predicted.append(step_time(program, network))
            measured.append(step_s(timeline_of(real)))
        error = median(p / m for p, m in zip(predicted, measured, strict=True)) - 1
        errors.append(abs(error))
        print(
            f"| {rate:g} | `{text}` | {median(predicted) * 1e3:.1f} ms | {median(measured) * 1e3:.1f} ms | {error:+.1%} |",
            flush=True,
        )
    return errors


def timeline_of(step: Sequence[Sequence[Any]]) -> Timeline:
    return Timeline(source="measured", spans=tuple(Span(*span) for span in step))


def step_s(timeline: Timeline) -> float:
    return timeline.step_time_s - min(span.start_s for span in timeline.spans)


if __name__ == "__main__":
    main()
