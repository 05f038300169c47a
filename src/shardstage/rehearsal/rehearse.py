"""``rehearse``: lower, prove, simulate, and execute each kind of rank on tensors without memory."""

from __future__ import annotations

import pickle
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from multiprocessing import get_context
from typing import Final, Literal

import torch

from shardstage.cluster import Cluster, DeviceClass
from shardstage.errors import ProgramError
from shardstage.graph import ModelGraph
from shardstage.graph.source import ModelSource
from shardstage.plan import Plan
from shardstage.program import Program, StageGraphs, lower, verify
from shardstage.rehearsal.counts import counts_of
from shardstage.rehearsal.rehearsal import RankRehearsal, Rehearsal
from shardstage.rehearsal.stored import Stored, stored
from shardstage.runtime.dry_run import dry_run
from shardstage.runtime.dry_run_compare import compare_with_program, distinct_ranks
from shardstage.runtime.optimizer import OptimizerConfig
from shardstage.simulator import Holdings, peak_holders, planned_prices, simulate
from shardstage.timeline import Timeline

__all__ = ["Which", "rehearse"]

Which = Literal["distinct", "all", "none"]
"""The ranks to execute: one of each kind, every one, or none."""

STARTING_S: Final = 6.0
"""Less work than this left is done sooner than another process is ready: it imports torch and reads the graph."""

Progress = Callable[[str], None]


