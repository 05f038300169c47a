"""``Replica``: the captured graph on one process, trained with disturbed roundings: how far a correct run may stray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardstage.data import Microbatch
from shardstage.graph import ModelGraph
from shardstage.graph.fallback import module_library
from shardstage.operators import OperatorContext, library
from shardstage.parity.reference import GlobalBatches, master_dtype, run_random
from shardstage.parity.rounding import UNIT_ROUNDOFF, Rounding
from shardstage.parity.signature import signatures
from shardstage.parity.trajectory import StepGradients, Trajectory, follow
from shardstage.runtime.block_code import BlockCode, BlockWriter
from shardstage.sharding import localize, shard
from shardstage.training.job import TrainJob, source_of

__all__ = ["Activations", "Probe", "Replica", "block_outputs", "exact_replica", "probing_replica"]

Activations = Mapping[str, Mapping[int, float]]
"""Value name → position in the global batch → signature."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """A disturbed trajectory, signatures of the blocks' outputs in its first step, and how much was disturbed in a microbatch."""

    trajectory: Trajectory
    activations: Activations
    num_ops: int
    longest_sum: int


def probing_replica(job: TrainJob, first: Mapping[str, Tensor]) -> Replica:
    """A replica that computes what the run does in the next wider dtype: float32 stands for bfloat16, and float64 for float32."""
    precision = job.plan.precision
    if precision == "float64":
        return Replica(job, first, {"float64": "float64"})
    if precision == "float32":
        return Replica(job, first, {"float32": "float64"})
    return Replica(job, first, {precision: "float32", "float32": "float64"})


def exact_replica(job: TrainJob, first: Mapping[str, Tensor]) -> Replica:
    """A replica that computes everything in float64, from weights that are not rounded to the run's dtype."""
    return Replica(job, first, dict.fromkeys(UNIT_ROUNDOFF, "float64"))


def _sum_roundoff(job: TrainJob) -> float | None:
    """By which sums of gradients err; None where they are as wide as master weights."""
    narrow = job.plan.gradient_dtype
    if narrow is None or getattr(torch, narrow) == master_dtype(job):
        return None
    return UNIT_ROUNDOFF[narrow]


def block_outputs(graph: ModelGraph) -> tuple[str, ...]:
    """Values that carry a gradient from one block of the graph to later ones, in order."""
    found = []
    for block in graph.blocks:
        made = {name for op in graph.ops[block.start : block.stop] for name in op.outputs if name is not None}
        read = {name for op in graph.ops[block.stop :] for name in op.inputs}
        found += [n for n in graph.values if n in made & read and graph.values[n].requires_grad]
    return tuple(found)


