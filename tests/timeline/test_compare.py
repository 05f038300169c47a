"""Predicted against measured: medians by kind and stage, and how ranks spend the step."""

from __future__ import annotations

import pytest

from shardstage.timeline import Span, Timeline
from shardstage.timeline.compare import compare_timelines, kind_of, rank_use


def spans(*rows: tuple[int, str, str, float, float]) -> tuple[Span, ...]:
    return tuple(Span(rank, stream, name, start, end) for rank, stream, name, start, end in rows)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0F3", ("F", 0)),
        ("12SEND_F3>13", ("SEND_F", 12)),
        ("STEP", ("STEP", None)),
        ("tp.all_reduce", ("tp.all_reduce", None)),
    ],
)
def test_a_name_tells_kind_and_stage(name: str, expected: tuple[str, int | None]) -> None:
    assert kind_of(name) == expected


def test_a_rank_computes_talks_or_idles() -> None:
    timeline = Timeline(
        source="measured",
        spans=spans(
            (0, "compute", "0F0", 1, 3),
            (0, "pp", "0SEND_F0>1", 2, 5),  # a second under compute, two exposed
            (0, "dp", "REDUCE_GRAD", 4, 6),  # one of them together with the message
            (0, "compute", "STEP", 6, 7),
            (1, "compute", "1F0", 0, 10),
        ),
    )
    use = rank_use(timeline, 0)
    assert (use.compute_s, use.update_s, use.exposed_s, use.idle_s) == (2, 1, 3, 4)
    assert use.bubble_ratio == pytest.approx(0.7)
    assert rank_use(timeline, 1).bubble_ratio == 0


def test_medians_are_compared_where_both_have_them() -> None:
    predicted = Timeline(
        source="predicted", spans=spans((0, "compute", "0F0", 0, 2), (0, "compute", "0B0", 2, 6))
    )
    measured = Timeline(
        source="measured",
        spans=spans(
            (0, "compute", "0F0", 0, 1),
            (0, "compute", "0F1", 1, 5),
            (0, "compute", "0F2", 5, 9),
            (0, "compute", "STEP", 9, 10),
        ),
    )
    found = {(act.kind, act.stage): act for act in compare_timelines(predicted, measured).acts}
    assert found["F", 0].error_ratio == pytest.approx(-0.5)
    assert found["B", 0].measured_s is None and found["B", 0].error_ratio is None
    assert found["STEP", None].predicted_s is None
    assert compare_timelines(predicted, measured).error_ratio == pytest.approx(-0.4)


def test_a_rank_is_compared_with_the_one_that_stands_for_it() -> None:
    predicted = Timeline(source="predicted", spans=spans((0, "compute", "0F0", 0, 2)), alike={0: (0, 1)})
    measured = Timeline(
        source="measured", spans=spans((0, "compute", "0F0", 0, 2), (1, "compute", "0F0", 0, 3))
    )
    pairs = compare_timelines(predicted, measured).ranks
    assert [(p.rank, m.rank) for p, m in pairs] == [(0, 0), (0, 1)]
