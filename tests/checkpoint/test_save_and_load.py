"""A checkpoint gives back the same bits, whatever the cut, and nothing that was saved is ever lost."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.checkpoint.states import TP_3, WHOLE, assert_filled, blank, entries
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

from shardstage.checkpoint import StateEntry, latest, load, save
from shardstage.errors import CheckpointError
from shardstage.layout import Replicate, Shard


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are written to /dev/full, which answers every write as a full disk does."""
    usual = FileSystem.create_stream

    @contextmanager
    def create_stream(self: FileSystem, path: Path, mode: str) -> Iterator[object]:
        with usual(self, Path("/dev/full") if path.suffix == ".distcp" else path, mode) as stream:
            yield stream

    monkeypatch.setattr(FileSystem, "create_stream", create_stream)


def whole_state() -> list[StateEntry]:
    return entries(WHOLE, {}, 0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_round_trip_gives_the_same_bits_and_the_extra(tmp_path: Path) -> None:
    extra = {"position": {"epoch": 1, "sample": 2**40}, "plan": 'mesh = "dp=2"\n', "rates": [0.1, 1e-300]}
    save(tmp_path, 20, whole_state(), extra)
    loaded = blank(whole_state())
    assert load(tmp_path, "latest", loaded) == extra
    assert_filled(loaded, WHOLE)


def test_a_tensor_of_several_dims_is_filled_in_place(tmp_path: Path) -> None:
    save(tmp_path, 1, whole_state(), {})
    target = torch.zeros(15, 4)
    load(
        tmp_path,
        1,
        [
            StateEntry(
                key=key, tensor=tensor, global_shape=tuple(tensor.shape), placement=Replicate(), tp_rank=0
            )
            for key, tensor in {**WHOLE, "model.qkv.weight": target}.items()
        ],
    )
    assert torch.equal(target, WHOLE["model.qkv.weight"])


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, int]) -> Shard:
    """One dim cut among up to three ranks, as one section or two, empty parts included."""
    dim = draw(st.integers(0, 1))
    num_ranks = draw(st.integers(1, 3))
    middle = draw(st.integers(0, shape[dim]))
    sections = []
    for length in (middle, shape[dim] - middle):
        ends = sorted(draw(st.lists(st.integers(0, length), min_size=num_ranks - 1, max_size=num_ranks - 1)))
        sections.append(tuple(stop - start for start, stop in pairwise([0, *ends, length])))
    return Shard(dim=dim, sections=tuple(sections))


def all_ranks(tensors: Mapping[str, Tensor], placement: Shard, num_dp: int) -> list[StateEntry]:
    return [
        entry
        for tp_rank in range(placement.num_ranks)
        for dp in range(num_dp)
        for entry in entries(tensors, {"model.w": placement}, tp_rank, dp=dp, num_dp=num_dp)
    ]


@settings(max_examples=25, deadline=None)
@given(saved=cuts((7, 5)), loaded=cuts((7, 5)), num_dp=st.integers(1, 3), later_num_dp=st.integers(1, 3))
def test_any_cut_can_be_loaded_into_any_other(
    saved: Shard, loaded: Shard, num_dp: int, later_num_dp: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    tensors = {"model.w": torch.arange(35.0).reshape(7, 5)}
    save(folder, 0, all_ranks(tensors, saved, num_dp), {})
    targets = blank(all_ranks(tensors, loaded, later_num_dp))
    load(folder, 0, targets)
    assert_filled(targets, tensors)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, whole_state(), {"step": step}, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert latest(tmp_path) == 3
    save(tmp_path, 4, whole_state(), {}, keep=1)
    assert names(tmp_path) == ["step-00000004"]


def test_a_step_saved_again_after_going_back_replaces_the_old_and_is_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, whole_state(), {"run": 1}, keep=3)
    save(tmp_path, 20, whole_state(), {"run": 2}, keep=1)
    assert names(tmp_path) == ["step-00000020"]
    assert load(tmp_path, 20, blank(whole_state())) == {"run": 2}