class Replica:
    """The whole model as its graph, where ``stand_ins`` compute for the dtypes of the run.

    ``first`` holds parameters and buffers before the first step, by the model's own names.
    """

    def __init__(self, job: TrainJob, first: Mapping[str, Tensor], stand_ins: Mapping[str, str]) -> None:
        self._job = job
        self._first = first
        self._stand_ins = stand_ins
        self._is_exact = len(set(stand_ins.values())) == 1 and len(stand_ins) > 1
        self._sum_roundoff = _sum_roundoff(job)
        self._random = run_random(job)
        self._traced = block_outputs(job.graph)
        self._codes: dict[int, BlockCode] = {}
        self._names = {p.name: p.fqn for p in job.graph.parameters}
        self._buffers = {b.name: self._in_stand_in(first[b.fqn], b.name) for b in job.graph.buffers}

    def probe(self, batches: GlobalBatches, *, num_steps: int, seed: int) -> Probe:
        """Trains with results disturbed by the run's roundoff."""
        units = {getattr(torch, stand_in): UNIT_ROUNDOFF[name] for name, stand_in in self._stand_ins.items()}
        rounding = Rounding(units, seed=seed)
        activations: dict[str, dict[int, float]] = {}
        parameters = self._first_parameters()

        def gradients_of(step: int) -> StepGradients:
            seen = activations if step == 0 else {}
            return self.gradients(parameters, step, batches.step(step), seen, rounding)

        trajectory = follow(
            parameters,
            gradients_of,
            self._job.config.optimizer,
            num_steps=num_steps,
            storage_dtype=master_dtype(self._job),
        )
        num_runs = max(1, num_steps * len(batches.step(0)))
        return Probe(
            trajectory=trajectory,
            activations=activations,
            num_ops=rounding.num_ops // num_runs,
            longest_sum=rounding.longest_sum,
        )

    def activations(self, batches: GlobalBatches) -> Activations:
        """Signatures of the blocks' outputs in the first step, undisturbed."""
        found: dict[str, dict[int, float]] = {}
        self._random.step = 0
        stored = self._stored(self._first_parameters())
        with torch.no_grad():
            for batch in batches.step(0):
                _, *blocks = self._forward(stored, batch)
                self._trace(found, blocks, batch.positions)
        return found

    def gradients(
        self,
        parameters: Mapping[str, Tensor],
        step: int,
        microbatches: Sequence[Microbatch],
        activations: dict[str, dict[int, float]],
        rounding: Rounding,
    ) -> StepGradients:
        """The mean loss over all targets and its gradients, computed under ``rounding``; signatures go into ``activations``.

        Gradients that the run sums in a narrower dtype than its master weights' are rounded with every microbatch: one sum over all of the
        global batch errs no less than the ranks' shorter ones and the sum of these, whose roundings are of parts of it.
        """
        num_targets = max(1, sum(batch.num_targets for batch in microbatches))
        self._random.step = step
        stored = self._stored(parameters)
        leaves = {name: tensor for name, tensor in stored.items() if tensor.requires_grad}
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in leaves.items()}
        loss = 0.0
        for batch in microbatches:
            with rounding:
                output, *blocks = self._forward(stored, batch)
                seed = torch.full_like(output, 1 / num_targets)
                found = torch.autograd.grad(output, tuple(leaves.values()), seed, allow_unused=True)
            loss += float(output.detach()) / num_targets
            for total, gradient in zip(sums.values(), found, strict=True):
                if gradient is not None:
                    total += gradient
                    if self._sum_roundoff is not None:
                        rounding.disturb_sum(total, self._sum_roundoff)
            self._trace(activations, blocks, batch.positions)
        return StepGradients(loss=loss, gradients={self._names[name]: g for name, g in sums.items()})

    def _forward(self, stored: Mapping[str, Tensor], batch: Microbatch) -> tuple[Tensor, ...]:
        code = self._code(len(batch.positions))
        self._random.positions = batch.positions
        inputs = (self._in_stand_in(batch.tensors[name], name) for name in code.inputs)
        with sdpa_kernel(SDPBackend.MATH):  # whose every operator can be disturbed
            return code.function(*(stored[name] for name in code.parameters), *inputs)

    def _first_parameters(self) -> dict[str, Tensor]:
        return {fqn: self._first[fqn].to(torch.float64, copy=True) for fqn in self._names.values()}

    def _stored(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters rounded to the run's dtype, in the stand-in's; buffers."""
        values = self._job.graph.values
        found = dict(self._buffers)
        for name, fqn in self._names.items():
            value = values[name]
            master = parameters[fqn]
            rounded = master if self._is_exact else master.to(getattr(torch, value.dtype))
            found[name] = self._in_stand_in(rounded, name).requires_grad_(value.requires_grad)
        return found

    def _in_stand_in(self, tensor: Tensor, name: str) -> Tensor:
        dtype = self._job.graph.values[name].dtype
        stand_in = self._stand_ins.get(dtype, dtype)
        return tensor.detach().to(getattr(torch, stand_in), copy=True)

    def _trace(
        self, found: dict[str, dict[int, float]], blocks: Sequence[Tensor], positions: Sequence[int]
    ) -> None:
        for name, tensor in zip(self._traced, blocks, strict=True):
            for position, value in zip(positions, signatures(name, tensor), strict=True):
                found.setdefault(name, {})[position] = value

    def _code(self, size: int) -> BlockCode:
        """The graph for ``size`` samples as one function of parameters and inputs to the loss and the blocks' outputs."""
        if size not in self._codes:
            graph = self._job.graph
            if graph.is_scalable:
                graph = graph.at(microbatch=size, sequence=self._job.plan.sequence)
            graph = _in_other_dtypes(localize(shard(graph, num_ranks=1), 0), self._stand_ins)
            context = OperatorContext(
                tp_group=None, tp_rank=0, tp_size=1, random=self._random, may_overwrite=False
            )
            writer = BlockWriter(self._library(context), torch.device("cpu"), is_compiled=False)
            self._codes[size] = writer.code(graph, graph.ops, (graph.output, *self._traced))
        return self._codes[size]

    def _library(self, context: OperatorContext) -> Mapping[str, Callable[..., Any]]:
        """Our operators, and the model's own modules where it could not be exported and runs as blocks."""
        operators = library(context)
        ours = {op.target for op in self._job.graph.ops if op.target.startswith("shardstage.")}
        if ours <= set(operators):
            return operators
        return {**operators, **module_library(source_of(self._job.config))}


def _in_other_dtypes(graph: ModelGraph, stand_ins: Mapping[str, str]) -> ModelGraph:
    """The graph with every floating dtype replaced: of values, and where an op asks for one."""

    def renamed(argument: Any) -> Any:
        if isinstance(argument, tuple | list):
            return tuple(renamed(item) for item in argument)
        return stand_ins.get(argument, argument) if isinstance(argument, str) else argument

    ops = tuple(
        replace(op, args=renamed(op.args), kwargs=tuple((key, renamed(value)) for key, value in op.kwargs))
        for op in graph.ops
    )
    values = {n: replace(v, dtype=stand_ins.get(v.dtype, v.dtype)) for n, v in graph.values.items()}
    return replace(graph, ops=ops, values=values)
