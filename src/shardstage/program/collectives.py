"""The collectives inside forward and backward, in the order in which a rank runs them.

    block      op1   op2 (saves)   op3            forward   1 2 3
    backward                                      whole     3' 2' 1'
    with recompute: what needs nothing kept first, then the forward again up to the last op that keeps something, then the rest
                                                            3' │ 1 2 │ 2' 1'

A block of which only named modules are recomputed does so run by run, the last one first.

Autograd runs the nodes that are ready in the reverse order of their making, so the order of a backward is that of the graph reversed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardstage.cost.collective import calls_of
from shardstage.graph.blocks import Block
from shardstage.graph.cuts import Segment
from shardstage.graph.named_modules import Part, recompute_parts
from shardstage.plan.plan import Plan
from shardstage.program.program import Collective
from shardstage.program.stage_parameters import Unit

__all__ = ["StageCalls", "stage_calls"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCalls:
    """Collectives of one microbatch on one stage; those of B are those of I, and W has none."""

    forward: tuple[Collective, ...]
    backward: tuple[Collective, ...]


def stage_calls(segment: Segment, plan: Plan, units: Sequence[Unit]) -> StageCalls:
    """Those along tp, and under ZeRO-3 those along dp that gather and reduce a block's parameters around it.

    ``units`` are the stage's own parameters by block where blocks shard them over dp, and empty where not.
    """
    by_block = {unit.block: unit for unit in units if unit.block is not None}
    gathering = {number: unit for number, unit in by_block.items() if plan.zero == 3}
    forward: list[Collective] = []
    for number, block in enumerate(segment.blocks):
        if number in gathering:
            forward.append(gathering[number].gather())
        forward += _forward(segment, block.start, block.stop)
    ends = {n for n in by_block if not _reads_gradients(segment, segment.blocks[n])}
    backward: list[Collective] = []
    waiting = sorted(gathering, reverse=True)
    parts = recompute_parts(
        segment.graph, segment.blocks, plan.recompute_of(segment.index), plan.recompute_modules
    )
    for number in reversed(range(len(segment.blocks))):
        if number in gathering:
            # FSDP2 gathers what comes next while this block computes.
            while waiting and waiting[0] >= max((n for n in gathering if n < number), default=0):
                backward.append(gathering[waiting.pop(0)].gather())
        for part in reversed(parts[number]):
            backward += _backward(segment, part)
        if number in by_block and by_block[number].is_trained and number not in ends:
            backward.append(by_block[number].reduce())
    backward += [unit.reduce() for unit in units if unit.block is None and unit.is_trained]
    backward += [unit.reduce() for number, unit in by_block.items() if number in ends and unit.is_trained]
    return StageCalls(forward=tuple(forward), backward=tuple(backward))


def _reads_gradients(segment: Segment, block: Block) -> bool:
    """Whether a gradient flows out of the block: FSDP2 reduces those of a block that only reads tokens when the backward is over."""
    graph = segment.graph
    ops = graph.ops[block.start : block.stop]
    made = {name for op in ops for name in op.outputs}
    read = {name for op in ops for name in op.inputs if name not in made}
    return any(graph.values[n].requires_grad and graph.values[n].kind != "parameter" for n in read)


def _forward(segment: Segment, start: int, stop: int) -> list[Collective]:
    graph = segment.graph
    return [
        Collective("tp", call.kind, call.dtype, call.numel)
        for op in graph.ops[start:stop]
        for call in calls_of(graph, op)
        if not call.is_backward
    ]


def _backward(segment: Segment, part: Part) -> list[Collective]:
    """What is recomputed says again what it said up to the last op that keeps something for backward."""
    if part.mode == "none":
        return _reversed(segment, part.start, part.stop)
    kept = _stop_of_kept(segment, part)
    again = _forward(segment, part.start, kept)
    return [*_reversed(segment, kept, part.stop), *again, *_reversed(segment, part.start, kept)]


def _stop_of_kept(segment: Segment, part: Part) -> int:
    keeping = [i for i in range(part.start, part.stop) if segment.graph.ops[i].saved]
    return keeping[-1] + 1 if keeping else part.start


def _reversed(segment: Segment, start: int, stop: int) -> list[Collective]:
    graph = segment.graph
    return [
        Collective("tp", call.kind, call.dtype, call.numel)
        for op in reversed(graph.ops[start:stop])
        for call in calls_of(graph, op)
        if call.is_backward
    ]
