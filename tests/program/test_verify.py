"""``verify`` passes what lowering makes, and says of every kind of mistake where it is."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.program.hand_written import PIPELINE, SHARDED, edited
from tests.program.programs import CASES, SEQUENCE, graph_of, program_of

from shardstage.errors import ProgramError
from shardstage.layout import Mesh
from shardstage.plan import complete, parse_request
from shardstage.program import Row, lower, parse_program, verify

ROW = "COUNT[c0] 0F0[c1] 0SEND_F0>1(m0) 0F1[c1] 0SEND_F1>1(m0) 0RECV_B0<1(m1) 0B0[c1] 0RECV_B1<1(m1) 0B1[c1]"

TABLES = {
    "a stage on no rank": ("1=pp1", "1=pp0", "stages run on pipeline ranks"),
    "an edge to itself": ("x 0>1", "x 1>1", "edge x 1>1 does not lead"),
    "an edge twice": ("mask 0>1", "x 0>1", "edge x 0>1 does not lead"),
    "no such stage": ("0F0[c1]", "2F0[c1]", "there is no stage 2"),
    "no such microbatch": ("0F1[c1]", "0F2[c1]", "there is no microbatch 2"),
    "no such message": ("0>1(m0)", "0>1(m9)", "moves m9, which is not in the table"),
    "no such calls": ("0F0[c1]", "0F0[c9]", "runs c9, which is not in the table"),
    "no such bucket": ("[64]{b0}", "[64]{b9}", "carries bucket b9, which is not in the table"),
    "no such axis": ("tie0+1.all_reduce", "tie0+5.all_reduce", "runs along tie0[+]5, which is no axis"),
    "a rank in two rows": ("pp=1 dp=1 tp=*", "pp=1 dp=* tp=*", r"rank 4 \(pp=1 dp=0 tp=0\) is in 2 rows"),
    "a rank in no row": ("pp=1 dp=1 tp=*", "pp=1 dp=1 tp=0", r"rank 7 \(pp=1 dp=1 tp=1\) is in 0 rows"),
    "a rank outside the mesh": (
        "rows",
        "rows\n  pp=2 dp=0 tp=0",
        "for pp=2 dp=0 tp=0, which is outside the mesh",
    ),
    "a sample too many": ("dp=1 2 1", "dp=1 2 2", "hold 8 samples and the global batch 7"),
    "uneven counts of microbatches": ("dp=1 2 1", "dp=1 2 1 0", "must run equally many"),
    "a tie forgotten": ("sum=dp,tie0+1", "sum=dp", "and not over dp, tie0[+]1"),
    "a frozen gradient summed": ("stages=1 frozen", "stages=1 sum=dp frozen", "and not over nothing"),
    "a parameter twice": ("first.norm stages=0", "second.norm stages=0", "is there 2 times"),
}
ACTS = {
    "the count comes late": (f"{ROW}", f"0F0[c1] {ROW.replace(' 0F0[c1]', '')}", "COUNT stands here and must stand at step 0"),
    "no step": ("REDUCE_GRAD[c3] STEP[c4]", "REDUCE_GRAD[c3]", "STEP is there 0 times"),
    "the reduction before the last backward": (
        "0B1[c1] REDUCE_GRAD[c3]", "REDUCE_GRAD[c3] 0B1[c1]", "REDUCE_GRAD stands here and must stand at step 9"),
    "targets counted alone": ("COUNT[c0]", "COUNT", "targets is not summed once over dp"),
    "the norm summed twice": (
        "c4 world", "c4 world.all_reduce:float64[2] world", "norm is not summed once over the world"),
    "a collective out of place": ("0F0[c1]", "0F0[c0]", "F runs dp.all_reduce"),
    "another's stage": ("0F0[c1]", "1F0[c1]", "stage 1 runs on pipeline rank 1"),
    "a forward twice": ("0F1[c1]", "0F0[c1]", "stage 0 has already run F for microbatch 0"),
    "a whole backward and half of one": ("1I0[c1]", "1B0[c1]", "has already run B, I or W for microbatch 0"),
    "a weight gradient forgotten": ("1W0 1W1", "1W1", "stage 1 never runs W for microbatch 0"),
    "a message to the wrong stage": ("0SEND_F0>1(m0)", "0SEND_F0>0(m0)", "no edge asks for this message"),
    "a message twice": ("0SEND_F1>1(m0)", "0SEND_F0>1(m0)", "this message was moved before"),
    "a message forgotten": ("0SEND_F0>1(m0) ", "", "0SEND_F0>1 is missing"),
    "a value forgotten": ("0SEND_F0>1(m0)", "0SEND_F0>1(m1)", "moves x where x, mask crosses"),
    "another shape": ("0SEND_F0>1(m0)", "0SEND_F0>1(m2)", "moves x:float32.1,8.*1RECV_F0<0 of rank 4"),
    "a gradient of another shape": (
        "m1 x:float32[2,8]", "m1 x:float64[2,8]", "gradient of x:float32.* travels as x:float64"),
    "sent before it is made": (
        "0F0[c1] 0SEND_F0>1(m0)", "0SEND_F0>1(m0) 0F0[c1]", r"step 1 0SEND_F0>1: reads what 0F0 yields"),
    "computed before it arrives": ("1RECV_F0<0(m0) 1F0[c1]", "1F0[c1] 1RECV_F0<0(m0)", "reads what 1RECV_F0<0"),
    "a gradient late": ("0RECV_B0<1(m1) 0B0[c1]", "0B0[c1] 0RECV_B0<1(m1)", "reads what 0RECV_B0<1 yields"),
    "a weight gradient early": (
        "1I0[c1] 1SEND_B0>0(m1) 1RECV_F1<0(m0) 1F1[c1] 1I1[c1] 1SEND_B1>0(m1) 1W0",
        "1W0 1I0[c1] 1SEND_B0>0(m1) 1RECV_F1<0(m0) 1F1[c1] 1I1[c1] 1SEND_B1>0(m1)",
        "reads what 1B0 yields"),
    "received in another order": (
        "1RECV_F0<0(m0) 1F0[c1] 1I0[c1] 1SEND_B0>0(m1) 1RECV_F1<0(m0) 1F1[c1]",
        "1RECV_F1<0(m0) 1F1[c1] 1RECV_F0<0(m0) 1F0[c1] 1I0[c1] 1SEND_B0>0(m1)",
        r"step 1 1RECV_F1<0: rank 0 \(pp=0 dp=0 tp=0\) sends what 1RECV_F0<0 receives before"),
}  # fmt: skip
GRADIENTS = {
    "another rank's parameter": ("b1 first.norm", "b1 second.norm", "carries second.norm, which is used by stages 1"),
    "a frozen parameter": ("b2 second.norm", "b2 second.norm second.table", "carries second.table, which is frozen"),
    "summed twice over dp": (
        "c3 dp", "c3 dp.reduce_scatter:float32[64]{b0} dp", "embed.weight is summed 2 times over dp and not once"),
    "not summed over a tie": (" tie0+1.all_reduce:float32[32]{b0}", "", "summed 0 times over tie0[+]1"),
    "not summed over tp": (" tp.all_reduce:float32[5]{b1}", "", "first.norm is summed 0 times over tp"),
    "the whole summed after it is scattered": (
        "tp.all_reduce:float32[5]{b1}", "tp.all_reduce:float32[10]{b1}", "sums 10 elements .* which holds 5"),
    "summed over a tie before dp": (
        "c3 dp.reduce_scatter:float32[64]{b0} dp.reduce_scatter:float32[10]{b1} "
        "tp.all_reduce:float32[5]{b1} tie0+1.all_reduce:float32[32]{b0}",
        "c3 tie0+1.all_reduce:float32[64]{b0} dp.reduce_scatter:float32[64]{b0} "
        "dp.reduce_scatter:float32[10]{b1} tp.all_reduce:float32[5]{b1}",
        "summed over dp after another axis"),
    "scattered and not gathered": (
        " dp.all_gather:float32[64]{b0} dp.all_gather:float32[10]{b1}", " dp.all_gather:float32[10]{b1}",
        "gathers 1 buckets over dp where 2 were scattered"),
}  # fmt: skip
SHARDING = {
    "not gathered": ("0F0[c2]", "0F0", "block.weight is gathered 0 times"),
    "gathered twice": ("0UNSHARD[c1]", "0UNSHARD[c2]", "embed.weight is gathered 0 times|block.weight is gathered 2"),
    "gathered twice by one act": (
        "c1 dp.all_gather:float32[8]{b0}", "c1 dp.all_gather:float32[8]{b0} dp.all_gather:float32[8]{b0}",
        "embed.weight is gathered 2 times"),
    "unsharded twice": ("0UNSHARD[c1]", "0UNSHARD[c1] 0UNSHARD[c1]", "stage 0 was unsharded before"),
    "never unsharded": ("0UNSHARD[c1] ", "", "embed.weight is gathered 0 times"),
    "resharded twice": ("0RESHARD", "0RESHARD 0RESHARD", "stage 0 is not unsharded"),
    "resharded too early": ("0B0[c3] 0RESHARD", "0RESHARD 0B0[c3]", "stage 0 was resharded before"),
    "never resharded": (" 0RESHARD", "", "stage 0 is never resharded"),
    "reduced in one backward only": ("0B0[c3]", "0B0[c2]", "summed over dp in 1 of 2 backwards and 0 times at the end"),
    "reduced in the backwards and at the end": (
        "REDUCE_GRAD", "REDUCE_GRAD[c6]", "in 2 of 2 backwards and 1 times at the end"),
    "reduced before it is gathered": ("0B0[c3]", "0B0[c5]", "gathered after its gradient is reduced"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_lowered_programs_verify(name: str) -> None:
    verify(program_of(name))


@settings(deadline=None, max_examples=12)
@given(
    schedule=st.sampled_from(
        ["gpipe", "1f1b", "interleaved-1f1b", "looped-bfs", "zb-h1", "zb-v", "dualpipe-v"]
    ),
    num_ranks=st.integers(2, 4),
    rounds=st.integers(1, 4),
)
def test_every_schedule_verifies_at_every_size(schedule: str, num_ranks: int, rounds: int) -> None:
    graph = graph_of("llama-tiny")
    request = parse_request(f"pp={num_ranks},mb=1,schedule={schedule}")
    plan = complete(
        request, graph, num_ranks=num_ranks, global_batch=rounds * num_ranks * 2, sequence=SEQUENCE
    )
    verify(lower(graph, plan))


@pytest.mark.parametrize("text", [PIPELINE, SHARDED], ids=["pipeline", "sharded"])
def test_programs_written_by_hand_verify(text: str) -> None:
    verify(parse_program(text))


@pytest.mark.parametrize("name", TABLES)
def test_tables_ranks_and_samples_are_refused(name: str) -> None:
    refuses(PIPELINE, *TABLES[name])


@pytest.mark.parametrize("name", ACTS)
def test_acts_out_of_place_are_refused(name: str) -> None:
    refuses(PIPELINE, *ACTS[name])


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_summed_wrongly_are_refused(name: str) -> None:
    refuses(PIPELINE, *GRADIENTS[name])


@pytest.mark.parametrize("name", SHARDING)
def test_parameters_that_are_not_whole_are_refused(name: str) -> None:
    refuses(SHARDED, *SHARDING[name])


def test_dp_ranks_must_run_equal_collectives() -> None:
    """The second dp rank scatters its buckets in another order."""
    program = edited(
        PIPELINE,
        "dp.reduce_scatter:float32[64]{b0} dp.reduce_scatter:float32[10]{b2}",
        "dp.reduce_scatter:float32[10]{b2} dp.reduce_scatter:float32[64]{b0}",
    )
    crossed = dict(program.calls) | {"c9": parse_program(PIPELINE).calls["c5"]}
    first, second = (row for row in program.rows if row.pp == 1)
    *acts, reduction, step = second.instructions
    straight = replace(second, instructions=(*acts, replace(reduction, calls="c9"), step))
    rows = (*program.rows[:2], first, straight)
    with pytest.raises(
        ProgramError, match=r"rank 6 .* step 11 REDUCE_GRAD: runs dp.reduce_scatter:float32\[64\]"
    ):
        verify(replace(program, calls=crossed, rows=rows))


def test_tp_ranks_must_mix_the_same_microbatch() -> None:
    """One of two tensor-parallel ranks runs its forwards in another order: every collective finds one of its type, and the wrong one."""
    program = parse_program(PIPELINE)
    acts = " ".join(map(str, program.rows[0].instructions))
    swapped = acts.replace("0F0[c1] 0SEND_F0>1(m0) 0F1[c1]", "0F1[c1] 0F0[c1] 0SEND_F0>1(m0)")
    text = PIPELINE.replace("pp=0 dp=0 tp=*", f"pp=0 dp=0 tp=1\n    {swapped}\n  pp=0 dp=0 tp=0")
    with pytest.raises(ProgramError, match=r"of 0F1 .* over tp, and rank 0 .* there .* of 0F0"):
        verify(parse_program(text))


def test_microbatches_of_one_size_run_the_same_collectives() -> None:
    refuses(PIPELINE, "0B1[c1]", "0B1[c2]", "runs 2 collectives and for another microbatch 2, or others")


def test_microbatches_of_other_sizes_run_collectives_of_the_same_kinds() -> None:
    refuses(PIPELINE, "c2 2*tp", "c2 tp", "runs 1 collectives and for another microbatch 2, or others")


def test_ranks_that_wait_for_each_other_are_named_and_drawn() -> None:
    first = "0F0[c1] 0SEND_F0>1(m0) 0F1[c1] 0SEND_F1>1(m0) 0RECV_B0<1(m1) 0B0[c1]"
    moved = "0F0[c1] 0SEND_F0>1(m0) 0RECV_B0<1(m1) 0B0[c1] 0F1[c1] 0SEND_F1>1(m0)"
    last = "1I0[c1] 1SEND_B0>0(m1) 1RECV_F1<0(m0) 1F1[c1]"
    behind = "1RECV_F1<0(m0) 1F1[c1] 1I0[c1] 1SEND_B0>0(m1)"
    text = re.sub(r"\n {4}", " ", PIPELINE)
    with pytest.raises(ProgramError) as refused:
        verify(parse_program(text.replace(first, moved).replace(last, behind)))
    assert refused.value.message == DEADLOCK
    assert refused.value.hint == "move 1RECV_F1<0 of rank 4 (pp=1 dp=0 tp=0) away from step 3"


def test_collectives_of_two_axes_that_cross_are_a_deadlock() -> None:
    """Each axis sees its collectives in order, and still a rank gathers over dp before the norm and its peer after it."""
    text = re.sub(r"\n {4}", " ", PIPELINE)
    at = text.index("pp=1 dp=1")
    with pytest.raises(
        ProgramError, match=r"deadlock: rank .* waits with world.all_reduce of STEP"
    ) as refused:
        verify(parse_program(text[:at] + text[at:].replace("STEP[c6]", "STEP[c7]")))
    assert "waits with dp.all_gather of STEP" in refused.value.message


def test_one_wrong_rank_of_thousands_is_found() -> None:
    """4,096 ranks of which one has another act: the fold keeps it apart."""
    small = program_of("dualpipe-v")
    mesh = Mesh(pp=small.mesh.pp, dp=1024, tp=small.mesh.tp)
    count = parse_program(SHARDED).calls["c0"]
    rows = tuple(
        replace(
            row,
            dp=tuple(range(mesh.dp)),
            instructions=(replace(row.instructions[0], calls="count"), *row.instructions[1:]),
        )
        for row in small.rows
    )
    large = replace(
        small,
        mesh=mesh,
        global_batch=small.global_batch * mesh.dp,
        samples=small.samples * mesh.dp,
        calls={**small.calls, "count": count},
        parameters=tuple(replace(p, is_trained=False, summed_over=()) for p in small.parameters),
        rows=tuple(_without_reductions(row) for row in rows),
    )
    verify(large)
    good, *others = large.rows
    wrong = replace(
        good, dp=(777,), tp=(1,), instructions=tuple(i for i in good.instructions if i.kind != "COUNT")
    )
    split = (
        replace(good, dp=tuple(d for d in good.dp if d != 777)),
        replace(good, dp=(777,), tp=(0,)),
        wrong,
    )
    with pytest.raises(ProgramError, match=r"rank 1555 \(pp=0 dp=777 tp=1\)"):
        verify(replace(large, rows=(*split, *others)))


def _without_reductions(row: Row) -> Row:
    *acts, reduction, step = row.instructions
    return replace(row, instructions=(*acts, replace(reduction, calls=""), step))


def test_a_message_is_drawn_where_it_is_missing() -> None:
    with pytest.raises(ProgramError) as refused:
        verify(edited(PIPELINE, "1RECV_F1<0(m0) 1F1[c1]", "1F1[c1]"))
    assert refused.value.message == MISSING


DEADLOCK = """\
deadlock: rank 4 (pp=1 dp=0 tp=0), step 3: waits with 1RECV_F1<0 for 0SEND_F1>1 of rank 0 (pp=0 dp=0 tp=0)
rank 0 (pp=0 dp=0 tp=0), step 3: waits with 0RECV_B0<1 for 1SEND_B0>0 of rank 4 (pp=1 dp=0 tp=0)
       │ -3     -2          -1          0             1    2    3
rank 0 │ COUNT  0F0         0SEND_F0>1  ▶0RECV_B0<1◀  0B0  0F1  0SEND_F1>1
rank 4 │ COUNT  1RECV_F0<0  1F0         ▶1RECV_F1<0◀  1F1  1I0  1SEND_B0>0"""
MISSING = """\
rank 4 (pp=1 dp=0 tp=0), step 5 1F1: 1RECV_F1<0 is missing
       │ 4           5    6           7           8    9           10
rank 0 │ 0SEND_F1>1                   0RECV_B0<1  0B0              0RECV_B1<1
rank 4 │ 1F0         1I0  1SEND_B0>0  ▶1F1◀       1I1  1SEND_B1>0  1W0"""


def refuses(text: str, old: str, new: str, message: str) -> None:
    with pytest.raises(ProgramError, match=message) as refused:
        verify(edited(text, old, new))
    assert refused.value.hint
    assert all(len(line) <= 80 for line in refused.value.message.splitlines()[1:])
