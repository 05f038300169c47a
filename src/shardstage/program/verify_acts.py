"""What the ranks of one pipeline do: every computation once, every transfer from end to end, nothing read before it is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

from shardstage.graph.cuts import Edge
from shardstage.program.instruction import Instruction, InstructionKind
from shardstage.program.program import Program, TensorType
from shardstage.program.verify_fold import Column

__all__ = [
    "check_buffers",
    "check_computations",
    "check_message_order",
    "check_message_types",
    "check_transfers",
]

_PARTNER: Mapping[str, InstructionKind] = {
    "SEND_F": "RECV_F",
    "RECV_F": "SEND_F",
    "SEND_B": "RECV_B",
    "RECV_B": "SEND_B",
}


class _Act(NamedTuple):
    """An instruction without its tables."""

    kind: str
    stage: int | None
    microbatch: int | None
    peer: int | None


def check_computations(column: Column, pp: int) -> None:
    """Every stage of the rank runs F once for every microbatch, and B once, or I and W once each."""
    program = column.program
    seen: Counter[tuple[int | None, str, int | None]] = Counter()
    for step, i in column.steps(pp):
        if i.stage is not None and program.stage_ranks[i.stage] != pp:
            column.refuse(
                pp,
                step,
                f"stage {i.stage} runs on pipeline rank {program.stage_ranks[i.stage]}",
                hint=f"stages … {i.stage}=pp{pp}",
            )
        if i.is_computation:
            seen[i.stage, i.kind, i.microbatch] += 1
            halves = {k: seen[i.stage, k, i.microbatch] for k in "BIW"}
            if seen[i.stage, i.kind, i.microbatch] > 1 or (halves["B"] and halves["I"] + halves["W"]):
                column.refuse(
                    pp,
                    step,
                    f"stage {i.stage} has already run {i.kind if seen[i.stage, i.kind, i.microbatch] > 1 else 'B, I or W'} "
                    f"for microbatch {i.microbatch}",
                    hint=f"delete {i} at step {step}",
                )
    _require_all_computations(column, pp, seen)


def _require_all_computations(
    column: Column, pp: int, seen: Counter[tuple[int | None, str, int | None]]
) -> None:
    last = len(column.rows[pp].instructions) - 2
    for stage in column.program.stages_of(pp):
        for microbatch in range(column.program.num_microbatches):
            done = {kind for kind in "FBIW" if seen[stage, kind, microbatch]}
            if done in ({"F", "B"}, {"F", "I", "W"}):
                continue
            missing = next(kind for kind in ("F", *("IW" if done & {"I", "W"} else "B")) if kind not in done)
            near = [step for step, i in column.steps(pp) if (i.stage, i.microbatch) == (stage, microbatch)]
            column.refuse(
                pp,
                near[-1] if near else last,
                f"stage {stage} never runs {missing} for microbatch {microbatch}",
                hint=f"{stage}{missing}{microbatch}",
            )


def check_transfers(column: Column, pp: int) -> None:
    """The rank sends and receives exactly what crosses the edges of its stages, each message once.

    Forwards over every edge between stages of different ranks, backwards over those that a gradient flows along.
    """
    expected = {_Act(*act): edges for act, edges in _expected_transfers(column.program, pp)}
    seen: set[_Act] = set()
    for step, i in column.steps(pp):
        if not (i.is_send or i.is_receive):
            continue
        act = _Act(i.kind, i.stage, i.microbatch, i.peer)
        if act not in expected or act in seen:
            missing = next((other for other in expected if other not in seen and other.kind == i.kind), None)
            column.refuse(
                pp,
                step,
                "this message was moved before" if act in seen else "no edge asks for this message",
                hint=f"{_text(missing)} is missing" if missing else f"delete {i} at step {step}",
            )
        seen.add(act)
        values = tuple(tensor.value for tensor in column.program.tensors(i))
        if sorted(values) != sorted(edge.value for edge in expected[act]):
            column.refuse(
                pp,
                step,
                f"moves {', '.join(values)} where {', '.join(edge.value for edge in expected[act])} crosses",
                hint=f"a message of {', '.join(edge.value for edge in expected[act])}",
            )
    for act in expected:
        if act not in seen:
            kinds = "F" if act.kind.endswith("F") else "BI"
            at = next(s for s, i in column.steps(pp) if i.kind in kinds and _is_of(i, act))
            column.refuse(pp, at, f"{_text(act)} is missing", hint=f"{_text(act)}(m0)")


def _is_of(i: Instruction, act: _Act) -> bool:
    return (i.stage, i.microbatch) == (act.stage, act.microbatch)


def _expected_transfers(program: Program, pp: int) -> Iterator[tuple[tuple[str, int, int, int], list[Edge]]]:
    found: dict[tuple[str, int, int], list[Edge]] = {}
    ranks = program.stage_ranks
    for edge in program.edges:
        if ranks[edge.source] == ranks[edge.target]:
            continue
        if ranks[edge.source] == pp:
            found.setdefault(("SEND_F", edge.source, edge.target), []).append(edge)
            if edge.requires_grad:
                found.setdefault(("RECV_B", edge.source, edge.target), []).append(edge)
        if ranks[edge.target] == pp:
            found.setdefault(("RECV_F", edge.target, edge.source), []).append(edge)
            if edge.requires_grad:
                found.setdefault(("SEND_B", edge.target, edge.source), []).append(edge)
    for (kind, stage, peer), edges in found.items():
        for microbatch in range(program.num_microbatches):
            yield (kind, stage, microbatch, peer), edges


def _text(act: _Act) -> str:
    return Instruction(act.stage, cast("InstructionKind", act.kind), act.microbatch, act.peer).name


def check_message_types(column: Column, pp: int) -> None:
    """Both ends of a message agree on values, their order, dtypes and shapes; a gradient is of its value's dtype and shape."""
    types: dict[tuple[str, int | None, int | None], TensorType] = {}
    for step, i in column.steps(pp):
        if not (i.is_send or i.is_receive):
            continue
        tensors = column.program.tensors(i)
        partner = _partner(column, i)
        if column.program.tensors(partner) != tensors:
            column.refuse(
                pp,
                step,
                f"moves {_types(tensors)} and {partner.name} of {column.where(_pp_of(column, i.peer))} "
                f"{_types(column.program.tensors(partner))}",
                hint=f"{i.name}({partner.message})",
            )
        for tensor in tensors:
            ends = (i.stage, i.peer) if i.kind in ("SEND_F", "RECV_B") else (i.peer, i.stage)
            known = types.setdefault((f"{tensor.value} {ends}", i.microbatch, None), tensor)
            if known != tensor:
                column.refuse(
                    pp,
                    step,
                    f"the gradient of {_types([known])} travels as {_types([tensor])}",
                    hint=f"{tensor.value}:{known.dtype}[{','.join(map(str, known.shape))}]",
                )


