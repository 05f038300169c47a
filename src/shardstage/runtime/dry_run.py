"""``dry_run``: one rank's step by the real engine and operators, on tensors without memory, in a world without other ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from shardstage.compat import FakeTensorMode, chunks_on_demand, watched_resizes
from shardstage.graph import ModelGraph
from shardstage.graph.source import ModelSource
from shardstage.plan.plan import Plan
from shardstage.program import Instruction, Program, StageGraphs
from shardstage.program.stage_parameters import tie_axis
from shardstage.runtime.build import assemble_engine, tied_ranks
from shardstage.runtime.dry_run_fold import Twins, executed_microbatches, only
from shardstage.runtime.dry_run_memory import HeldTensors, LiveTensors
from shardstage.runtime.dry_run_recorder import Act, DryRunRecorder, Sent
from shardstage.runtime.engine import Engine
from shardstage.runtime.fake_world import fake_world
from shardstage.runtime.groups import RankGroups, build_groups
from shardstage.runtime.optimizer import OptimizerConfig
from shardstage.runtime.transfers import early_receives

__all__ = ["DryRun", "Moment", "dry_run"]

DEVICE = torch.device("cpu")
"""Fake tensors say that they lie here: a build of torch without CUDA runs no operator on a fake GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """What a rank holds, in bytes by category: after ``instruction``, and when it held most in it."""

    instruction: Instruction
    held: Mapping[str, int]
    peak: Mapping[str, int]

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What one rank did in a step: ``acts`` those of ``executed`` microbatches, ``moments`` its memory at every instruction of its row.

    ``twins`` are the acts by position of the whole row: of a microbatch that was not executed, that of one that is alike.
    ``received`` are the tensors that it began to receive, in order; ``inspection`` is what the caller's ``inspect`` found at the end.
    """

    rank: int
    row: tuple[Instruction, ...]
    executed: frozenset[int]
    num_microbatches: int
    acts: tuple[Act, ...]
    twins: tuple[Act, ...]
    received: tuple[Sent, ...]
    between_steps: Mapping[str, int]
    moments: tuple[Moment, ...]
    inspection: object = None

    @property
    def peak(self) -> Moment:
        """The first moment at which most is held."""
        return max(self.moments, key=lambda moment: moment.peak_bytes)

    @property
    def largest_at_peak(self) -> tuple[HeldTensors, ...]:
        """The largest tensors at the peak, by kind; of activations those of the microbatches that were executed by then."""
        return self.twins[self.moments.index(self.peak)].largest


def dry_run(
    graph: ModelGraph,
    plan: Plan,
    source: ModelSource,
    *,
    rank: int,
    optimizer: OptimizerConfig,
    program: Program,
    graphs: StageGraphs | None = None,
    device_kind: str = "cuda",
    compute_capability: float | None = None,
    inspect: Callable[[Engine], object] | None = None,
) -> DryRun:
    """Executes a whole step of ``rank``: forwards, backwards, transfers, reductions, the optimizer. No weight is allocated.

    ``program`` is the lowered plan, ``graphs`` its stage graphs where the caller has them, ``device_kind`` what it is to run on. Of many
    microbatches that are alike a few are executed, and all where those turn out not to be alike. ``inspect`` gets the engine after its
    step, while tensors are still fake. Raises ``ProgramError`` in a rank of a real world.
    """
    graphs = graphs or StageGraphs(graph, replace(plan, is_compiled=False))
    row = program.row_of(rank).instructions
    sizes = program.samples[program.mesh.coordinate(rank, "dp")]
    executed = executed_microbatches(row, sizes)
    execute = partial(
        _execute,
        program,
        graphs,
        source,
        rank=rank,
        optimizer=optimizer,
        device_kind=device_kind,
        compute_capability=compute_capability,
        inspect=inspect,
    )
    found = execute(executed=executed)
    twins = Twins.of(row, sizes, found.acts)
    if twins.unlike is not None and len(executed) < len(sizes):
        executed = frozenset(range(len(sizes)))
        found = execute(executed=executed)
        twins = Twins.of(row, sizes, found.acts)
    return DryRun(
        rank=rank,
        row=row,
        executed=executed,
        num_microbatches=len(sizes),
        acts=found.acts,
        twins=twins.acts,
        received=found.received,
        between_steps=found.between_steps,
        moments=tuple(_moments(program, row, twins.acts, found.between_steps)),
        inspection=found.inspection,
    )


@dataclass(frozen=True, kw_only=True)
class _Executed:
    acts: tuple[Act, ...]
    received: tuple[Sent, ...]
    between_steps: Mapping[str, int]
    inspection: object


@dataclass(frozen=True, kw_only=True, slots=True)
class _Samples:
    """A microbatch that has shapes only."""

    positions: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    num_targets: int


def _execute(
    program: Program,
    graphs: StageGraphs,
    source: ModelSource,
    *,
    rank: int,
    optimizer: OptimizerConfig,
    device_kind: str,
    compute_capability: float | None,
    inspect: Callable[[Engine], object] | None,
    executed: frozenset[int],
) -> _Executed:
    folded = _with_row(program, rank, executed)
    live = LiveTensors()
    with fake_world(rank, program.mesh.world_size):
        groups = build_groups(program.mesh, rank, tied_ranks(program), only_own=True)
        recorder = DryRunRecorder(_axes(groups), live)
        with (
            watched_resizes(live.resized),
            chunks_on_demand(),
            FakeTensorMode(allow_non_fake_inputs=True),
            recorder,
        ):
            engine = assemble_engine(
                folded,
                graphs,
                source,
                groups,
                seed=0,
                optimizer=optimizer,
                device=DEVICE,
                allocate=_allocate,
                read=_read,
                device_kind=device_kind,
                compute_capability=compute_capability,
            )
            _give_buffers(engine)
            batches = _batches(program, graphs, rank)
            _settle(engine, live)
            between_steps = {name: num_bytes for name, num_bytes in live.totals.items() if num_bytes}
            engine.recorder = recorder
            engine.transfers.has_left = _has_left
            recorder.gradients = partial(_gradients, engine)
            engine.step(0, batches)
            inspection = None if inspect is None else inspect(engine)
        acts, received = recorder.acts, tuple(recorder.received)
    return _Executed(acts=acts, received=received, between_steps=between_steps, inspection=inspection)


def _with_row(program: Program, rank: int, executed: frozenset[int]) -> Program:
    """The Program with only the executed microbatches in the rank's row."""
    row = program.row_of(rank)
    rows = tuple(
        replace(row, instructions=only(row.instructions, executed)) if other is row else other
        for other in program.rows
    )
    return replace(program, rows=rows)


