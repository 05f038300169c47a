"""Simulated against measured: step time and peak memory of every schedule, on even and uneven stages.

python benchmarks/simulator_fidelity/run.py [--ranks 2] [--steps 12] [--json FILE]

For each set of stages one run is measured (a 1F1B order, or its interleaved form where a rank has several stages, in which every other
backward is cut in two), what its instructions took are the prices, and every schedule of the same stages is predicted from them. All are
run in turn, step by step, and each step of the reference predicts those of the same round, so that what else the machine does meets
prediction and measurement alike. Memory is predicted from the plan alone, and measured as what torch's allocator hands out.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from cases import Case, cases_of, make_graph, model_file
from torch.profiler import ProfilerActivity, profile, record_function

from shardstage.cluster import load
from shardstage.data import Microbatch
from shardstage.graph import ModelGraph
from shardstage.graph.source import load_model
from shardstage.plan.plan import Plan
from shardstage.program import Program, lower
from shardstage.runtime.build import build_engine
from shardstage.runtime.engine import Engine
from shardstage.runtime.environment import RankEnvironment, join_world
from shardstage.runtime.launch import launch
from shardstage.runtime.optimizer import OptimizerConfig
from shardstage.runtime.recorder import Recorder
from shardstage.simulator import measured_prices, peak_bytes, planned_prices, step_time
from shardstage.timeline import Span, Timeline
from shardstage.training.state import kept_bytes

NUM_WARM_UPS = 2
SEQUENCE = 128


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: seconds and bytes, simulated and measured; bytes are those of the fullest rank.

    ``time_error`` is the median over the rounds, in each of which the reference's step predicts the other schedules'.
    """

    case: str
    simulated_s: float
    measured_s: float
    time_error: float
    simulated_bytes: int
    measured_bytes: int

    @property
    def memory_error(self) -> float:
        return self.simulated_bytes / self.measured_bytes - 1


def main() -> None:
    """Measures, predicts, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--only", default="", help="cases whose name has this, and the references of their stages"
    )
    parser.add_argument("--json", type=Path, help="where to write the table")
    parser.add_argument("--spans", type=Path, help="where to write everything that was measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = model_file(folder)
        graph = make_graph(model, SEQUENCE)
        cases = cases_of(graph, num_ranks=options.ranks, sequence=SEQUENCE)
        cases = [c for i, c in enumerate(cases) if options.only in c.name or is_reference(cases, i)]
        cases = [c for c in cases if any(options.only in o.name for o in cases if o.reference == c.reference)]
        out = folder / "measured.json"
        launch(
            measure,
            (graph, str(model), cases, options.steps, str(out)),
            num_ranks=options.ranks,
            log_dir=folder / "logs",
            threads_per_rank=1,
        )
        measured = json.loads(out.read_text())
        if options.spans:
            options.spans.write_text(json.dumps({"cases": [case.name for case in cases], **measured}))
    rows = list(compare(graph, cases, measured, options.ranks))
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([row.__dict__ for row in rows], indent=1))


def is_reference(cases: Sequence[Case], index: int) -> bool:
    """Whether the case is the first of its stages."""
    return all(other.reference != cases[index].reference for other in cases[:index])


def measure(
    environment: RankEnvironment,
    graph: ModelGraph,
    model: str,
    cases: Sequence[Case],
    num_steps: int,
    out: str,
) -> None:
    """One rank: rank 0 writes, for each case, the spans of every step and the peak bytes of every rank."""
    join_world(environment, device="cpu", backend="shardstage", timeout_s=120)
    engines = [engine_of(graph, case.plan, model, environment.rank) for case in cases]
    batches = [batches_of(engine) for engine in engines]
    peaks = [peak_of(engine, batch) for engine, batch in zip(engines, batches, strict=True)]
    spans: list[list[list[Span]]] = [[] for _ in cases]
    for number in range(NUM_WARM_UPS + num_steps):
        for case, (engine, batch) in enumerate(zip(engines, batches, strict=True)):
            found = recorded(engine, batch, number)
            if number >= NUM_WARM_UPS:
                spans[case].append(found)
    if environment.rank == 0:
        plain = [[[astuple(span) for span in step] for step in steps] for steps in spans]
        Path(out).write_text(json.dumps({"spans": plain, "peaks": peaks}))


def recorded(engine: Engine, batches: list[Microbatch], number: int) -> list[Span]:
    """The spans of all ranks in one step, on rank 0's axis: ranks of a host share their clock."""
    recorder = engine.recorder = Recorder(engine.groups.rank, engine.device)
    dist.barrier()
    engine.step(number, batches)
    engine.recorder = None
    origins = engine.groups.gather(recorder.origin_s)
    return [span for spans in engine.groups.gather(recorder.spans(min(origins))) for span in spans]