def rehearse(
    graph: ModelGraph,
    plan: Plan,
    source: ModelSource,
    cluster: Cluster,
    *,
    which: Which = "distinct",
    optimizer: OptimizerConfig | None = None,
    reload: Callable[[], ModelSource] | None = None,
    num_processes: int = 1,
    progress: Progress = lambda _: None,
) -> Rehearsal:
    """Tries out a checked plan. Raises ``ProgramError`` where the proof fails; what the engine does otherwise than the Program is a result.

    With ``reload``, which finds ``source`` again and can be pickled, ranks are executed by up to ``num_processes`` processes;
    ``progress`` is told what is going on.
    """
    progress("writing down the program")
    stages = _stage_graphs(graph, plan)
    program = lower(graph, plan, stages)
    progress(f"proving it for {plan.mesh.world_size} ranks")
    verify(program)
    progress("simulating a step")
    prices = planned_prices(graph, plan, cluster, stages=stages)
    timeline = simulate(program, prices, prices.holdings)
    work = _Work(
        graph=graph,
        plan=plan,
        program=program,
        optimizer=optimizer or OptimizerConfig(),
        device=cluster.device,
        stages=stages,
    )
    found = {rank.rank: rank for rank in _predicted(program, timeline, prices.holdings)}
    ranks = {"distinct": distinct_ranks(program), "all": range(plan.mesh.world_size), "none": ()}[which]
    for number, executed in enumerate(_executed(work, source, ranks, reload, num_processes), start=1):
        progress(f"dry run of {number} of {len(ranks)} ranks")
        found[executed.rank] = _joined(executed, found.get(executed.rank), timeline, alone=which == "all")
    if which == "all":
        found = {rank: found[rank] for rank in ranks}
    if ranks:
        _require_all_stored(program, found.values())
    return Rehearsal(
        plan=plan,
        program=program,
        counts=counts_of(program),
        timeline=timeline,
        ranks=tuple(found[rank] for rank in sorted(found)),
    )


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What an execution of a rank needs, whichever process does it; stage graphs are made where there are none."""

    graph: ModelGraph
    plan: Plan
    program: Program
    optimizer: OptimizerConfig
    device: DeviceClass
    stages: StageGraphs | None = field(default=None, repr=False)

    def execute(self, source: ModelSource, rank: int) -> RankRehearsal:
        run = dry_run(
            self.graph,
            self.plan,
            source,
            rank=rank,
            optimizer=self.optimizer,
            program=self.program,
            graphs=self.stages,
            device_kind=self.device.kind,
            compute_capability=self.device.compute_capability,
            inspect=stored,
        )
        peak = run.peak
        assert isinstance(run.inspection, Stored)
        return RankRehearsal(
            rank=rank,
            alike=(rank,),
            stages=self.program.stages_of(self.program.mesh.coordinate(rank, "pp")),
            act=peak.instruction.name,
            held=dict(peak.peak),
            predicted_bytes=0,
            largest=run.largest_at_peak,
            is_executed=True,
            num_microbatches=run.num_microbatches,
            num_executed=len(run.executed),
            difference=compare_with_program(run, self.program),
            stored=run.inspection,
        )


def _predicted(program: Program, timeline: Timeline, holdings: Holdings) -> Iterator[RankRehearsal]:
    """One rank of each kind as the simulator sees it."""
    for rank in distinct_ranks(program):
        row = program.row_of(rank)
        peak = timeline.peak(rank)
        assert peak is not None
        yield RankRehearsal(
            rank=rank,
            alike=tuple(program.mesh.rank(pp=row.pp, dp=dp, tp=tp) for dp in row.dp for tp in row.tp),
            stages=program.stages_of(row.pp),
            act=peak.cause,
            held=dict(peak.bytes_by_category),
            predicted_bytes=peak.total_bytes,
            largest=peak_holders(program, rank, holdings),
        )


def _joined(
    executed: RankRehearsal, predicted: RankRehearsal | None, timeline: Timeline, *, alone: bool
) -> RankRehearsal:
    """What was executed, with what the simulator says of the rank that stands for it."""
    first = next(first for first, alike in timeline.alike.items() if executed.rank in alike)
    peak = timeline.peak(first)
    assert peak is not None
    alike = executed.alike if alone or predicted is None else predicted.alike
    return replace(executed, alike=alike, predicted_bytes=peak.total_bytes)


def _require_all_stored(program: Program, ranks: Iterable[RankRehearsal]) -> None:
    """Every trained parameter is in the checkpoint of some rank."""
    kept = {fqn for rank in ranks if rank.stored is not None for fqn in rank.stored.whole_bytes}
    lost = [p.fqn for p in program.parameters if p.is_trained and p.fqn not in kept]
    if lost:
        raise ProgramError(
            f"no rank keeps {', '.join(lost[:4])}{' …' if len(lost) > 4 else ''}",
            hint="a checkpoint of this plan would lose them; please report it",
        )


def _executed(
    work: _Work,
    source: ModelSource,
    ranks: Sequence[int],
    reload: Callable[[], ModelSource] | None,
    num_processes: int,
) -> Iterator[RankRehearsal]:
    """The first rank here; the others in processes of their own where that is sooner done."""
    if not ranks:
        return
    began = time.monotonic()
    yield work.execute(source, ranks[0])
    rest = ranks[1:]
    seconds_left = (time.monotonic() - began) * len(rest)
    num_workers = min(num_processes, len(rest))
    if reload is None or num_workers < 2 or seconds_left < 2 * STARTING_S:
        yield from (work.execute(source, rank) for rank in rest)
        return
    handed = pickle.dumps((replace(work, stages=None), reload))
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=_begin) as pool:
        try:
            yield from pool.map(partial(_execute_handed, handed), rest)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word: the parent says it
    torch.set_num_threads(1)


def _execute_handed(handed: bytes, rank: int) -> RankRehearsal:
    work, source = _unpacked(handed)
    return work.execute(source, rank)


@cache
def _unpacked(handed: bytes) -> tuple[_Work, ModelSource]:
    """What a process that was started for it executes ranks with; stage graphs are made sooner than they are read."""
    work, reload = pickle.loads(handed)
    return replace(work, stages=_stage_graphs(work.graph, work.plan)), reload()


def _stage_graphs(graph: ModelGraph, plan: Plan) -> StageGraphs:
    """Blocks run as they are: compiled ones say the same to other ranks, and a compiler needs numbers to compile for."""
    return StageGraphs(graph, replace(plan, is_compiled=False))
