"""Captures are made once, found again without torch, and made anew whenever something that they depend on has changed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from tests.cost.toy import toy_graph

from shardstage.graph import ModelGraph
from shardstage.graph import cache as module
from shardstage.graph.cache import Captured, cache_folder, cached, capture_key, from_text, to_text
from shardstage.graph.unfold import Repeat, ShortGraph

_CAPTURED = Captured(
    short=ShortGraph(
        graph=toy_graph(num_layers=3, width=8, hidden=16),
        repeats=(Repeat(path="layers", first=1, period=1, copies=4),),
    ),
    max_sequence=64,
)


class Capturing:
    """Counts how often a capture is made."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Captured:
        self.times += 1
        return _CAPTURED


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHARDSTAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_capture_is_made_once_and_read_back_equal(folder: Path) -> None:
    capture = Capturing()
    first, second = (cached("a-model", sequence=32, dtype="float32", capture=capture) for _ in range(2))
    assert capture.times == 1
    assert first == second == (_CAPTURED, ())
    (path,) = (folder / "captures").iterdir()
    assert path.suffix == ".graph"


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b'{"digest": 1}\n{}'])
def test_a_damaged_file_is_made_again_with_a_note(folder: Path, damage: bytes) -> None:
    capture = Capturing()
    cached("a-model", sequence=32, dtype="float32", capture=capture)
    (path,) = (folder / "captures").iterdir()
    for content in (damage, path.read_bytes()[:-9]):
        path.write_bytes(content)
        found, (note,) = cached("a-model", sequence=32, dtype="float32", capture=capture)
        assert found == _CAPTURED
        assert "cannot be read, and is made again" in note and "hint" not in note
        assert cached("a-model", sequence=32, dtype="float32", capture=capture) == (_CAPTURED, ())
    assert capture.times == 3


def test_a_folder_that_cannot_be_written_costs_the_cache_only(folder: Path) -> None:
    folder.write_text("a file", encoding="utf-8")
    found, notes = cached("a-model", sequence=32, dtype="float32", capture=Capturing())
    assert found == _CAPTURED
    assert "not kept for the next time" in notes[-1]


def test_the_cache_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("SHARDSTAGE_CACHE", "off")
    capture = Capturing()
    for _ in range(2):
        cached("a-model", sequence=32, dtype="float32", capture=capture)
    assert capture.times == 2
    assert not folder.exists()


def test_the_folder_is_the_user_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SHARDSTAGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "shardstage"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "shardstage"


def test_the_key_follows_all_that_a_capture_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"layers": 2}), encoding="utf-8")
    keys = [
        capture_key(str(config), sequence=32, dtype="float32"),
        capture_key(str(config), sequence=64, dtype="float32"),
        capture_key(str(config), sequence=32, dtype="bfloat16"),
        capture_key("llama-tiny", sequence=32, dtype="float32"),
        capture_key("gpt2-tiny", sequence=32, dtype="float32"),
    ]
    assert capture_key(str(config), sequence=32, dtype="float32") == keys[0]
    config.write_text(json.dumps({"layers": 3}), encoding="utf-8")
    keys.append(capture_key(str(config), sequence=32, dtype="float32"))
    monkeypatch.setattr(module, "_versions", module._versions.__wrapped__)  # which a process asks for once
    monkeypatch.setattr(module, "_version", lambda package: f"a new {package}")
    keys.append(capture_key(str(config), sequence=32, dtype="float32"))
    monkeypatch.setattr(module, "code_digest", lambda *_: "new code")
    keys.append(capture_key(str(config), sequence=32, dtype="float32"))
    assert None not in keys
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("spec", ["package.models:make", "path/to/models.py:make"])
def test_a_factory_of_the_user_s_is_never_cached(spec: str, folder: Path) -> None:
    capture = Capturing()
    for _ in range(2):
        cached(spec, sequence=32, dtype="float32", capture=capture)
    assert capture.times == 2
    assert not folder.exists()


def test_the_text_of_a_capture_reads_back() -> None:
    assert from_text(to_text(_CAPTURED)) == _CAPTURED


def test_a_capture_that_is_read_back_knows_its_blocks_and_its_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, whole = from_text(to_text(_CAPTURED)), _CAPTURED.short.unfold()
    expected = whole.blocks, whole.fingerprint
    for name in ("blocks.find_blocks", "file.fingerprint"):
        monkeypatch.setattr(f"shardstage.graph.{name}", None)
    graph = read.unfold()
    assert graph == whole
    assert (graph.blocks, graph.fingerprint) == expected
    with pytest.raises(TypeError):
        graph.at(microbatch=2, sequence=8).blocks  # noqa: B018 another graph, which must find its own


def test_a_cached_model_is_known_without_torch(folder: Path, tmp_path: Path) -> None:
    graph: ModelGraph = _CAPTURED.short.graph
    plain = Captured(short=ShortGraph(graph=graph), max_sequence=64)
    cached("a-model", sequence=32, dtype="float32", capture=lambda: plain)
    script = (
        "import sys\n"
        "from shardstage.cli.choosing import known_model\n"
        "known = known_model('a-model', 32, 'float32')\n"
        "print(len(known.graph.ops), known.max_sequence, 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert run.stdout.split() == [str(len(graph.ops)), "64", "False", "False"]


@pytest.mark.parametrize("package", ["torch", "transformers", "numpy"])
def test_versions_are_those_of_the_packages_metadata(package: str) -> None:
    assert module._version(package) == version(package)


def test_a_package_that_is_not_there_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._version("no-such-package") == ""
    monkeypatch.setattr(sys, "path", [])
    assert module._version("torch") == ""
