"""``follow_probe``: the same training with every rounding of the run's precision disturbed at random: how far a correct run may stray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardstage.graph import ModelGraph
from shardstage.graph.blocks import find_blocks
from shardstage.graph.fallback import module_library
from shardstage.operators import OperatorContext, RandomState, library
from shardstage.parity.reference import GlobalBatches, first_values, master_dtype
from shardstage.parity.rounding import UNIT_ROUNDOFF, Rounding
from shardstage.parity.signature import signatures
from shardstage.parity.trajectory import StepGradients, Trajectory, follow
from shardstage.runtime.block_code import BlockCode, BlockWriter
from shardstage.sharding import localize, shard
from shardstage.training.job import TrainJob, source_of

__all__ = ["Probe", "block_outputs", "follow_probe", "trace_blocks"]

Activations = Mapping[str, Mapping[int, float]]
"""Value name → position in the global batch → signature."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """A disturbed trajectory, signatures of the blocks' outputs in its first step, and how much was disturbed."""

    trajectory: Trajectory
    activations: Activations
    num_ops: int
    longest_sum: int


def follow_probe(job: TrainJob, batches: GlobalBatches, *, num_steps: int, seed: int) -> Probe:
    """Trains the captured graph for ``num_steps`` in a wider dtype that stands for the run's, with disturbed results.

    What the run computes in bfloat16 is computed in float32 here, and its float32 in float64; the disturbance has the run's roundoff.
    """
    precision = job.plan.precision
    replica = _Replica(job, _stand_ins(precision))
    rounding = Rounding(replica.roundoff, seed=seed)

    def gradients_of(step: int) -> StepGradients:
        return replica.gradients(step, batches, rounding, is_traced=step == 0)

    trajectory = follow(
        replica.parameters,
        gradients_of,
        job.config.optimizer,
        num_steps=num_steps,
        storage_dtype=master_dtype(job),
    )
    return Probe(
        trajectory=trajectory,
        activations=replica.activations,
        num_ops=rounding.num_ops // max(1, num_steps * replica.num_runs_per_step),
        longest_sum=rounding.longest_sum,
    )


def trace_blocks(job: TrainJob, batches: GlobalBatches) -> Activations:
    """Signatures of the blocks' outputs in the first step, computed from the graph in float64."""
    replica = _Replica(job, dict.fromkeys(UNIT_ROUNDOFF, "float64"))
    with torch.no_grad():
        replica.losses(0, batches)
    return replica.activations


def block_outputs(graph: ModelGraph) -> tuple[str, ...]:
    """Values that carry a gradient from one block of the graph to later ones, in order."""
    found = []
    for block in find_blocks(graph):
        made = {name for op in graph.ops[block.start : block.stop] for name in op.outputs if name is not None}
        read = {name for op in graph.ops[block.stop :] for name in op.inputs}
        found += [n for n in graph.values if n in made & read and graph.values[n].requires_grad]
    return tuple(found)