def _axes(groups: RankGroups) -> dict[str, str]:
    """The axis of each of the rank's groups by the group's name."""
    named = {
        "tp": groups.tp_group,
        "dp": groups.dp_group,
        "forward": groups.forward_group,
        "backward": groups.backward_group,
        "world": dist.group.WORLD,
        **{tie_axis(ranks): group for ranks, group in groups.tie_groups.items()},
    }
    return {group.group_name: axis for axis, group in named.items() if group is not None}


def _allocate(numel: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(numel, dtype=dtype, device=DEVICE)


def _read(tensor: Tensor) -> list[float]:
    """There are no numbers: every count and sum is one."""
    return [1.0] * tensor.numel()


def _has_left(_work: dist.Work) -> bool:
    """What is sent nowhere has left at once; torch's fake work says that it never does."""
    return True


def _give_buffers(engine: Engine) -> None:
    for stage in engine.stages.values():
        for name in stage.buffer_fqns:
            stage.set_buffer(name, torch.empty_like(stage.get_buffer(name), device=DEVICE))


def _gradients(engine: Engine) -> list[Tensor]:
    return [g for leaf in engine.parameters.leaves if (g := leaf.gradient()) is not None]


def _batches(program: Program, graphs: StageGraphs, rank: int) -> list[_Samples]:
    """The rank's microbatches, in the shapes of the graph's inputs."""
    found, start = [], 0
    tensors: dict[int, dict[str, Tensor]] = {}
    for size in program.samples[program.mesh.coordinate(rank, "dp")]:
        if size not in tensors:
            graph = graphs.sharding_at(size).graph
            tensors[size] = {
                name: torch.empty(
                    graph.values[name].shape, dtype=getattr(torch, graph.values[name].dtype), device=DEVICE
                )
                for name in graph.inputs
            }
        positions = tuple(range(start, start + size))
        found.append(_Samples(positions=positions, tensors=tensors[size], num_targets=1))
        start += size
    return found


def _settle(engine: Engine, live: LiveTensors) -> None:
    """Says of what is there between steps what it is for; the optimizer's state is made now, as if a step had been before."""
    states = [engine.optimizer.state(leaf) for leaf in engine.optimizer.leaves]
    live.leave_out(engine.optimizer.on_host())
    live.end("inputs")
    for category, tensors in engine.parameters.held().items():
        live.classify(tensors, category)
    live.classify((tensor for state in states for tensor in state.values()), "optimizer")
    live.classify((t for stage in engine.stages.values() for t in stage.buffers()), "parameters")


def _moments(
    program: Program, row: Sequence[Instruction], acts: Sequence[Act], between_steps: Mapping[str, int]
) -> Iterator[Moment]:
    """Memory along the whole row: what each act changed, and the buffers of receives from when they are begun."""
    held: Counter[str] = Counter(between_steps)
    posted: set[Instruction] = set()
    for position, (instruction, act) in enumerate(zip(row, acts, strict=True)):
        for receive in early_receives(row, position):
            if receive not in posted:
                posted.add(receive)
                category = "activations" if receive.kind == "RECV_F" else "communication"
                held[category] += sum(tensor.num_bytes for tensor in program.tensors(receive))
        peak = _sum(held, act.rise)
        held = Counter(_sum(held, act.change))
        yield Moment(instruction=instruction, held=dict(held), peak=peak)


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    found = {name: one.get(name, 0) + other.get(name, 0) for name in dict.fromkeys((*one, *other))}
    return {name: num_bytes for name, num_bytes in found.items() if num_bytes}
