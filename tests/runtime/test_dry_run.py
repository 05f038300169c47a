"""The engine of one rank on tensors without memory: it does what the Program says, and holds what a real one would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from tests.runtime.dry_run_cases import CASES, case, rehearsed

from shardstage.compat import chunks_on_demand
from shardstage.errors import ProgramError
from shardstage.program import Collective, Instruction, Program, TensorType
from shardstage.runtime import dry_run as module
from shardstage.runtime.dry_run import DryRun
from shardstage.runtime.dry_run_compare import compare_with_program, distinct_ranks
from shardstage.runtime.dry_run_fold import executed_microbatches, only
from shardstage.runtime.fake_world import fake_world
from shardstage.runtime.groups import build_groups


@pytest.mark.parametrize("name", CASES)
def test_the_engine_does_what_the_program_says(name: str) -> None:
    rehearsal = case(name)
    ranks = distinct_ranks(rehearsal.program)
    for rank in {ranks[0], ranks[-1]}:
        run = rehearsal.run(rank)
        assert compare_with_program(run, rehearsal.program) is None
        assert len(run.acts) == len(only(run.row, run.executed))


def test_microbatches_that_are_not_executed_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal = rehearsed("gpt2", "pp=3,mb=1", 3, 12)
    folded = rehearsal.run(1)
    assert (len(folded.executed), folded.num_microbatches) == (4, 12)
    monkeypatch.setattr(module, "executed_microbatches", lambda _row, sizes: frozenset(range(len(sizes))))
    whole = rehearsal.run(1)
    assert len(whole.executed) == 12
    assert [act.instruction for act in whole.acts] == list(folded.row)
    assert [m.held for m in whole.moments] == [m.held for m in folded.moments]
    assert whole.peak == folded.peak
    assert compare_with_program(folded, rehearsal.program) is None


def test_acts_that_should_be_alike_and_are_not_make_every_microbatch_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rehearsal = rehearsed("gpt2", "pp=3,mb=1", 3, 8)
    found = rehearsal.run(2)
    assert len(found.executed) == 4
    original = module.Twins.of

    def suspicious(*arguments: object) -> module.Twins:
        twins = original(*arguments)  # type: ignore[arg-type]  # as it was called
        return replace(twins, unlike=(found.acts[0], found.acts[1]))

    monkeypatch.setattr(module.Twins, "of", staticmethod(suspicious))
    assert len(rehearsal.run(2).executed) == 8


def test_each_first_last_and_two_between_of_every_size_are_executed() -> None:
    row = tuple(Instruction(0, kind, m) for kind in ("F", "B") for m in range(9))  # type: ignore[arg-type]
    assert executed_microbatches(row, [2] * 9) == {0, 1, 2, 8}
    assert executed_microbatches(row, [2] * 4 + [1] * 5) == {0, 1, 2, 4, 5, 8}
    assert executed_microbatches(row[:2], [1, 1]) == {0, 1}


def test_memory_begins_and_ends_with_what_is_kept_between_steps() -> None:
    rehearsal = case("three axes in bfloat16")
    run = rehearsal.run(0)
    kept = run.between_steps
    assert kept["optimizer"] >= 2 * kept["master"] - 64
    after = {name: run.moments[-1].held.get(name, 0) for name in ("parameters", "master", "optimizer")}
    assert after == {name: kept[name] for name in after}
    assert run.moments[-1].held.get("activations", 0) < run.peak.peak["activations"]


def test_a_pipeline_s_first_rank_holds_more_activations_than_its_last() -> None:
    rehearsal = rehearsed("llama", "pp=4,mb=1", 4, 16)
    first, last = rehearsal.run(0), rehearsal.run(3)
    layers = [max(m.held.get("activations", 0) for m in run.moments) for run in (first, last)]
    assert layers[0] > 2 * layers[1]


def test_recompute_lowers_the_peak_and_zero_what_is_kept() -> None:
    plain = rehearsed("llama", "dp=4,mb=1", 4, 8).run(0)
    thrifty = rehearsed("llama", "dp=4,mb=1,zero=3,recompute=full", 4, 8).run(0)
    assert thrifty.peak.peak["activations"] < plain.peak.peak["activations"] / 2
    assert thrifty.between_steps["optimizer"] < plain.between_steps["optimizer"] / 3.5
    assert plain.between_steps["optimizer"] == pytest.approx(2 * plain.between_steps["parameters"], rel=0.01)


def test_every_layer_more_that_recomputes_lowers_the_peak() -> None:
    texts = ("none", "full:1", "full:2", "full:3", "full")
    runs = [rehearsed("llama", f"dp=1,mb=8,recompute={text}", 1, 8).run(0) for text in texts]
    held = [run.peak.peak["activations"] for run in runs]
    assert held[0] > held[1] > held[2] >= held[3] >= held[4]


def test_the_largest_tensors_at_the_peak_are_named() -> None:
    run = rehearsed("llama", "dp=1,mb=8", 1, 8).run(0)
    assert run.largest_at_peak
    sizes = [held.num_bytes for held in run.largest_at_peak]
    assert sizes == sorted(sizes, reverse=True)
    assert any(str(held).startswith("optimizer: float32[") for held in run.largest_at_peak)
    assert sum(sizes) <= run.peak.peak_bytes


def test_nothing_of_a_whole_model_is_allocated() -> None:
    """2**40 samples' worth of activations would not fit anywhere."""
    rehearsal = rehearsed("llama", "dp=2,mb=1048576,zero=1", 2, 2**21)
    assert rehearsal.run(0).peak.peak_bytes > 2**33