def check_message_order(column: Column) -> None:
    """Messages from one rank to another, forwards or backwards, are received in the order in which they are sent.

    Transports that match by order (NCCL) would otherwise mix them up or stall.
    """
    sent: dict[tuple[int, int, str], list[tuple[int | None, int | None, int | None]]] = {}
    for pp in range(len(column.rows)):
        for _, i in column.steps(pp):
            if i.is_send:
                route = (pp, _pp_of(column, i.peer), i.kind[-1])
                sent.setdefault(route, []).append((i.stage, i.peer, i.microbatch))
    next_of = {route: iter(messages) for route, messages in sent.items()}
    for pp in range(len(column.rows)):
        for step, i in column.steps(pp):
            if i.is_receive:
                expected = next(next_of[_pp_of(column, i.peer), pp, i.kind[-1]])
                if expected != (i.peer, i.stage, i.microbatch):
                    first = Instruction(expected[1], i.kind, expected[2], expected[0]).name
                    column.refuse(
                        pp,
                        step,
                        f"{column.where(_pp_of(column, i.peer))} sends what {first} receives before",
                        hint=f"{first} before {i.name}",
                    )


def _partner(column: Column, i: Instruction) -> Instruction:
    step = column.step_of[_PARTNER[i.kind], i.peer, i.microbatch, i.stage]
    return column.rows[_pp_of(column, i.peer)].instructions[step]


def _pp_of(column: Column, stage: int | None) -> int:
    assert stage is not None
    return column.program.stage_ranks[stage]


def _types(tensors: tuple[TensorType, ...] | list[TensorType]) -> str:
    return " ".join(f"{t.value}:{t.dtype}[{','.join(map(str, t.shape))}]" for t in tensors)


def check_buffers(column: Column, pp: int) -> None:
    """Nothing is read before it is written or after it is freed.

    F reads what arrives over the stage's edges; B and I what F kept and the gradients of what the stage sent; W what I kept. SEND_F sends
    what F made and B frees; SEND_B what B made.
    """
    done: set[_Act] = set()
    for step, i in column.steps(pp):
        if i.stage is None or i.microbatch is None:
            continue
        for need in _needs(column.program, i):
            if need not in done:
                column.refuse(
                    pp,
                    step,
                    f"reads what {_text(need)} yields, which has not run",
                    hint=f"{_text(need)} before {i.name}",
                )
        if i.kind == "SEND_F" and any(_Act(k, i.stage, i.microbatch, None) in done for k in "BI"):
            column.refuse(
                pp,
                step,
                "sends what the backward has freed",
                hint=f"{i.name} before {i.stage}B{i.microbatch}",
            )
        kind = "B" if i.kind == "I" else i.kind  # both yield the gradient of the stage's input
        done.add(_Act(kind, i.stage, i.microbatch, i.peer))


def _needs(program: Program, i: Instruction) -> Iterator[_Act]:
    """What must have run on this rank before an act."""
    stage, m, ranks = i.stage, i.microbatch, program.stage_ranks
    assert stage is not None
    if i.kind == "SEND_F":
        yield _Act("F", stage, m, None)
    elif i.kind in ("SEND_B", "W"):
        yield _Act("B", stage, m, None)
    elif i.kind in ("B", "I"):
        yield _Act("F", stage, m, None)
    for edge in program.edges:
        if i.kind == "F" and edge.target == stage:
            is_local = ranks[edge.source] == ranks[stage]
            yield _Act("F", edge.source, m, None) if is_local else _Act("RECV_F", stage, m, edge.source)
        if i.kind in ("B", "I") and edge.source == stage and edge.requires_grad:
            is_local = ranks[edge.target] == ranks[stage]
            yield _Act("B", edge.target, m, None) if is_local else _Act("RECV_B", stage, m, edge.target)
