"""What a Program must hold before its ranks are looked at together: tables, ranks, samples, and the frame of each row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Final

from shardstage.errors import ProgramError
from shardstage.program.instruction import Instruction, InstructionKind
from shardstage.program.program import Collective, Program, Row
from shardstage.program.verify_fold import Column, tied_ranks

__all__ = ["check_frame", "check_parameters", "check_ranks", "check_samples", "check_tables"]

_AXES_OF: Final[dict[InstructionKind, tuple[str, ...]]] = {
    "COUNT": ("dp",),
    "F": ("tp", "dp"),
    "B": ("tp", "dp"),
    "I": ("tp", "dp"),
    "W": (),
    "UNSHARD": ("dp",),
    "RESHARD": (),
    "REDUCE_GRAD": ("dp", "tp", "tie"),
    "STEP": ("world", "dp"),
}
"""The axes along which each act may run collectives."""

_TIE: Final = re.compile(r"tie\d+(?:\+\d+)+")

_FRAME: Final = "COUNT … REDUCE_GRAD STEP"


def check_tables(program: Program) -> None:
    """Every stage, rank, microbatch and table entry that is named is there; every edge leads to another stage, once."""
    stages = range(program.num_stages)
    if set(program.stage_ranks) != set(range(program.mesh.pp)):
        raise ProgramError(
            f"stages run on pipeline ranks {sorted(set(program.stage_ranks))} of a mesh of pp={program.mesh.pp}",
            hint="stages " + " ".join(f"{pp}=pp{pp}" for pp in range(program.mesh.pp)),
        )
    ends = Counter((e.value, e.source, e.target) for e in program.edges)
    for (value, source, target), count in ends.items():
        if count > 1 or source == target or source not in stages or target not in stages:
            raise ProgramError(
                f"edge {value} {source}>{target} does not lead from one of {len(stages)} stages to another, once",
                hint=f"edges\n  {value} 0>1 grad",
            )
    for name, calls in program.calls.items():
        for call in calls:
            _check_collective(program, name, call)
    for row in program.rows:
        for step, instruction in enumerate(row.instructions):
            _check_names(program, f"{_first(program, row)}, step {step} {instruction}", instruction)


def _first(program: Program, row: Row) -> str:
    """The first rank of a row."""
    dp, tp = (*row.dp, 0)[0], (*row.tp, 0)[0]
    return f"rank {program.mesh.rank(pp=row.pp, dp=dp, tp=tp)} (pp={row.pp} dp={dp} tp={tp})"


def _check_collective(program: Program, name: str, call: Collective) -> None:
    is_tie = bool(_TIE.fullmatch(call.axis)) and set(tied_ranks(call.axis)) <= set(range(program.mesh.pp))
    if call.axis not in ("tp", "dp", "world") and not is_tie:
        problem = f"runs along {call.axis}, which is no axis of this mesh"
    elif call.bucket and call.bucket not in program.buckets:
        problem = f"carries bucket {call.bucket}, which is not in the table"
    else:
        return
    raise ProgramError(
        f"calls {name}: {call.axis}.{call.kind} {problem}", hint="dp.all_reduce:float32[512]{b0}"
    )


def _check_names(program: Program, where: str, instruction: Instruction) -> None:
    num_stages, num_microbatches = program.num_stages, program.num_microbatches
    if instruction.message and instruction.message not in program.messages:
        raise ProgramError(
            f"{where}: moves {instruction.message}, which is not in the table",
            hint=f"messages\n  {instruction.message} add_7:float32[2,16,64]",
        )
    if instruction.calls and instruction.calls not in program.calls:
        raise ProgramError(
            f"{where}: runs {instruction.calls}, which is not in the table",
            hint=f"calls\n  {instruction.calls} dp.all_reduce:float32[512]{{b0}}",
        )
    for stage in (instruction.stage, instruction.peer):
        if stage is not None and not 0 <= stage < num_stages:
            raise ProgramError(
                f"{where}: there is no stage {stage}", hint=f"stages are 0 to {num_stages - 1}"
            )
    if instruction.microbatch is not None and not 0 <= instruction.microbatch < num_microbatches:
        raise ProgramError(
            f"{where}: there is no microbatch {instruction.microbatch}",
            hint=f"microbatches are 0 to {num_microbatches - 1}",
        )


def check_ranks(program: Program) -> None:
    """Every rank of the mesh is in exactly one row."""
    mesh = program.mesh
    seen = Counter((row.pp, dp, tp) for row in program.rows for dp in row.dp for tp in row.tp)
    for pp, dp, tp in _coordinates(program):
        count = seen.pop((pp, dp, tp), 0)
        if count != 1:
            where = f"rank {mesh.rank(pp=pp, dp=dp, tp=tp)} (pp={pp} dp={dp} tp={tp})"
            raise ProgramError(
                f"{where} is in {count} rows and not in one", hint=f"  pp={pp} dp={dp} tp={tp}\n    COUNT …"
            )
    if seen:
        pp, dp, tp = min(seen)
        raise ProgramError(
            f"a row is for pp={pp} dp={dp} tp={tp}, which is outside the mesh",
            hint=f"mesh pp={max(pp + 1, mesh.pp)} dp={max(dp + 1, mesh.dp)} tp={max(tp + 1, mesh.tp)}",
        )


def _coordinates(program: Program) -> Iterator[tuple[int, int, int]]:
    mesh = program.mesh
    return ((pp, dp, tp) for pp in range(mesh.pp) for dp in range(mesh.dp) for tp in range(mesh.tp))


def check_samples(program: Program) -> None:
    """The microbatches of all dp ranks make the global batch, and every dp rank runs equally many."""
    counts = {len(sizes) for sizes in program.samples}
    total = sum(map(sum, program.samples))
    if len(program.samples) != program.mesh.dp or len(counts) != 1 or counts == {0}:
        raise ProgramError(
            f"{len(program.samples)} dp ranks run {sorted(counts)} microbatches; the mesh has dp={program.mesh.dp}, "
            "and all must run equally many to meet in the same collectives",
            hint="samples global_batch=16\n  dp=* 2*2 (the last ones may hold 0 samples)",
        )
    if total != program.global_batch:
        raise ProgramError(
            f"the microbatches hold {total} samples and the global batch {program.global_batch}",
            hint=f"samples global_batch={total}",
        )


def check_parameters(program: Program) -> None:
    """Each parameter is there once; its gradient is summed over dp, and over a tie exactly if several pipeline ranks use it."""
    counts = Counter(p.fqn for p in program.parameters)
    for p in program.parameters:
        ranks = sorted({program.stage_ranks[stage] for stage in p.stages if stage < program.num_stages})
        ties = [f"tie{'+'.join(map(str, ranks))}"] if len(ranks) > 1 else []
        expected = [*(["dp"] if program.mesh.dp > 1 else []), *ties] if p.is_trained else []
        optional = {"tp"} if p.is_trained and program.mesh.tp > 1 else set()
        found = [axis for axis in p.summed_over if axis not in optional]
        is_known = bool(p.stages) and max(p.stages) < program.num_stages
        if (
            counts[p.fqn] > 1
            or not is_known
            or found != expected
            or len(set(p.summed_over)) < len(p.summed_over)
        ):
            raise ProgramError(
                f"parameter {p.fqn} of stages {p.stages} is there {counts[p.fqn]} times, summed over "
                f"{', '.join(p.summed_over) or 'nothing'} and not over {', '.join(expected) or 'nothing'}",
                hint=f"  {p.fqn} stages={','.join(map(str, p.stages))}"
                + (f" sum={','.join(expected)}" * bool(expected)),
            )


def check_frame(column: Column, pp: int) -> None:
    """COUNT first, REDUCE_GRAD and STEP last, each once; each act runs only collectives that belong to it."""
    _check_places(column, pp)
    for step, instruction in column.steps(pp):
        for call in column.program.collectives(instruction):
            if not _is_allowed(instruction.kind, call):
                column.refuse(
                    pp,
                    step,
                    f"{instruction.kind} runs {call.axis}.{call.kind}{' of a bucket' * bool(call.bucket)}",
                    hint=f"{instruction.name} runs collectives along {', '.join(_AXES_OF.get(instruction.kind, ())) or 'nothing'}",
                )
    _check_count(column, pp)
    _check_norm(column, pp)


def _check_places(column: Column, pp: int) -> None:
    kinds = [instruction.kind for _, instruction in column.steps(pp)]
    last = len(kinds) - 1
    places: dict[InstructionKind, int] = {"COUNT": 0, "REDUCE_GRAD": last - 1, "STEP": last}
    for kind, place in places.items():
        if kinds.count(kind) != 1:
            step = place if kind not in kinds else last - kinds[::-1].index(kind)
            column.refuse(pp, max(0, step), f"{kind} is there {kinds.count(kind)} times", hint=_FRAME)
    for kind, place in places.items():
        if kinds[place] != kind:
            column.refuse(
                pp, kinds.index(kind), f"{kind} stands here and must stand at step {place}", hint=_FRAME
            )


def _is_allowed(kind: InstructionKind, call: Collective) -> bool:
    axis = "tie" if call.axis.startswith("tie") else call.axis
    if axis not in _AXES_OF.get(kind, ()):
        return False
    match kind, axis:
        case "F" | "UNSHARD" | "STEP", "dp":
            return call.kind == "all_gather" and bool(call.bucket)
        case "B" | "I", "dp":
            return call.kind in ("all_gather", "reduce_scatter") and bool(call.bucket)
        case "REDUCE_GRAD", "dp":
            return call.kind in ("all_reduce", "reduce_scatter") and bool(call.bucket)
        case "REDUCE_GRAD", _:
            return call.kind == "all_reduce" and bool(call.bucket)
        case _:
            return not call.bucket


def _check_count(column: Column, pp: int) -> None:
    """COUNT sums the target tokens over dp, so that each microbatch's loss is divided by all of them."""
    calls = column.program.collectives(column.rows[pp].instructions[0])
    expected = (Collective("dp", "all_reduce", "int64", 1),) if column.program.mesh.dp > 1 else ()
    if calls != expected:
        column.refuse(
            pp, 0, "the number of targets is not summed once over dp", hint="dp.all_reduce:int64[1]"
        )


def _check_norm(column: Column, pp: int) -> None:
    """STEP sums loss and squared norm once over the world."""
    instructions = column.rows[pp].instructions
    calls = [c for c in column.program.collectives(instructions[-1]) if c.axis == "world"]
    expected = [Collective("world", "all_reduce", "float64", 2)] * (column.program.mesh.world_size > 1)
    if calls != expected:
        column.refuse(
            pp,
            len(instructions) - 1,
            "the norm is not summed once over the world",
            hint="world.all_reduce:float64[2]",
        )
