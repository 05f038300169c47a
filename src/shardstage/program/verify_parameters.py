"""Each parameter is whole where it is used, and its gradient is summed exactly over the ranks that share it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from shardstage.program.instruction import Instruction
from shardstage.program.program import Collective, ParameterUse, Program
from shardstage.program.verify_fold import Column

__all__ = ["check_buckets", "check_reductions", "check_unsharding"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sums:
    """How often a rank sums each parameter's gradient: in REDUCE_GRAD by axis, and over dp in the backward of a stage."""

    at_end: Counter[tuple[str, str]] = field(default_factory=Counter)
    in_backward: Counter[tuple[str, int | None, int | None]] = field(default_factory=Counter)


def check_buckets(column: Column, pp: int) -> None:
    """A collective carries only parameters of the stages that it is for, a reduction at the end only trained ones."""
    program = column.program
    stages = program.stages_of(pp)
    by_fqn = {p.fqn: p for p in program.parameters}
    for step, i in column.steps(pp):
        for call in program.collectives(i):
            for fqn in program.buckets[call.bucket] if call.bucket else ():
                parameter = by_fqn.get(fqn)
                users = () if parameter is None else parameter.stages
                if not set(users) & set(stages if i.stage is None else (i.stage,)):
                    what = f"bucket {call.bucket} carries {fqn}, which is used by {_stages(users)}"
                    column.refuse(pp, step, what, hint=f"delete {fqn} from bucket {call.bucket}")
                if parameter is not None and not parameter.is_trained and i.stage is None:
                    what = f"bucket {call.bucket} carries {fqn}, which is frozen"
                    column.refuse(pp, step, what, hint=f"delete {fqn} from bucket {call.bucket}")


def _stages(stages: Sequence[int]) -> str:
    return f"stages {', '.join(map(str, stages))}" if stages else "no stage"


def check_reductions(column: Column, pp: int) -> None:
    """Each gradient is summed once over each axis that its parameter names and over no other.

    Over dp at the end of the step, or (ZeRO-2, ZeRO-3) in every backward of every stage that uses it, never both. Where rows are cut over
    dp, a rank other than the first may hold none of a parameter, and has nothing to sum over tp and ties.
    """
    sums = _sums(column, pp)
    program = column.program
    stages = set(program.stages_of(pp))
    for parameter in program.parameters:
        if not stages & set(parameter.stages):
            continue
        problem = _problem(parameter, sums, program, [s for s in parameter.stages if s in stages], column.dp)
        if problem:
            column.refuse(
                pp,
                len(column.rows[pp].instructions) - 2,
                f"the gradient of {parameter.fqn} is summed {problem}",
                hint=f"  {parameter.fqn} stages={','.join(map(str, parameter.stages))}"
                + (f" sum={','.join(parameter.summed_over)}" if parameter.summed_over else ""),
            )
    _check_buckets_of_end(column, pp)


def _sums(column: Column, pp: int) -> _Sums:
    sums = _Sums()
    program = column.program
    for _, i in column.steps(pp):
        for call in program.collectives(i):
            for fqn in program.buckets[call.bucket] if call.bucket else ():
                if i.kind == "REDUCE_GRAD":
                    sums.at_end[fqn, call.axis] += 1
                elif call.kind == "reduce_scatter":
                    sums.in_backward[fqn, i.stage, i.microbatch] += 1
    return sums


def _problem(
    parameter: ParameterUse, sums: _Sums, program: Program, stages: Sequence[int], dp: int
) -> str | None:
    """What is wrong with the sums of one gradient on one rank."""
    fqn, axes = parameter.fqn, parameter.summed_over
    counts = [sums.in_backward[fqn, stage, m] for stage in stages for m in range(program.num_microbatches)]
    at_end = sums.at_end[fqn, "dp"]
    is_early = any(counts)
    if not parameter.is_trained:
        return None  # a frozen parameter may travel with the block that it is in
    wanted = 1 if "dp" in axes else 0
    if is_early and (at_end or not wanted or set(counts) != {1}):
        return f"over dp in {sum(counts)} of {len(counts)} backwards and {at_end} times at the end"
    if not is_early and at_end != wanted:
        return f"{at_end} times over dp and not {'once' if wanted else 'alone'}"
    found = {axis for name, axis in sums.at_end if name == fqn and axis != "dp"}
    for axis in sorted(found | set(axes) - {"dp"}):
        count = sums.at_end[fqn, axis]
        may_be_empty = is_early and dp > 0 and count == 0
        if count != (1 if axis in axes else 0) and not may_be_empty:
            return f"{count} times over {axis} in REDUCE_GRAD"
    return None


