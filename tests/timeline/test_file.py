"""A timeline's file is read back exactly, and refused where it is none."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstage.errors import ProgramError
from shardstage.timeline import STREAMS, MemorySample, Span, Timeline
from shardstage.timeline.file import load_timeline, save_timeline, timeline_from_json, timeline_to_json

seconds = st.floats(0, 1e6, allow_nan=False)
spans = st.builds(Span, st.integers(0, 9), st.sampled_from(STREAMS), st.text(max_size=9), seconds, seconds)
samples = st.builds(
    MemorySample,
    st.integers(0, 9),
    seconds,
    st.dictionaries(st.text(max_size=5), st.integers(0, 1 << 50), max_size=4),
    st.text(max_size=5),
)
timelines = st.builds(
    Timeline,
    source=st.sampled_from(["predicted", "measured"]),
    spans=st.lists(spans, max_size=5).map(tuple),
    memory=st.lists(samples, max_size=5).map(tuple),
    alike=st.dictionaries(st.integers(0, 9), st.lists(st.integers(0, 99), max_size=3).map(tuple), max_size=3),
    labels=st.dictionaries(st.integers(0, 9), st.text(max_size=5), max_size=3),
)


@given(timelines)
def test_a_timeline_is_read_back_exactly(timeline: Timeline) -> None:
    assert timeline_from_json(timeline_to_json(timeline)) == timeline


@pytest.mark.parametrize("name", ["timeline.json", "timeline.json.gz"])
def test_a_file_is_read_back_compressed_or_not(tmp_path: Path, name: str) -> None:
    timeline = Timeline(source="measured", spans=(Span(0, "compute", "0F0", 0.0, 0.5),))
    save_timeline(timeline, tmp_path / name)
    assert load_timeline(tmp_path / name) == timeline
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_equal_timelines_make_equal_files(tmp_path: Path) -> None:
    timeline = Timeline(source="predicted", spans=())
    for name in ("a.json.gz", "b.json.gz"):
        save_timeline(timeline, tmp_path / name)
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no timeline"),
        ("[]", "it has no version"),
        ('{"version": 7}', "its version is 7, and this release reads 1"),
        ('{"version": 1, "source": "measured"}', "'spans'"),
        (
            '{"version": 1, "source": "measured", "spans": [[0, "gpu", "0F0", 0, 1]], "memory": []}',
            "'gpu' is no stream",
        ),
    ],
)
def test_what_is_no_timeline_is_refused(text: str, message: str) -> None:
    with pytest.raises(ProgramError, match=message) as error:
        timeline_from_json(text, where="x.json")
    assert "x.json" in error.value.message and error.value.hint is not None


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="cannot be read: No such file"):
        load_timeline(tmp_path / "missing.json.gz")
    (tmp_path / "broken.json.gz").write_bytes(gzip.compress(b"{}")[:-4])
    with pytest.raises(ProgramError, match="cannot be read"):
        load_timeline(tmp_path / "broken.json.gz")
