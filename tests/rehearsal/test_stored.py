"""A checkpoint of a plan keeps every element, and a gap or an overlap is refused."""

from __future__ import annotations

import pytest
from tests.runtime.dry_run_cases import Rehearsed, case, rehearsed

from shardstage.errors import ProgramError
from shardstage.layout import Replicate, Shard
from shardstage.rehearsal.stored import Stored, require_every_element, stored
from shardstage.runtime.dry_run import DryRun, dry_run
from shardstage.runtime.leaves import ParameterInfo, Piece
from shardstage.runtime.optimizer import OptimizerConfig

INFO = ParameterInfo(name="p_w", fqn="layer.weight", shape=(5, 4), local_shape=(5, 4), placement=Replicate())


def pieces(*ranges: tuple[int, int], info: ParameterInfo = INFO) -> list[Piece]:
    return [Piece(parameter=info, flat_start=start, flat_stop=stop, offset=0) for start, stop in ranges]


def test_one_copy_and_a_copy_on_every_rank_are_whole() -> None:
    require_every_element([pieces((0, 7)), pieces((7, 14)), pieces((14, 20))])
    require_every_element([pieces((0, 20))] * 3)
    require_every_element([pieces((0, 20)), pieces((20, 20)), pieces((20, 20))])  # fewer elements than ranks


@pytest.mark.parametrize(
    "kept",
    [
        [pieces((0, 7)), pieces((8, 20))],
        [pieces((0, 7)), pieces((6, 20))],
        [pieces((0, 7)), pieces((7, 19))],
        [pieces((0, 20)), pieces((0, 7))],
        [pieces((0, 0)), pieces((0, 0))],
    ],
    ids=["gap", "overlap", "short", "whole and a part", "nobody"],
)
def test_a_lost_or_doubled_element_is_refused(kept: list[list[Piece]]) -> None:
    with pytest.raises(ProgramError, match=r"of the 20 elements of layer\.weight: not each element once"):
        require_every_element(kept)


def test_tensor_parallel_ranks_must_hold_the_whole_dim() -> None:
    placement = Shard(dim=0, sections=((2, 2),))
    info = ParameterInfo(
        name="p_w", fqn="layer.weight", shape=(5, 4), local_shape=(2, 4), placement=placement
    )
    with pytest.raises(ProgramError, match=r"hold 4 of 5 rows of layer\.weight"):
        require_every_element([pieces((0, 8), info=info)])


def first_rank(given: Rehearsed) -> DryRun:
    """The dry run of rank 0, with what it would save."""
    return dry_run(
        given.graph,
        given.plan,
        given.source,
        rank=0,
        optimizer=OptimizerConfig(),
        program=given.program,
        graphs=given.graphs,
        inspect=stored,
    )


@pytest.mark.parametrize(
    "name",
    [
        "zero=2, experts",
        "zero=3, ties, several in flight",
        "zero=3, rows of narrow gradients",
        "ties over pp, tp=3",
    ],
)
def test_a_rank_plans_its_save_and_load_by_the_code_that_does_them(name: str) -> None:
    given = case(name)
    run = first_rank(given)
    found = run.inspection
    assert isinstance(found, Stored)
    kept = run.between_steps
    owned = kept["optimizer"] // 2  # one of AdamW's moments, of the master's size
    padding = 64 * given.plan.mesh.dp
    assert 3 * owned - padding <= found.num_bytes <= 3 * owned + padding
    assert found.num_boxes >= 3 * len(given.graph.parameters) / given.plan.mesh.dp / given.plan.mesh.pp
    assert found.num_bytes <= sum(found.whole_bytes.values())


def test_what_lies_in_the_host_s_memory_is_saved_as_if_it_lay_on_the_device() -> None:
    plan = "dp=2,pp=2,mb=1,zero=2"
    there, here = (first_rank(rehearsed("llama", text, 4, 6)) for text in (f"{plan},offload=optimizer", plan))
    assert "optimizer" in here.between_steps and "optimizer" not in there.between_steps
    assert there.inspection == here.inspection


def test_all_kinds_of_ranks_together_keep_the_whole_model() -> None:
    given = rehearsed("llama", "dp=3,pp=2,mb=1,zero=1", 6, 6)
    keys: dict[str, int] = {}
    for rank in (0, 3):
        run = dry_run(
            given.graph,
            given.plan,
            given.source,
            rank=rank,
            optimizer=OptimizerConfig(),
            program=given.program,
            graphs=given.graphs,
            inspect=stored,
        )
        assert isinstance(run.inspection, Stored)
        keys |= run.inspection.whole_bytes
    trained = {parameter.fqn for parameter in given.graph.parameters}
    assert trained <= set(keys)
    # a float32 master and AdamW's two moments
    assert sum(keys[fqn] for fqn in trained) == 3 * 4 * given.graph.num_parameters