def _check_buckets_of_end(column: Column, pp: int) -> None:
    """Over dp first, then its part over tp and ties; under ZeRO-1 STEP gathers what was scattered."""
    program = column.program
    instructions = column.rows[pp].instructions
    last = len(instructions) - 1
    parts: dict[str, int] = {}
    scattered: Counter[tuple[tuple[str, ...], int]] = Counter()
    for call in program.collectives(instructions[-2]):
        if call.axis != "dp":
            if parts.setdefault(call.bucket, call.numel) != call.numel:
                what = f"sums {call.numel} elements of bucket {call.bucket} over {call.axis}, which holds {parts[call.bucket]}"
                column.refuse(
                    pp,
                    last - 1,
                    what,
                    hint=f"{call.axis}.all_reduce:{call.dtype}[{parts[call.bucket]}]{{{call.bucket}}}",
                )
            continue
        if call.bucket in parts:
            what = f"bucket {call.bucket} is summed over dp after another axis"
            column.refuse(pp, last - 1, what, hint="over dp first, then over tp and ties")
        is_scattered = call.kind == "reduce_scatter"
        parts[call.bucket] = call.numel // (program.mesh.dp if is_scattered else 1)
        scattered[program.buckets[call.bucket], call.numel] += is_scattered
    gathered = Counter(
        (program.buckets[call.bucket], call.numel)
        for call in program.collectives(instructions[-1])
        if call.axis == "dp"
    )
    if gathered != +scattered:
        column.refuse(
            pp,
            last,
            f"gathers {gathered.total()} buckets over dp where {scattered.total()} were scattered, or others",
            hint="dp.all_gather:float32[512]{b0} for every dp.reduce_scatter of REDUCE_GRAD",
        )


def is_fully_sharded(program: Program) -> bool:
    """Whether parameters are cut over dp (ZeRO-2, ZeRO-3), so that they must be gathered before use."""
    used = {i.calls for row in program.rows for i in row.instructions if i.stage is not None and i.calls}
    return any(call.axis == "dp" for name in used for call in program.calls[name])


def check_unsharding(column: Column, pp: int, *, is_sharded: bool) -> None:
    """Every parameter of a stage is gathered once for each computation: by UNSHARD until RESHARD, or by the computation itself."""
    whole: dict[int, Counter[str]] = {}
    ended: set[int] = set()
    last = len(column.rows[pp].instructions) - 2
    for step, i in column.steps(pp):
        if i.stage is None:
            continue
        if i.kind == "UNSHARD":
            if i.stage in whole or i.stage in ended:
                column.refuse(
                    pp, step, f"stage {i.stage} was unsharded before", hint=f"delete {i} at step {step}"
                )
            whole[i.stage] = _gathered(column.program, i)
        elif i.kind == "RESHARD":
            if i.stage not in whole:
                column.refuse(
                    pp, step, f"stage {i.stage} is not unsharded", hint=f"delete {i} at step {step}"
                )
            del whole[i.stage]
            ended.add(i.stage)
        elif i.is_computation and i.stage in ended:
            column.refuse(
                pp, step, f"stage {i.stage} was resharded before", hint=f"{i.stage}RESHARD after {i.name}"
            )
        elif i.kind in ("F", "B", "I") and is_sharded:
            _check_gathered(column, pp, step, i, whole.get(i.stage, Counter()))
    for stage in whole:
        column.refuse(
            pp, last, f"stage {stage} is never resharded", hint=f"{stage}RESHARD before REDUCE_GRAD"
        )


def _gathered(program: Program, i: Instruction) -> Counter[str]:
    return Counter(
        fqn
        for call in program.collectives(i)
        if call.kind == "all_gather" and call.bucket
        for fqn in program.buckets[call.bucket]
    )


def _check_gathered(column: Column, pp: int, step: int, i: Instruction, whole: Counter[str]) -> None:
    program = column.program
    own = _gathered(program, i)
    for parameter in program.parameters:
        if i.stage in parameter.stages:
            count = own[parameter.fqn] + whole[parameter.fqn]
            if count != 1:
                column.refuse(
                    pp,
                    step,
                    f"{parameter.fqn} is gathered {count} times for it and not once",
                    hint=f"{i.stage}UNSHARD before {i.name}",
                )
    reduced: set[str] = set()
    for call in program.collectives(i):
        if call.axis == "dp" and call.kind == "reduce_scatter":
            reduced.add(call.bucket)
        elif call.axis == "dp" and call.bucket in reduced:
            column.refuse(
                pp,
                step,
                f"bucket {call.bucket} is gathered after its gradient is reduced",
                hint=_ordered(call),
            )


def _ordered(call: Collective) -> str:
    return f"dp.all_gather of {{{call.bucket}}} before its dp.reduce_scatter"