def peak_of(engine: Engine, batches: list[Microbatch]) -> list[int]:
    """Peak bytes of every rank in a step after the first, which makes the optimizer's state: what stays between steps, and by how much
    the tensors that torch's allocator makes and frees in a step grow beyond what is there at its beginning."""
    engine.step(0, batches)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine.step(1, batches)
        with record_function("the measured step"):
            engine.step(2, batches)
    live = before = peak = 0
    has_begun = False
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "the measured step":
            has_begun, before, peak = True, live, live
        elif event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live) if has_begun else 0
    return list(engine.groups.gather(kept_bytes(engine) + peak - before))


def engine_of(graph: ModelGraph, plan: Plan, model: str, rank: int) -> Engine:
    return build_engine(
        graph,
        plan,
        load_model(model),
        rank=rank,
        seed=0,
        optimizer=OptimizerConfig(lr=1e-4, max_grad_norm=1.0),
        device=torch.device("cpu"),
    )


def batches_of(engine: Engine) -> list[Microbatch]:
    generator, plan, start, found = torch.Generator().manual_seed(0), engine.plan, 0, []
    vocabulary = engine.graphs.graph.values[engine.graphs.graph.parameters[0].name].shape[0]
    for size in plan.microbatches(0):
        ids = torch.randint(0, vocabulary, (size, SEQUENCE + 1), generator=generator)
        positions = tuple(range(start, start + size))
        found.append(
            Microbatch(
                sample_ids=positions,
                positions=positions,
                tensors={"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()},
                num_targets=size * SEQUENCE,
            )
        )
        start += size
    return found


def compare(
    graph: ModelGraph, cases: Sequence[Case], measured: dict[str, list[Any]], num_ranks: int
) -> Iterator[Row]:
    """Each case against what the reference of its stages predicts."""
    timelines = [
        [Timeline(source="measured", spans=tuple(Span(*span) for span in step)) for step in steps]
        for steps in measured["spans"]
    ]
    cores = os.cpu_count() or 1
    num_cores = cores if num_ranks > cores else None
    programs = [lower(graph, case.plan) for case in cases]
    for index, case in enumerate(cases):
        reference = next(at for at, other in enumerate(cases) if other.reference == case.reference)
        simulated_s = [
            step_time(programs[index], measured_prices([step], programs[reference], num_cores=num_cores))
            for step in timelines[reference]
        ]
        measured_s = [step_s(step) for step in timelines[index]]
        yield Row(
            case=case.name,
            simulated_s=median(simulated_s),
            measured_s=median(measured_s),
            time_error=median(s / m for s, m in zip(simulated_s, measured_s, strict=True)) - 1,
            simulated_bytes=planned_peak(graph, case.plan, programs[index]),
            measured_bytes=max(measured["peaks"][index]),
        )


def step_s(timeline: Timeline) -> float:
    return timeline.step_time_s - min(span.start_s for span in timeline.spans)


def planned_peak(graph: ModelGraph, plan: Plan, program: Program) -> int:
    holdings = planned_prices(graph, plan, load("a100-40" + f":{plan.mesh.world_size}")).holdings
    return max(peak_bytes(program, rank, holdings) for rank in range(plan.mesh.world_size))


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| case | simulated | measured | error | simulated | measured | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.case} | {row.simulated_s * 1e3:.1f} ms | {row.measured_s * 1e3:.1f} ms | {row.time_error:+.1%} "
            f"| {row.simulated_bytes / 2**20:.1f} MiB | {row.measured_bytes / 2**20:.1f} MiB | {row.memory_error:+.1%} |"
        )
    times, memory = [abs(row.time_error) for row in rows], [abs(row.memory_error) for row in rows]
    lines.append(
        f"\nstep time: median error {median(times):.1%}, worst {max(times):.1%}; "
        f"peak memory: median {median(memory):.1%}, worst {max(memory):.1%}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
