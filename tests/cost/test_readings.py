"""What a model was read to is found again, exactly, and by nobody for whom it was not read."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import Experts, toy_graph

from shardstage.cost import Profiler, fold
from shardstage.cost import readings as module
from shardstage.cost.readings import Readings
from shardstage.graph import ModelGraph

PROFILE = import_module("shardstage.cost.profile")
GRAPHS = {
    "dense": toy_graph(num_layers=6),
    "experts": toy_graph(num_layers=4, experts=Experts(number=4, hidden=32)),
}


def profiler(graph: ModelGraph, readings: Readings, *, tp: int = 2, modules: str = "") -> Profiler:
    return Profiler(
        fold(graph, modules=tuple(filter(None, modules.split("/")))),
        round_machine(),
        tp=tp,
        sequence=graph.sequence,
        is_sequence_parallel=tp > 1,
        readings=readings,
    )


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("modules", ["", "*.up", "layers.*"])
def test_what_was_read_once_is_found_again_to_the_last_bit(
    name: str, tp: int, modules: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, path = GRAPHS[name], tmp_path / "captures" / "a.readings"
    readings = Readings(path)
    first = profiler(graph, readings, tp=tp, modules=modules)
    readings.keep()
    monkeypatch.setattr(PROFILE, "shard", None)
    second = profiler(graph, Readings(path), tp=tp, modules=modules)
    for microbatch in (1, 3):
        assert asdict(first.at(microbatch)) == asdict(second.at(microbatch))
    assert first._read == second._read
    assert [type(work) for work in second._read.works] == [type(work) for work in first._read.works]


def test_whole_experts_are_kept_beside_those_that_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, path = GRAPHS["experts"], tmp_path / "a.readings"
    readings = Readings(path)
    first = profiler(graph, readings).with_whole_experts().at(2)
    readings.keep()
    monkeypatch.setattr(PROFILE, "shard", None)
    cut = profiler(graph, Readings(path))
    assert asdict(cut.with_whole_experts().at(2)) == asdict(first) != asdict(cut.at(2))


def test_another_cut_another_fold_and_another_sequence_are_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, path = GRAPHS["dense"], tmp_path / "a.readings"
    readings = Readings(path)
    profiler(graph, readings)
    readings.keep()
    monkeypatch.setattr(PROFILE, "shard", None)
    known = Readings(path)
    profiler(graph, known)
    for other in (
        lambda: profiler(graph, known, tp=4),
        lambda: profiler(graph, known, modules="*.up"),
        lambda: profiler(graph.at(microbatch=graph.microbatch, sequence=8), known),
    ):
        with pytest.raises(TypeError, match="NoneType"):
            other()


def test_named_modules_are_kept_and_others_read_where_all_else_was_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, path = GRAPHS["dense"], tmp_path / "a.readings"
    readings = Readings(path)
    first, other = (profiler(graph, readings).naming((name,)).at(2) for name in ("*.up", "*.down"))
    profiler(graph, readings := Readings(path)).naming(("*.up",))
    readings.keep()
    known = Readings(path)
    assert asdict(profiler(graph, known).naming(("*.down",)).at(2)) == asdict(other) != asdict(first)
    monkeypatch.setattr(PROFILE, "shard", None)
    assert asdict(profiler(graph, Readings(path)).naming(("*.up",)).at(2)) == asdict(first)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"code": 1}', '{"code": "%s", "read": {"a": [1]}}'])
def test_a_damaged_file_is_as_good_as_none(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.readings"
    path.write_text(damage.replace("%s", module._own_code()), encoding="utf-8")
    readings = Readings(path)
    expected = asdict(profiler(GRAPHS["dense"], Readings()).at(2))
    assert asdict(profiler(GRAPHS["dense"], readings).at(2)) == expected
    readings.keep()
    assert json.loads(path.read_text(encoding="utf-8"))["code"] == module._own_code()


def test_what_other_code_has_read_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.readings"
    readings = Readings(path)
    profiler(GRAPHS["dense"], readings)
    monkeypatch.setattr(module, "_own_code", lambda: "another release")
    readings.keep()
    monkeypatch.undo()
    assert not Readings(path)._known


def test_nothing_is_written_without_a_path_or_where_nothing_is_new(tmp_path: Path) -> None:
    profiler(GRAPHS["dense"], readings := Readings())
    readings.keep()
    path = tmp_path / "a.readings"
    profiler(GRAPHS["dense"], readings := Readings(path))
    readings.keep()
    path.unlink()
    readings.keep()
    assert not path.exists()


def test_a_folder_that_cannot_be_made_costs_time_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    readings = Readings(tmp_path / "file" / "a.readings")
    profiler(GRAPHS["dense"], readings)
    readings.keep()
