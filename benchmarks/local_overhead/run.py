"""Hybrid-parallel training on this machine against one process with all cores and against torch's own ways.

python benchmarks/local_overhead/run.py [--rounds 9] [--steps 2] [--groups dp,zero3,tp,...] [--out results.json]

Configurations run in groups, each with the one process and the peers of its kind. The ranks of a group are started once, warm up,
and then take turns, a few steps each, round after round: all see the same noise. Fails if any loss differs from the one process's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from job import Build, Configuration, Job, Turn
from ours import OurStep, capture_model, make_plan
from peers import ddp, fsdp2, pipeline, single, tensor_parallel
from phases import Phases
from table import Row, check_losses, phase_table, rows, time_table
from workload import Workload, save_weights

from shardstage.graph import ModelGraph

WARM_UP_STEPS = 2

# Ours by name: the plan that is asked for, ranks, and the peer of the same kind.
PLANS: Mapping[str, tuple[str, int, str]] = {
    "dp": ("dp=2", 2, "DDP"),
    "zero1": ("dp=2,zero=1", 2, "DDP"),
    "zero3": ("dp=2,zero=3", 2, "FSDP2"),
    "tp": ("tp=2", 2, "parallelize_module"),
    "tp+sp": ("tp=2,sp", 2, "parallelize_module+SP"),
    "pp": ("pp=2", 2, "Schedule1F1B"),
    "pp gpipe": ("pp=2,schedule=gpipe", 2, "ScheduleGPipe"),
    "dp4": ("dp=4", 4, "DDP x4"),
    "dp2tp2": ("dp=2,tp=2", 4, ""),
    "dp2pp2": ("dp=2,pp=2", 4, ""),
    "tp2pp2": ("tp=2,pp=2", 4, ""),
    "pp4": ("pp=4", 4, "Schedule1F1B x4"),
    "pp interleaved": ("pp=2,schedule=interleaved-1f1b", 2, "ScheduleInterleaved1F1B"),
    "pp looped-bfs": ("pp=2,schedule=looped-bfs", 2, "ScheduleLoopedBFS"),
    "pp zb-v": ("pp=2,schedule=zb-v", 2, "ScheduleZBVZeroBubble"),
    "pp dualpipe-v": ("pp=2,schedule=dualpipe-v", 2, "ScheduleDualPipeV"),
    "pp zb-h1": ("pp=2,schedule=zb-h1", 2, "Schedule1F1B, even"),
    "pp optimal": ("pp=2,schedule=optimal", 2, "Schedule1F1B, even"),
    "pp4 zb-h1": ("pp=4,schedule=zb-h1", 4, "Schedule1F1B x4, even"),
    "pp4 gpipe": ("pp=4,schedule=gpipe", 4, "ScheduleGPipe x4"),
    "pp4 interleaved": ("pp=4,schedule=interleaved-1f1b", 4, "ScheduleInterleaved1F1B x4"),
    "pp4 zb-v": ("pp=4,schedule=zb-v", 4, "ScheduleZBVZeroBubble x4"),
}
PEERS: Mapping[str, tuple[Build, int]] = {
    "DDP": (ddp.build, 2),
    "FSDP2": (fsdp2.build, 2),
    "parallelize_module": (tensor_parallel.build, 2),
    "parallelize_module+SP": (tensor_parallel.build_sequence_parallel, 2),
    "Schedule1F1B": (partial(pipeline.build, "1f1b"), 2),
    "Schedule1F1B, even": (partial(pipeline.build, "1f1b", is_even=True), 2),
    "ScheduleGPipe": (partial(pipeline.build, "gpipe"), 2),
    "ScheduleInterleaved1F1B": (partial(pipeline.build, "interleaved-1f1b"), 2),
    "ScheduleLoopedBFS": (partial(pipeline.build, "looped-bfs"), 2),
    "ScheduleZBVZeroBubble": (partial(pipeline.build, "zb-v"), 2),
    "ScheduleDualPipeV": (partial(pipeline.build, "dualpipe-v"), 2),
    "DDP x4": (ddp.build, 4),
    "Schedule1F1B x4": (partial(pipeline.build, "1f1b"), 4),
    "Schedule1F1B x4, even": (partial(pipeline.build, "1f1b", is_even=True), 4),
    "ScheduleGPipe x4": (partial(pipeline.build, "gpipe"), 4),
    "ScheduleInterleaved1F1B x4": (partial(pipeline.build, "interleaved-1f1b"), 4),
    "ScheduleZBVZeroBubble x4": (partial(pipeline.build, "zb-v"), 4),
}
GROUPS: Mapping[str, tuple[str, ...]] = {
    "dp": ("dp", "zero1"),
    "zero3": ("zero3",),
    "tp": ("tp", "tp+sp"),
    "pp": ("pp", "pp gpipe"),
    "four": ("dp4", "dp2tp2", "dp2pp2"),
    "four stages": ("tp2pp2", "pp4"),
    "looped": ("pp interleaved", "pp looped-bfs"),
    "v": ("pp zb-v", "pp dualpipe-v"),
    "even": ("pp zb-h1", "pp optimal"),
    "looped four": ("pp4 gpipe", "pp4 interleaved"),
    "v four": ("pp4 zb-v", "pp4 zb-h1"),
}


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    rows: tuple[Row, ...]
    phases: Mapping[str, Phases]
    worst_loss_difference: float
    load_average: float


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        workload = Workload(folder=Path(folder), num_layers=options.layers, global_batch=options.batch)
        save_weights(workload)
        graph = capture_model(workload)
        print(f"{_machine()}\n{_description(workload)}\n", flush=True)
        results = {}
        for name in options.groups.split(","):
            held = configurations(GROUPS[name], graph, workload)
            results[name] = run_group(held, workload, rounds=options.rounds, steps=options.steps)
            _print(name, results[name])
    _save(options.out, results)


def configurations(names: Sequence[str], graph: ModelGraph, workload: Workload) -> list[Configuration]:
    """The one process, then each of ours with its peer, every peer once."""
    cores = len(os.sched_getaffinity(0))
    found = [Configuration(name="single", build=single.build, num_ranks=1, backend="", threads=cores)]
    for name in names:
        shorthand, num_ranks, peer = PLANS[name]
        plan = make_plan(shorthand, graph, workload, num_ranks=num_ranks)
        build = OurStep(graph=graph, plan=plan).build
        found.append(
            Configuration(name=name, build=build, num_ranks=num_ranks, backend="shardstage", peer=peer)
        )
        if peer and all(each.name != peer for each in found):
            build_peer, peer_ranks = PEERS[peer]
            found.append(Configuration(name=peer, build=build_peer, num_ranks=peer_ranks, backend="gloo"))
    return found


def run_group(held: Sequence[Configuration], workload: Workload, *, rounds: int, steps: int) -> GroupResult:
    """Rounds in which every configuration has its turn, then one profiled step each."""
    turns: dict[str, list[Turn]] = {each.name: [] for each in held}
    warm_ups: dict[str, list[Turn]] = {}
    with ExitStack() as stack:
        jobs = []
        for each in held:
            job = stack.enter_context(closing(Job(each, workload)))
            warm_ups[each.name] = [job.turn(0, WARM_UP_STEPS)]
            jobs.append(job)
        for number in range(rounds):
            for job in jobs:
                first_step = WARM_UP_STEPS + number * steps
                turns[job.configuration.name].append(job.turn(first_step, steps))
        load = os.getloadavg()[0]
        last = WARM_UP_STEPS + rounds * steps
        profiled = {job.configuration.name: job.turn(last, 1, has_phases=True) for job in jobs}
    worst = check_losses({name: [*warm_ups[name], *turns[name], profiled[name]] for name in turns})
    phases = {name: turn.phases for name, turn in profiled.items() if turn.phases is not None}
    return GroupResult(
        rows=tuple(rows(held, turns)), phases=phases, worst_loss_difference=worst, load_average=load
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    return parser.parse_args()


def _machine() -> str:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{len(os.sched_getaffinity(0))} cores, {platform.platform()}, {versions}"


def _description(workload: Workload) -> str:
    tokens = workload.global_batch * workload.sequence
    return (
        f"Llama of {workload.num_layers} layers, hidden {workload.hidden}, vocabulary {workload.vocabulary}; "
        f"{workload.global_batch} samples of {workload.sequence} tokens = {tokens} tokens a step, float32"
    )


def _print(name: str, result: GroupResult) -> None:
    print(f"## {name}\n\n{time_table(result.rows)}\n")
    print(f"Milliseconds of rank 0, profiled:\n\n{phase_table(result.phases)}\n")
    print(
        f"Losses agree within {result.worst_loss_difference:.1e}; load average {result.load_average:.1f}.\n",
        flush=True,
    )


def _save(path: Path, results: Mapping[str, GroupResult]) -> None:
    document = {
        "machine": _machine(),
        "command": sys.argv[1:],
        "groups": {name: asdict(result) for name, result in results.items()},
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
