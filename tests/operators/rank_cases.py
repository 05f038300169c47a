"""What each of three real ranks does: runs local graphs and moves uneven tensors, through gloo."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardstage.graph import ModelGraph, Ref
from shardstage.layout import Shard, balanced_sizes
from shardstage.operators import OperatorContext, RandomState, library, moves
from shardstage.operators.resolve import literal, resolve
from shardstage.sharding import Sharding, localize

NUM_RANKS = 3


def run_rank(rank: int, port: int, folder: Path) -> None:
    """Answers every question in ``folder`` (``*.question``: sharding, state, batch, positions) and checks the moves."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=NUM_RANKS, timeout=timedelta(seconds=60)
    )
    for path in sorted(folder.glob("*.question")):
        question = torch.load(path, weights_only=False)
        torch.save(answer(rank, *question), folder / f"{path.stem}.{rank}.answer")
    torch.save(wrong_moves(rank), folder / f"moves.{rank}.answer")
    dist.destroy_process_group()
    os._exit(0)  # what autograd still holds of the group would abort an interpreter that shuts down with it


def answer(
    rank: int,
    sharding: Sharding,
    state: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    positions: tuple[int, ...],
    may_overwrite: bool,
) -> dict[str, Tensor]:
    """This rank's loss and gradients."""
    graph = localize(sharding, rank)
    context = context_of(rank, positions, may_overwrite=may_overwrite)
    leaves = {}
    for parameter in graph.parameters:
        tensor, placement = state[parameter.fqn], sharding.parameters[parameter.fqn]
        if isinstance(placement, Shard):
            tensor = moves.take(tensor, placement.dim, placement.intervals(rank))
        leaves[parameter.name] = tensor.detach().clone().requires_grad_()
    loss = run(graph, {**batch, **leaves, **{b.name: state[b.fqn] for b in graph.buffers}}, context)
    loss.backward()
    named = {p.fqn: leaves[p.name].grad for p in graph.parameters}
    return {"loss": loss.detach(), **{fqn: torch.zeros(0) if g is None else g for fqn, g in named.items()}}


def context_of(rank: int, positions: tuple[int, ...], *, may_overwrite: bool = True) -> OperatorContext:
    return OperatorContext(
        tp_group=dist.group.WORLD,
        tp_rank=rank,
        tp_size=NUM_RANKS,
        random=RandomState(seed=11, step=3, positions=positions),
        may_overwrite=may_overwrite,
    )


def run(graph: ModelGraph, env: dict[str, Any], context: OperatorContext) -> Tensor:
    """The output of a local graph without constants."""
    operators = library(context)

    def real(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(map(real, argument))
        return env[argument.name] if isinstance(argument, Ref) else literal(argument)

    for op in graph.ops:
        function = operators.get(op.target) or resolve(op.target)
        result = function(*map(real, op.args), **{key: real(item) for key, item in op.kwargs})
        for name, tensor in zip(op.outputs, result if op.returns_sequence else (result,), strict=True):
            if name is not None:
                env[name] = tensor
    output: Tensor = env[graph.output]
    return output


def wrong_moves(rank: int) -> list[str]:
    """The cuts for which gather or reduce_scatter differ from what all ranks can compute alone; none is right."""
    context = context_of(rank, ())
    wrong = []
    for batch, length, times, dim in itertools.product((1, 2), (2, 7, 9), (1, 2), (0, 1)):
        section = balanced_sizes(length, NUM_RANKS)
        mixed = (section, balanced_sizes(4, NUM_RANKS, unit=2)) if times == 2 and length == 7 else None
        sections = mixed or (section,) * times
        total = sum(map(sum, sections))
        shape = (total, 3) if dim == 0 else (batch, total, 3)
        summands = [torch.randn(shape, generator=torch.Generator().manual_seed(r)) for r in range(NUM_RANKS)]
        whole = torch.stack(summands).sum(0)
        part = moves.take(whole, dim, moves.intervals_of(sections, rank))
        scattered = moves.reduce_scatter(summands[rank], dim, sections, context)
        gathered = moves.gather(part, dim, sections, context)
        summed = moves.all_reduce(summands[rank], context)
        for name, found, expected in (
            ("reduce_scatter", scattered, part),
            ("gather", gathered, whole),
            ("all_reduce", summed, whole),
        ):
            if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-5):
                wrong.append(f"{name} of {shape} cut along {dim} in {sections}")
    return wrong
