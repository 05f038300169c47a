"""Programs written by hand: pipelines of any named schedule, without a model."""

from __future__ import annotations

from collections.abc import Iterator

from shardstage.graph.cuts import Edge
from shardstage.layout import Mesh
from shardstage.program import Collective, Instruction, Program, Row, TensorType
from shardstage.schedule import Action, Schedule, make_schedule
from shardstage.simulator import PriceTable

MESSAGE_BYTES = 1024


def pipeline(
    name: str, num_ranks: int, num_microbatches: int, *, stages_per_rank: int = 1, dp: int = 1
) -> Program:
    """Each stage sends ``MESSAGE_BYTES`` to the next and, with dp, reduces 4 MB of gradients in two buckets."""
    schedule = make_schedule(
        name,
        num_stages=num_ranks * stages_per_rank,
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
    )
    rows = tuple(
        Row(pp=pp, dp=tuple(range(dp)), tp=(0,), instructions=tuple(_row(schedule, pp, dp)))
        for pp in range(num_ranks)
    )
    bucket = Collective("dp", "all_reduce", "float32", 500_000)
    return Program(
        mesh=Mesh(pp=num_ranks, dp=dp),
        schedule=name,
        global_batch=num_microbatches * dp,
        samples=((1,) * num_microbatches,) * dp,
        stage_ranks=schedule.stage_ranks,
        edges=tuple(
            Edge(value=f"v{stage}", source=stage, target=stage + 1, requires_grad=True)
            for stage in range(schedule.num_stages - 1)
        ),
        messages={"m0": (TensorType("v", "float32", (MESSAGE_BYTES // 4,)),)},
        calls={"c0": (bucket, bucket)},
        buckets={},
        parameters=(),
        rows=rows,
    )


def _row(schedule: Schedule, pp: int, dp: int) -> Iterator[Instruction]:
    yield Instruction(None, "COUNT")
    for action in schedule.actions[pp]:
        yield from _act(schedule, pp, action)
    yield Instruction(None, "REDUCE_GRAD", calls="c0" if dp > 1 else "")
    yield Instruction(None, "STEP")


def _act(schedule: Schedule, pp: int, action: Action) -> Iterator[Instruction]:
    stage, microbatch, ranks = action.stage, action.microbatch, schedule.stage_ranks
    is_before = stage > 0 and ranks[stage - 1] != pp
    is_behind = stage < schedule.num_stages - 1 and ranks[stage + 1] != pp
    if action.kind == "F":
        if is_before:
            yield Instruction(stage, "RECV_F", microbatch, stage - 1, "m0")
        yield Instruction(stage, "F", microbatch)
        if is_behind:
            yield Instruction(stage, "SEND_F", microbatch, stage + 1, "m0")
        return
    if is_behind and action.kind != "W":
        yield Instruction(stage, "RECV_B", microbatch, stage + 1, "m0")
    yield Instruction(stage, action.kind, microbatch)
    if is_before and action.kind != "W":
        yield Instruction(stage, "SEND_B", microbatch, stage - 1, "m0")


def prices(num_stages: int, **changed: object) -> PriceTable:
    """F, I and W take a second, B two; talking is free unless ``changed``."""
    seconds = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
    table = {"compute": {(s, kind): took for s in range(num_stages) for kind, took in seconds.items()}}
    return PriceTable(**{**table, **changed})  # type: ignore[arg-type]