class _Replica:
    """The whole model on one process as its graph, run in stand-in dtypes."""

    def __init__(self, job: TrainJob, stand_ins: Mapping[str, str]) -> None:
        self._job = job
        self._stand_ins = stand_ins
        self._random = RandomState(seed=job.config.seed)
        self._codes: dict[int, BlockCode] = {}
        self.activations: dict[str, dict[int, float]] = {}
        self.num_runs_per_step = 0
        self.roundoff = {
            getattr(torch, stand_in): UNIT_ROUNDOFF[name] for name, stand_in in stand_ins.items()
        }
        model = first_values(job)
        tensors = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        self.parameters = {p.fqn: tensors[p.fqn].detach().double() for p in job.graph.parameters}
        self._names = {p.name: p.fqn for p in job.graph.parameters}
        self._buffers = {b.name: self._in_stand_in(buffers[b.fqn], b.name) for b in job.graph.buffers}

    def gradients(
        self, step: int, batches: GlobalBatches, rounding: Rounding, *, is_traced: bool
    ) -> StepGradients:
        microbatches = batches.step(step)
        self.num_runs_per_step = len(microbatches)
        num_targets = max(1, sum(batch.num_targets for batch in microbatches))
        self._random.step = step
        stored = self._stored()
        leaves = {name: tensor for name, tensor in stored.items() if tensor.requires_grad}
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in leaves.items()}
        loss = 0.0
        for batch in microbatches:
            with rounding, sdpa_kernel(SDPBackend.MATH):
                output, *blocks = self._forward(stored, batch)
                seed = torch.full_like(output, 1 / num_targets)
                found = torch.autograd.grad(output, tuple(leaves.values()), seed, allow_unused=True)
            loss += float(output.detach()) / num_targets
            for total, gradient in zip(sums.values(), found, strict=True):
                if gradient is not None:
                    total += gradient
            if is_traced:
                self._trace(blocks, batch.positions)
        return StepGradients(loss=loss, gradients={self._names[name]: g for name, g in sums.items()})

    def _library(self, context: OperatorContext) -> Mapping[str, Callable[..., Any]]:
        """Our operators, and the model's own modules where it could not be exported and runs as blocks."""
        operators = library(context)
        ours = {op.target for op in self._job.graph.ops if op.target.startswith("shardstage.")}
        if ours <= set(operators):
            return operators
        return {**operators, **module_library(source_of(self._job.config))}

    def losses(self, step: int, batches: GlobalBatches) -> None:
        """Forward only."""
        self._random.step = step
        stored = self._stored()
        for batch in batches.step(step):
            with sdpa_kernel(SDPBackend.MATH):
                _, *blocks = self._forward(stored, batch)
            self._trace(blocks, batch.positions)

    def _forward(self, stored: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, ...]:
        code = self._code(len(batch.positions))
        self._random.positions = batch.positions
        inputs = (self._in_stand_in(batch.tensors[name], name) for name in code.inputs)
        return code.function(*(stored[name] for name in code.parameters), *inputs)

    def _stored(self) -> dict[str, Tensor]:
        """Parameters rounded to the run's dtype, in the stand-in's; buffers."""
        values = self._job.graph.values
        found = dict(self._buffers)
        for name, fqn in self._names.items():
            rounded = self.parameters[fqn].to(getattr(torch, values[name].dtype))
            found[name] = self._in_stand_in(rounded, name).requires_grad_(values[name].requires_grad)
        return found

    def _in_stand_in(self, tensor: Tensor, name: str) -> Tensor:
        dtype = self._job.graph.values[name].dtype
        stand_in = self._stand_ins.get(dtype, dtype)
        return tensor.detach().to(getattr(torch, stand_in), copy=True)

    def _trace(self, blocks: list[Tensor], positions: tuple[int, ...]) -> None:
        for name, tensor in zip(block_outputs(self._job.graph), blocks, strict=True):
            for position, value in zip(positions, signatures(name, tensor.detach()), strict=True):
                self.activations.setdefault(name, {})[position] = value

    def _code(self, size: int) -> BlockCode:
        """The graph for ``size`` samples as one function of parameters and inputs to the loss and the blocks' outputs."""
        if size not in self._codes:
            whole = self._job.graph.at(microbatch=size, sequence=self._job.plan.sequence)
            graph = _in_other_dtypes(localize(shard(whole, num_ranks=1), 0), self._stand_ins)
            context = OperatorContext(
                tp_group=None, tp_rank=0, tp_size=1, random=self._random, may_overwrite=False
            )
            writer = BlockWriter(self._library(context), torch.device("cpu"), is_compiled=False)
            outputs = (graph.output, *block_outputs(self._job.graph))
            self._codes[size] = writer.code(graph, graph.ops, outputs)
        return self._codes[size]


def _stand_ins(precision: str) -> dict[str, str]:
    """Which dtype computes for which: the next wider one that rounds much less."""
    if precision == "float64":
        return {"float64": "float64"}
    if precision == "float32":
        return {"float32": "float64"}
    return {precision: "float32", "float32": "float64"}


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
