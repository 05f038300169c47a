"""The timelines of a run: one step as it was measured, and as the simulator expects it, on files of the run folder."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from shardstage.cluster import Cluster
from shardstage.errors import CheckpointError
from shardstage.program import lower
from shardstage.runtime.c_allocator import give_back_free_memory
from shardstage.runtime.engine import Engine
from shardstage.runtime.peak_memory import resident_bytes
from shardstage.runtime.recorder import Recorder
from shardstage.simulator import planned_prices, simulate
from shardstage.timeline import MemorySample, Span, Timeline
from shardstage.timeline.file import save_timeline
from shardstage.training.folder import RunFolder
from shardstage.training.job import TrainJob
from shardstage.training.state import kept_bytes

__all__ = ["begin_recording", "write_measured_timeline", "write_predicted_timeline"]


class _Recorded(NamedTuple):
    """What one rank measured: where its clock stood, and spans and memory from there on."""

    host: str
    origin_s: float
    spans: tuple[Span, ...]
    memory: tuple[MemorySample, ...]


def begin_recording(engine: Engine) -> Recorder:
    """From now on the engine takes the times of its instructions, and what it holds after each."""
    give_back_free_memory()
    kept, before = kept_bytes(engine), resident_bytes()

    def held() -> int:
        if engine.device.type == "cuda":
            return torch.cuda.memory_allocated(engine.device)
        return kept + max(0, resident_bytes() - before)

    recorder = engine.recorder = Recorder(engine.groups.rank, engine.device, held)
    return recorder


def write_measured_timeline(engine: Engine, recorder: Recorder, job: TrainJob) -> None:
    """Gathers the last step that all ranks recorded on rank 0, which writes it.

    Ranks of a host share its clock. Between hosts clocks are not compared: each host begins with its first rank.
    """
    mine = _Recorded(socket.gethostname(), recorder.origin_s, recorder.spans(), recorder.memory())
    everyone: list[_Recorded] = engine.groups.gather(mine)
    if engine.groups.rank == 0:
        _save(_together(everyone, engine), RunFolder(path=Path(job.folder)).measured_timeline)


def write_predicted_timeline(job: TrainJob, cluster: Cluster) -> None:
    """Simulates a step of the run's plan on ``cluster``."""
    prices = planned_prices(job.graph, job.plan, cluster)
    timeline = simulate(lower(job.graph, job.plan), prices, prices.holdings)
    _save(timeline, RunFolder(path=Path(job.folder)).predicted_timeline)


def _together(everyone: list[_Recorded], engine: Engine) -> Timeline:
    first: dict[str, float] = {}
    for recorded in everyone:
        first[recorded.host] = min(recorded.origin_s, first.get(recorded.host, recorded.origin_s))
    mesh = engine.groups.mesh
    spans, memory = [], []
    for recorded in everyone:
        late_s = recorded.origin_s - first[recorded.host]
        spans += [replace(s, start_s=s.start_s + late_s, end_s=s.end_s + late_s) for s in recorded.spans]
        memory += [replace(m, time_s=m.time_s + late_s) for m in recorded.memory]
    return Timeline(
        source="measured",
        spans=tuple(sorted(spans, key=lambda s: (s.rank, s.stream, s.start_s))),
        memory=tuple(memory),
        alike={rank: (rank,) for rank in range(mesh.world_size)},
        labels={
            rank: " ".join(f"{axis}={mesh.coordinate(rank, axis)}" for axis in ("pp", "dp", "tp"))
            for rank in range(mesh.world_size)
        },
    )


def _save(timeline: Timeline, path: Path) -> None:
    try:
        save_timeline(timeline, path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}", hint=f"df -h {path.parent}"
        ) from error
