"""The plan file: what is written is what is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstage.errors import PlanError
from shardstage.graph.recompute import PartialRecompute
from shardstage.layout import Mesh
from shardstage.plan import Plan, StageRange, load_plan, plan_from_toml, plan_to_toml, save_plan

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
COUNT = st.integers(1, 2**40)
RECOMPUTE = st.sampled_from(["none", "selective", "full"]) | st.builds(
    PartialRecompute, full=COUNT, selective=st.none() | st.integers(0, 9)
)

PLANS = st.builds(
    Plan,
    mesh=st.builds(Mesh, pp=COUNT, dp=COUNT, tp=COUNT),
    stages=st.lists(st.builds(StageRange, first=TEXT, last=TEXT)).map(tuple),
    global_batch=COUNT,
    sequence=st.none() | COUNT,
    microbatch=COUNT,
    shares=st.lists(st.integers(0, 2**40)).map(tuple),
    zero=st.sampled_from([0, 1, 2, 3]),
    recompute=RECOMPUTE,
    stage_recompute=st.lists(RECOMPUTE).map(tuple),
    recompute_modules=st.lists(TEXT).map(tuple),
    schedule=st.sampled_from(["gpipe", "1f1b"]),
    precision=st.sampled_from(["float32", "bfloat16", "float64"]),
    gradient_dtype=st.sampled_from([None, "float32", "bfloat16"]),
    offload=st.sampled_from(["none", "optimizer"]),
    ep=COUNT,
    etp=st.sampled_from([None, 1]),
    is_sequence_parallel=st.booleans(),
    is_compiled=st.booleans(),
    replicate=st.lists(TEXT).map(tuple),
    bucket_bytes=COUNT,
    graph_fingerprint=st.just("") | TEXT,
)

PLAN = Plan(
    mesh=Mesh(pp=2, dp=2, tp=1),
    stages=(StageRange(first="embedding", last="add_3"), StageRange(first="linear_7", last="loss")),
    global_batch=16,
    sequence=256,
    microbatch=2,
    shares=(10, 6),
    replicate=("lm_head.*",),
)


@given(PLANS)
def test_a_plan_file_reads_back_as_the_equal_plan(plan: Plan) -> None:
    assert plan_from_toml(plan_to_toml(plan)) == plan


def test_a_plan_file_reads_well() -> None:
    assert plan_to_toml(PLAN) == (
        'version = 1\ngraph = ""\n\n'
        "[mesh]\ndp = 2\ntp = 1\npp = 2\n\n"
        "[batch]\nglobal_batch = 16\nmicrobatch = 2\nsequence = 256\nshares = [10, 6]\n\n"
        '[memory]\nzero = 0\nrecompute = "none"\nprecision = "float32"\nbucket_bytes = 26214400\n\n'
        '[tensor]\nsequence_parallel = false\nreplicate = ["lm_head.*"]\n\n'
        "[compute]\ncompile = false\n\n"
        '[pipeline]\nschedule = "1f1b"\n\n'
        '[[pipeline.stage]]\nfirst = "embedding"\nlast = "add_3"\n\n'
        '[[pipeline.stage]]\nfirst = "linear_7"\nlast = "loss"\n'
    )


def test_savers_of_last_resort_stand_beside_the_others_where_they_are_used() -> None:
    text = plan_to_toml(replace(PLAN, precision="bfloat16", gradient_dtype="bfloat16", offload="optimizer"))
    assert 'precision = "bfloat16"\ngradients = "bfloat16"\noffload = "optimizer"\nbucket_bytes' in text
    with pytest.raises(PlanError, match="offload must be one of"):
        plan_from_toml(text.replace('"optimizer"', '"all"'))


def test_layers_that_recompute_are_counted_in_words() -> None:
    partial = (PartialRecompute(full=3, selective=None), PartialRecompute(selective=2))
    text = plan_to_toml(replace(PLAN, stage_recompute=partial))
    assert 'recompute = "none"\nstage_recompute = ["full:3+selective", "selective:2"]\n' in text
    assert plan_from_toml(text).stage_recompute == partial


def test_named_modules_stand_with_what_recomputes() -> None:
    text = plan_to_toml(replace(PLAN, recompute="selective", recompute_modules=("*.mlp", "*norm")))
    assert 'recompute = "selective"\nrecompute_modules = ["*.mlp", "*norm"]' in text
    assert "recompute_modules" not in plan_to_toml(PLAN)


def test_a_saved_plan_loads(tmp_path: Path) -> None:
    save_plan(PLAN, tmp_path / "plan.toml")
    assert load_plan(tmp_path / "plan.toml") == PLAN


def test_what_has_a_default_may_be_left_out() -> None:
    text = plan_to_toml(PLAN)
    start, stop = text.index("[memory]"), text.index("[pipeline]")
    assert plan_from_toml(text[:start] + text[stop:].replace('schedule = "1f1b"\n', "")) == Plan(
        mesh=PLAN.mesh,
        stages=PLAN.stages,
        global_batch=16,
        sequence=256,
        microbatch=2,
        shares=(10, 6),
    )


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("zero = 0", "zreo = 0", r"plan.toml \[memory\]: unknown key 'zreo'", "zero = ..."),
        ("[memory]", "[memroy]", "plan.toml: unknown key 'memroy'", "memory = ..."),
        ("first =", "frist =", "stage 0: unknown key 'frist'", "first = ..."),
        ("zero = 0", "zero = 4", r"zero must be one of 0, 1, 2, 3, not 4", "zero = 0"),
        ("zero = 0", "zero = false", "zero must be one of 0, 1, 2, 3, not False", "zero = 0"),
        (
            '"1f1b"',
            '"1b1f"',
            'schedule must be one of "gpipe", "1f1b", .*, not \'1b1f\'',
            'schedule = "1f1b"',
        ),
        ("dp = 2", "dp = 0", "dp must be a whole number of at least 1, not 0", "dp = 2"),
        ("dp = 2\n", "", r"\[mesh\]: dp is missing", "dp = 2"),
        ("shares = [10, 6]", "shares = 16", "shares must be a list of whole numbers", "shares = [8, 8]"),
        ("compile = false", "compile = 0", "compile must be true or false, not 0", "compile = true"),
        ('["lm_head.*"]', '"lm_head.*"', "replicate must be a list of texts", 'replicate = ["lm_head.*"]'),
        ('graph = ""', "graph = 7", "graph must be text, not 7", 'graph = "..."'),
        ("[memory]", "[[memory]]", "memory must be a table", "[memory]"),
        ("version = 1", "version = 2", "version 2 of the plan file is unknown", "shardstage plan --out"),
        ("[mesh]", "[mesh", "plan.toml is not TOML", "shardstage plan --out"),
        (
            'recompute = "none"',
            'recompute = "full:0"',
            "recompute has 'full:0', which is not one of none",
            'recompute = "full:3"',
        ),
        (
            'recompute = "none"',
            'stage_recompute = ["full", "all"]',
            "stage_recompute has 'all', .* nor a number of layers such as 'full:3'",
            'stage_recompute = ["full:3", "none"]',
        ),
    ],
)
def test_a_wrong_file_is_refused_by_place_reason_and_hint(
    old: str, new: str, message: str, hint: str
) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        plan_from_toml(plan_to_toml(PLAN).replace(old, new, 1))
    assert caught.value.hint is not None and hint in caught.value.hint


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"missing\.toml cannot be read: No such file"):
        load_plan(tmp_path / "missing.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"binary\.toml cannot be read: it is not UTF-8 text"):
        load_plan(tmp_path / "binary.toml")
    with pytest.raises(PlanError, match="cannot be written"):
        save_plan(PLAN, tmp_path / "no" / "folder.toml")