def test_what_a_crash_left_is_invisible_and_removed_by_the_next_save(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    save(tmp_path, 1, whole_state(), {"run": 1})
    (tmp_path / "step-00000002.partial").mkdir()
    (tmp_path / "step-00000002.partial" / "__0_0.distcp").write_bytes(b"half")
    assert latest(tmp_path) == 1
    save(tmp_path, 3, whole_state(), {})
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_crash_while_a_step_is_replaced_loses_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1, whole_state(), {"run": 1})
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000001.replaced")
    assert latest(tmp_path) == 1
    assert load(tmp_path, "latest", blank(whole_state())) == {"run": 1}
    save(tmp_path, 2, whole_state(), {})
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("numel", [10, 100_000], ids=["found_on_closing", "found_within_a_tensor"])
def test_a_full_disk_is_reported_and_the_job_may_go_on(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, numel: int
) -> None:
    """torch.save answers a disk that fills within a tensor with "unexpected pos 704 vs 598"."""
    save(tmp_path, 1, whole_state(), {"run": 1})
    request.getfixturevalue("full_disk")
    with pytest.raises(
        CheckpointError, match=r"step 2 cannot be written to .*No space left on device"
    ) as caught:
        save(tmp_path, 2, entries({"model.w": torch.zeros(numel)}, {}, 0), {})
    assert caught.value.hint is not None and "free some space" in caught.value.hint
    assert names(tmp_path) == ["step-00000001"]
    monkeypatch.undo()
    save(tmp_path, 3, whole_state(), {})
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_full_disk_at_the_last_moment_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, 1, whole_state(), {})
    monkeypatch.setattr(json, "dump", no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, 2, whole_state(), {})
    assert names(tmp_path) == ["step-00000001"]


def test_an_interrupt_is_not_mistaken_for_a_bad_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FileSystem, "create_stream", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, whole_state(), {})
    assert latest(tmp_path) is None


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint") as caught:
        load(tmp_path / "nowhere", "latest", whole_state())
    assert caught.value.hint == "start without resuming"


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(tmp_path: Path) -> None:
    save(tmp_path, 5, whole_state(), {})
    with pytest.raises(CheckpointError, match="no checkpoint of step 4") as caught:
        load(tmp_path, 4, whole_state())
    assert caught.value.hint == "one of 5"


def test_another_model_is_refused_by_name_and_by_shape(tmp_path: Path) -> None:
    save(tmp_path, 1, whole_state(), {})
    larger = entries({**WHOLE, "model.layers.9.weight": torch.zeros(2)}, {}, 0)
    with pytest.raises(CheckpointError, match=r"of another model: it lacks 1 tensors: model.layers.9.weight"):
        load(tmp_path, 1, larger)
    smaller = [entry for entry in whole_state() if entry.key != "model.up.weight"]
    with pytest.raises(CheckpointError, match=r"of another model: it has also 1 tensors: model.up.weight"):
        load(tmp_path, 1, smaller)
    wider = entries({**WHOLE, "model.norm.weight": torch.zeros(6)}, {}, 0)
    with pytest.raises(CheckpointError, match=r"model.norm.weight has shape \(5,\), the model wants \(6,\)"):
        load(tmp_path, 1, wider)


def test_weights_may_be_loaded_without_the_optimizer(tmp_path: Path) -> None:
    save(tmp_path, 1, whole_state(), {})
    weights = {key: tensor for key, tensor in WHOLE.items() if key.startswith("model.")}
    loaded = blank(entries(weights, TP_3, 1))
    load(tmp_path, 1, loaded)
    assert_filled(loaded, weights)


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "shardstage.json"])
def test_a_damaged_file_is_an_error_that_names_the_checkpoint(tmp_path: Path, file: str) -> None:
    save(tmp_path, 1, whole_state(), {})
    (tmp_path / "step-00000001" / file).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="step-00000001"):
        load(tmp_path, 1, blank(whole_state()))


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, whole_state(), {})
    (tmp_path / "step-00000001" / "shardstage.json").write_text('{"format": 99, "extra": {}}')
    with pytest.raises(CheckpointError, match="has format 99") as caught:
        load(tmp_path, 1, blank(whole_state()))
    assert caught.value.hint == "pip install --upgrade shardstage"


def test_an_entry_whose_memory_is_not_its_range_is_refused(tmp_path: Path) -> None:
    entry = StateEntry(
        key="model.w",
        tensor=torch.zeros(3),
        global_shape=(4,),
        placement=Replicate(),
        tp_rank=0,
        flat_range=(0, 4),
    )
    with pytest.raises(CheckpointError, match="holds 3 elements, its range 4"):
        save(tmp_path, 1, [entry], {})
