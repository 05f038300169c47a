"""Single corruptions of a Program: one instruction of one rank, or of all ranks of a row, is not what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, get_args

from shardstage.cluster import CollectiveKind
from shardstage.program import Collective, Instruction, Program, Row, TensorType
from shardstage.program.instruction import InstructionKind

__all__ = ["CORRUPTIONS", "corrupted"]


@dataclass(kw_only=True)
class _Draft:
    """A row's acts while they are being corrupted, and what is new in the tables."""

    program: Program
    acts: list[Instruction]
    random: Random
    messages: dict[str, tuple[TensorType, ...]] = field(default_factory=dict)
    calls: dict[str, tuple[Collective, ...]] = field(default_factory=dict)

    def any_of(self, condition: Callable[[Instruction], Any]) -> int | None:
        found = [at for at, act in enumerate(self.acts) if condition(act)]
        return self.random.choice(found) if found else None


def corrupted(program: Program, how: str, random: Random) -> Program | None:
    """The program with one corruption of a kind; ``None`` where this draw finds nothing to corrupt."""
    row = random.choice(program.rows)
    dp, tp = random.choice(row.dp), random.choice(row.tp)
    draft = _Draft(program=program, acts=list(row.instructions), random=random)
    CORRUPTIONS[how](draft)
    if tuple(draft.acts) == row.instructions:
        return None
    instructions = tuple(draft.acts)
    if how != "with a mistyped collective" and random.random() < 0.3:  # all ranks of the row alike
        new = [replace(row, instructions=instructions)]
    else:
        new = [*_others(row, dp, tp), Row(pp=row.pp, dp=(dp,), tp=(tp,), instructions=instructions)]
    rows = tuple(r for old in program.rows for r in (new if old is row else [old]))
    return replace(
        program,
        rows=rows,
        messages={**program.messages, **draft.messages},
        calls={**program.calls, **draft.calls},
    )


def _others(row: Row, dp: int, tp: int) -> Iterator[Row]:
    """The row without one of its ranks."""
    others = tuple(d for d in row.dp if d != dp)
    beside = tuple(t for t in row.tp if t != tp)
    if others:
        yield replace(row, dp=others)
    if beside:
        yield replace(row, dp=(dp,), tp=beside)


def _drop(draft: _Draft) -> None:
    del draft.acts[draft.random.randrange(len(draft.acts))]


def _duplicate(draft: _Draft) -> None:
    at = draft.random.randrange(len(draft.acts))
    to = draft.random.choice([at, draft.random.randrange(len(draft.acts) + 1)])
    draft.acts.insert(to, draft.acts[at])


def _swap_adjacent(draft: _Draft) -> None:
    at = draft.random.randrange(len(draft.acts) - 1)
    draft.acts[at : at + 2] = draft.acts[at : at + 2][::-1]


def _swap_any(draft: _Draft) -> None:
    first, second = draft.random.sample(range(len(draft.acts)), 2)
    draft.acts[first], draft.acts[second] = draft.acts[second], draft.acts[first]


def _mistype_kind(draft: _Draft) -> None:
    """F for B, SEND_F for RECV_B, …"""
    at = draft.any_of(lambda act: act.microbatch is not None)
    if at is not None:
        act = draft.acts[at]
        kinds = ("F", "B", "I", "W") if act.is_computation else ("SEND_F", "RECV_F", "SEND_B", "RECV_B")
        kind: InstructionKind = draft.random.choice([kind for kind in kinds if kind != act.kind])
        draft.acts[at] = replace(act, kind=kind)


def _mistype_message(draft: _Draft) -> None:
    """Another dtype or shape, a value less, or another message."""
    at = draft.any_of(lambda act: act.message)
    if at is None:
        return
    tensors = draft.program.tensors(draft.acts[at])
    number = draft.random.randrange(len(tensors))
    tensor = tensors[number]
    wrong = draft.random.choice(
        [
            (TensorType(tensor.value, "bfloat16", tensor.shape),),
            (TensorType(tensor.value, tensor.dtype, (*tensor.shape[:-1], tensor.shape[-1] + 1)),),
            (TensorType(tensor.value, tensor.dtype, (tensor.shape[0] + 1, *tensor.shape[1:])),),
            (TensorType("another", tensor.dtype, tensor.shape),),
            (),
        ]
    )
    draft.messages["wrong"] = (*tensors[:number], *wrong, *tensors[number + 1 :])
    draft.acts[at] = replace(draft.acts[at], message="wrong")


