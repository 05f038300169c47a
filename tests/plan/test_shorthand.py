"""The shorthand: a plan in one line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstage.errors import PlanError
from shardstage.graph.recompute import PartialRecompute
from shardstage.layout import Mesh
from shardstage.plan import Plan, Request, StageRange, format_request, parse_request, shorthand
from shardstage.plan.shorthand import named_decisions

COUNT = st.integers(1, 4096)
RECOMPUTE = st.sampled_from(["none", "selective", "full"]) | st.builds(
    PartialRecompute, full=COUNT, selective=st.none() | st.integers(0, 9)
)

REQUESTS = st.builds(
    Request,
    dp=st.none() | COUNT,
    tp=COUNT,
    pp=COUNT,
    ep=COUNT,
    etp=st.none() | COUNT,
    is_sequence_parallel=st.booleans(),
    zero=st.sampled_from([0, 1, 2, 3]),
    microbatch=st.none() | COUNT,
    recompute=RECOMPUTE,
    stage_recompute=st.lists(RECOMPUTE, max_size=5).map(tuple),
    recompute_modules=st.lists(st.text("abc.*", min_size=1)).map(tuple),
    schedule=st.sampled_from(["gpipe", "1f1b"]),
    precision=st.sampled_from([None, "float32", "bfloat16", "float64"]),
    gradient_dtype=st.sampled_from([None, "float32", "bfloat16"]),
    offload=st.sampled_from(["none", "optimizer"]),
    shares=st.none() | st.lists(COUNT, min_size=1).map(tuple),
    replicate=st.lists(st.text("abc.*", min_size=1)).map(tuple),
    is_compiled=st.booleans(),
)


@given(REQUESTS)
def test_a_request_reads_back_from_its_shortest_text(request: Request) -> None:
    assert parse_request(format_request(request)) == request


def test_a_stage_recomputes_its_first_layers() -> None:
    asked = parse_request("pp=5,stages=full:3*2/full:1+selective/full:1+selective:2/none")
    three, some = PartialRecompute(full=3), PartialRecompute(full=1, selective=None)
    assert asked.stage_recompute == (three, three, some, PartialRecompute(full=1, selective=2), "none")
    assert parse_request("recompute=selective:4").recompute == PartialRecompute(selective=4)


def test_modules_are_named_for_selective_recomputation() -> None:
    asked = parse_request("recompute=full:1+selective,modules=*.mlp/*norm")
    assert asked.recompute_modules == ("*.mlp", "*norm")


def test_the_dtype_of_gradients_has_a_short_name() -> None:
    assert parse_request("grads=bf16,offload=optimizer") == Request(
        gradient_dtype="bfloat16", offload="optimizer"
    )


def test_a_shorthand_says_only_what_differs() -> None:
    text = "dp=2, tp=2,sp,zero=1,mb=4,recompute=selective,schedule=gpipe,dtype=bf16,shares=5/3,compile"
    assert parse_request(text) == Request(
        dp=2,
        tp=2,
        is_sequence_parallel=True,
        zero=1,
        microbatch=4,
        recompute="selective",
        schedule="gpipe",
        precision="bfloat16",
        shares=(5, 3),
        is_compiled=True,
    )
    assert parse_request("") == Request()


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("dp=2,pt=2", "'pt' is not a key of a plan", '--plan "tp=..."'),
        ("dp=2;tp=2", "dp=2;tp=2 must be a whole number of at least 1", '--plan "dp=2"'),
        ("grads=fp64", "grads=fp64 is not one of float32, bfloat16", '--plan "...,grads=float32"'),
        ("offload=optimiser", "is not one of none, optimizer", '--plan "...,offload=optimizer"'),
        ("dp=0", "dp=0 must be a whole number", '--plan "dp=2"'),
        ("tp", "tp= must be a whole number", '--plan "tp=2"'),
        ("dp=2,dp=4", "says dp twice", "keep one of them"),
        ("mb=2,microbatch=4", "says microbatch twice", "keep one of them"),
        ("zero=4", "zero=4 is not a level of ZeRO", '--plan "zero=3"'),
        ("sp=yes", "sp=yes must be 0 or 1", '--plan "...,sp=1"'),
        ("recompute=ful", "recompute=ful is not one of none, selective, full", "recompute=full"),
        ("recompute=full:0", "nor a number of layers such as full:3", "recompute=full"),
        (
            "stages=full:2*x/none",
            "or a number of layers such as full:3, for each stage",
            "stages=full:2*3/none",
        ),
        (
            "stages=full:2+full",
            "must be none, selective, full, or a number of layers",
            "stages=full:2*3/none",
        ),
        ("dtype=fp8", "dtype=fp8 is not one of float32, bfloat16, float16, float64", '--plan "...,dtype='),
        ("shares=5/x", "shares=5/x must be whole numbers", '--plan "dp=2,shares=5/3"'),
        ("modules=*.mlp/", "modules=\\*.mlp/ names no module", "recompute=selective,modules=*.mlp/*norm"),
        ("replicate=", "replicate= names no parameter", "replicate=lm_head"),
        ("four", "'four' is not a key of a plan", "--plan"),
    ],
)
def test_a_wrong_shorthand_is_refused_with_what_to_type(text: str, message: str, hint: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        parse_request(text)
    assert caught.value.hint is not None and hint in caught.value.hint


def test_a_plan_is_written_as_one_would_type_it() -> None:
    plan = Plan(
        mesh=Mesh(dp=2, pp=2),
        stages=tuple(StageRange(first=f"op_{n}", last=f"op_{n}") for n in range(4)),
        global_batch=8,
        sequence=None,
        shares=(4, 4),
        microbatch=2,
        zero=1,
        recompute="full",
        schedule="zb-v",
        precision="bfloat16",
        is_sequence_parallel=True,
    )
    assert shorthand(plan) == "dp=2,pp=2,sp,zero=1,mb=2,recompute=full,schedule=zb-v,v=2,dtype=bfloat16"
    assert shorthand(plan, default_precision="bfloat16").endswith("v=2")
    read = parse_request(shorthand(plan))
    assert (read.dp, read.stages_per_rank, read.precision) == (2, 2, "bfloat16")


def test_several_stages_a_rank_are_interleaved_where_no_schedule_is_named() -> None:
    assert parse_request("pp=2,v=3").schedule == "interleaved-1f1b"
    assert parse_request("pp=2,v=3,schedule=looped-bfs").schedule == "looped-bfs"
    assert parse_request("pp=2,v=1").schedule == parse_request("pp=2").schedule == "1f1b"
    assert named_decisions("pp=2,v=3") == {"pp", "stages_per_rank"}