@pytest.fixture(scope="module")
def run_of_rank_0() -> tuple[DryRun, Program]:
    rehearsal = case("uneven shares, pp=3")
    return rehearsal.run(0), rehearsal.program


def corruptions(program: Program) -> Iterator[tuple[str, Program]]:
    """Programs that say something else than what the engine did on rank 0."""
    row = program.row_of(0)
    update = next(i for i in row.instructions if i.kind == "STEP")
    reduction = next(i for i in row.instructions if i.kind == "REDUCE_GRAD")
    send = next(i for i in row.instructions if i.kind == "SEND_F")
    receive = next(i for i in row.instructions if i.kind == "RECV_B")
    calls, messages = program.calls, program.messages
    more = (*calls[update.calls], Collective("dp", "all_reduce", "float32", 7))
    yield (
        "STEP: the Program says dp.all_reduce float32\\[7\\] as number .*, the engine did nothing more",
        replace(program, calls={**calls, update.calls: more}),
    )
    fewer = calls[reduction.calls][1:]
    yield "REDUCE_GRAD: the Program says", replace(program, calls={**calls, reduction.calls: fewer})
    other = tuple(TensorType(t.value, "bfloat16", t.shape) for t in messages[send.message])
    yield (
        "0SEND_F0>1: the Program says bfloat16.* with rank 2.* the engine did float32",
        replace(program, messages={**messages, send.message: other}),
    )
    shorter = tuple(TensorType(t.value, t.dtype, t.shape[1:]) for t in messages[receive.message])
    yield "the Program says float32", replace(program, messages={**messages, receive.message: shorter})


def test_the_first_difference_is_named(run_of_rank_0: tuple[DryRun, Program]) -> None:
    run, program = run_of_rank_0
    assert compare_with_program(run, program) is None
    for expected, corrupted in corruptions(program):
        found = compare_with_program(run, corrupted)
        assert found is not None
        with pytest.raises(ProgramError, match=expected):
            raise ProgramError(str(found))
        assert str(found).startswith("rank 0, ")


def test_distinct_ranks_are_one_of_each_row_and_stand_for_all() -> None:
    program = case("uneven shares, pp=3").program
    ranks = distinct_ranks(program)
    assert len(ranks) == len(program.rows)
    assert {program.row_of(rank).instructions for rank in range(6)} == {
        program.row_of(rank).instructions for rank in ranks
    }


def test_a_fake_world_has_only_the_groups_of_its_rank_and_leaves_nothing() -> None:
    program = case("ties over pp, tp=3").program
    with fake_world(4, 6):
        groups = build_groups(program.mesh, 4, {(0, 1)}, only_own=True)
        assert groups.tp_group is not None and dist.get_process_group_ranks(groups.tp_group) == [3, 4, 5]
        assert dist.get_process_group_ranks(groups.tie_groups[0, 1]) == [1, 4]
        tensor = torch.ones(3)
        dist.all_reduce(tensor, group=groups.tp_group)
        with pytest.raises(ProgramError, match="this is rank 4 of a real one"), fake_world(0, 2):
            pass
    assert not dist.is_initialized()


def test_a_parameter_is_not_cut_for_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 cuts it into a tensor for each rank and takes one: half of the minutes of a rehearsal on 512 ranks, and all on 16,384."""
    rehearsal = rehearsed("llama", "dp=5,mb=1,zero=3", 5, 5)
    monkeypatch.setattr("torch.chunk", lambda *_, **__: pytest.fail("cut for every rank"))
    for rank in (0, 4):
        assert compare_with_program(rehearsal.run(rank), rehearsal.program) is None


@pytest.mark.parametrize("dim", [0, 1])
def test_chunks_on_demand_are_those_of_torch(dim: int) -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    for size in range(9):
        tensor = torch.arange(3 * size).view((size, 3) if dim == 0 else (3, size))
        for number in range(1, 12):
            eager = _fsdp_param._chunk_with_empty(tensor, number, dim=dim)
            with chunks_on_demand():
                lazy = _fsdp_param._chunk_with_empty(tensor, number, dim=dim)
            assert len(lazy) == len(eager) == number
            assert all(torch.equal(one, other) for one, other in zip(lazy, eager, strict=True))
            assert lazy[0].size() == eager[0].size()


def test_a_torch_that_cuts_parameters_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    monkeypatch.delattr(_fsdp_param, "_chunk_with_empty")
    with chunks_on_demand():
        assert not hasattr(_fsdp_param, "_chunk_with_empty")
