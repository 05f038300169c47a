"""``Counts``: how much it was that a proof held for, over all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from shardstage.program import Instruction, Program

__all__ = ["Counts", "counts_of"]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of one step: ``collectives`` by axis (``tie0+3`` is ``tie``), each counted once for its whole group, as groups are in ``groups``."""

    num_ranks: int
    num_kinds: int
    num_instructions: int
    num_messages: int
    message_bytes: int
    collectives: Mapping[str, int]
    groups: Mapping[str, int]
    num_parameters: int
    num_summed: int
    num_samples: int


def counts_of(program: Program) -> Counts:
    """The counts of a Program; ranks of a row are counted as often as there are of them."""
    instructions = messages = message_bytes = 0
    members: Counter[str] = Counter()
    axes: set[str] = set()
    for row in program.rows:
        num_ranks = len(row.dp) * len(row.tp)
        instructions += num_ranks * len(row.instructions)
        sends = [i for i in row.instructions if i.is_send]
        messages += num_ranks * len(sends)
        message_bytes += num_ranks * sum(_num_bytes(program, send) for send in sends)
        for instruction in row.instructions:
            for call in program.collectives(instruction):
                members[call.axis] += num_ranks
                axes.add(call.axis)
    collectives, groups = Counter[str](), Counter[str]()
    for axis in sorted(axes):
        size = _group_size(program, axis)
        name = "tie" if axis.startswith("tie") else axis
        collectives[name] += members[axis] // size
        groups[name] += _num_groups(program, axis, size)
    return Counts(
        num_ranks=program.mesh.world_size,
        num_kinds=len(program.rows),
        num_instructions=instructions,
        num_messages=messages,
        message_bytes=message_bytes,
        collectives=dict(collectives),
        groups=dict(groups),
        num_parameters=len(program.parameters),
        num_summed=sum(bool(parameter.summed_over) for parameter in program.parameters),
        num_samples=sum(map(sum, program.samples)),
    )


def _num_bytes(program: Program, instruction: Instruction) -> int:
    return sum(tensor.num_bytes for tensor in program.tensors(instruction))


def _group_size(program: Program, axis: str) -> int:
    mesh = program.mesh
    known = {"tp": mesh.tp, "dp": mesh.dp, "world": mesh.world_size}
    return known[axis] if axis in known else axis.count("+") + 1


def _num_groups(program: Program, axis: str, size: int) -> int:
    mesh = program.mesh
    return mesh.dp * mesh.tp if axis.startswith("tie") else mesh.world_size // size
