"""ZeRO-2/3 in a step whose length is known by hand: what is gathered and summed beside compute, and what beside nothing."""

from __future__ import annotations

import pytest
from tests.simulator.programs import prices

from shardstage.layout import Mesh
from shardstage.program import Collective, Instruction, Program, Row
from shardstage.simulator import step_time

SECOND = 1000
"""Elements that take a second at ``BYTES_PER_S``."""
BYTES_PER_S = 4.0 * SECOND


def gather(bucket: str) -> Collective:
    return Collective("dp", "all_gather", "float32", SECOND, bucket)


def reduce(bucket: str, seconds: int = 1) -> Collective:
    return Collective("dp", "reduce_scatter", "float32", seconds * SECOND, bucket)


def step_s(unsharded: str, forward: str, backward: list[Collective], slowdown: float = 1.0) -> float:
    """Two ranks, one microbatch, F of 10 s and B of 20 s; each letter is a bucket that is gathered."""
    calls = {"u": tuple(map(gather, unsharded)), "f": tuple(map(gather, forward)), "b": tuple(backward)}
    rows = [
        Instruction(0, "UNSHARD", calls="u"),
        Instruction(0, "F", 0, calls="f" if forward else ""),
        Instruction(0, "B", 0, calls="b"),
        Instruction(0, "RESHARD"),
        Instruction(None, "STEP"),
    ]
    program = Program(
        mesh=Mesh(dp=2),
        schedule="1f1b",
        global_batch=2,
        samples=((1,), (1,)),
        stage_ranks=(0,),
        edges=(),
        messages={},
        calls={name: found for name, found in calls.items() if found},
        buckets={},
        parameters=(),
        rows=(Row(pp=0, dp=(0, 1), tp=(0,), instructions=tuple(rows if unsharded else rows[1:])),),
    )
    compute = {(0, "F"): 10.0, (0, "B"): 20.0}
    return step_time(program, prices(1, compute=compute, bytes_per_s=BYTES_PER_S, slowdown=slowdown))


ZERO_2 = [reduce(bucket) for bucket in "210"]
TIED_2 = [reduce(bucket) for bucket in "21s0"]
TIED_3 = [*map(gather, "210"), *TIED_2]


def test_the_first_block_s_gradients_are_summed_beside_nothing() -> None:
    """Of three equal sums the last: once it was taken to be the last block's, which comes first and was the only one not to hide."""
    assert step_s("012", "", ZERO_2) == 3 + 10 + 20 + 1
    later = [reduce("2"), reduce("1"), reduce("0", seconds=4)]
    assert step_s("012", "", later) == 3 + 10 + 20 + 4
    sooner = [reduce("2", seconds=4), reduce("1"), reduce("0")]
    assert step_s("012", "", sooner) == 3 + 10 + 20 + 1


def test_so_is_what_several_blocks_share_when_the_backward_is_over() -> None:
    """Behind it the tokens' block, whose sum FSDP2 starts then, too."""
    assert step_s("s012", "", TIED_2) == 4 + 10 + 20 + 2
    of_first_block_shared = [reduce("2"), reduce("1"), reduce("s", seconds=5)]
    assert step_s("s12", "", of_first_block_shared) == 3 + 10 + 20 + 5


def test_under_zero_3_the_first_gather_is_waited_for_as_well() -> None:
    """The backward's first runs beside the end of the forward."""
    assert step_s("s", "012", TIED_3) == 1 + 10 + 1 + 20 + 2
    assert step_s("", "012", [*map(gather, "210"), *ZERO_2]) == 10 + 1 + 20 + 1


def test_what_hides_slows_the_compute_down() -> None:
    """By half a second for each second: two gathers of the forward, all three and two sums of the backward."""
    assert step_s("s", "012", TIED_3, slowdown=1.5) == 1 + (10 + 1 + 1) + (20 + 2 + 2.5)


@pytest.mark.parametrize(("talk_s", "waits_s"), [(0, 20), (4, 16), (10, 10), (30, 10)])
def test_what_hides_may_run_beside_talk_along_tp(talk_s: int, waits_s: int) -> None:
    """Four sums of ten seconds race with the compute and that talk, which travel on other links; the last hides under neither."""
    talk = [Collective("tp", "all_reduce", "float32", talk_s * SECOND)] if talk_s else []
    sums = [reduce(bucket, seconds=10) for bucket in "3210"]
    assert step_s("0123", "", [*talk, *sums]) == 4 + 10 + 20 + talk_s + waits_s