def _change_calls(
    draft: _Draft, change: Callable[[list[Collective], int], None], condition: Callable[[Collective], Any]
) -> None:
    at = draft.any_of(lambda act: any(map(condition, draft.program.collectives(act))))
    if at is not None:
        calls = list(draft.program.collectives(draft.acts[at]))
        change(calls, draft.random.choice([n for n, call in enumerate(calls) if condition(call)]))
        if tuple(calls) != draft.program.collectives(draft.acts[at]):
            draft.calls["wrong"] = tuple(calls)
            draft.acts[at] = replace(draft.acts[at], calls="wrong" if calls else "")


def _mistype_collective(draft: _Draft) -> None:
    """Another kind, dtype or number of elements."""

    def change(calls: list[Collective], at: int) -> None:
        call = calls[at]
        kinds = [kind for kind in get_args(CollectiveKind) if kind != call.kind]
        calls[at] = draft.random.choice(
            [
                replace(call, kind=draft.random.choice(kinds)),
                replace(call, dtype="bfloat16"),
                replace(call, numel=call.numel + 1),
            ]
        )

    _change_calls(draft, change, lambda _: True)


def _reorder_collectives(draft: _Draft) -> None:
    """A collective is dropped, repeated or swapped with another of its act."""

    def change(calls: list[Collective], at: int) -> None:
        other = draft.random.randrange(len(calls))
        match draft.random.randrange(3):
            case 0:
                del calls[at]
            case 1:
                calls.insert(other, calls[at])
            case _:
                calls[at], calls[other] = calls[other], calls[at]

    _change_calls(draft, change, lambda _: True)


def _misaddress_act(draft: _Draft) -> None:
    """Another peer, stage or microbatch; mostly one that there is."""
    at = draft.any_of(lambda act: act.stage is not None)
    if at is not None:
        act, program, random = draft.acts[at], draft.program, draft.random
        draft.acts[at] = random.choice(
            [
                replace(act, stage=random.randrange(program.num_stages + 1)),
                act if act.peer is None else replace(act, peer=random.randrange(program.num_stages + 1)),
                act
                if act.microbatch is None
                else replace(act, microbatch=random.randrange(program.num_microbatches + 1)),
            ]
        )


def _misaddress_collective(draft: _Draft) -> None:
    """Along another axis, or for another bucket."""
    axes = sorted({call.axis for calls in draft.program.calls.values() for call in calls})
    buckets = ["", *draft.program.buckets]

    def change(calls: list[Collective], at: int) -> None:
        calls[at] = draft.random.choice(
            [
                replace(calls[at], axis=draft.random.choice(axes)),
                replace(calls[at], bucket=draft.random.choice(buckets)),
            ]
        )

    _change_calls(draft, change, lambda _: True)


def _misname_calls(draft: _Draft) -> None:
    """Another act's collectives, or none."""
    at = draft.random.randrange(len(draft.acts))
    draft.acts[at] = replace(draft.acts[at], calls=draft.random.choice(["", *draft.program.calls]))


CORRUPTIONS: Mapping[str, Callable[[_Draft], None]] = {
    "dropped": _drop,
    "duplicated": _duplicate,
    "swapped with the next": _swap_adjacent,
    "swapped with any": _swap_any,
    "of another kind": _mistype_kind,
    "with a mistyped message": _mistype_message,
    "with a mistyped collective": _mistype_collective,
    "with its collectives in disorder": _reorder_collectives,
    "misaddressed": _misaddress_act,
    "with a misaddressed collective": _misaddress_collective,
    "with another's collectives": _misname_calls,
}
