"""The report in the terminal: 80 columns, a grid that says who does what."""

from __future__ import annotations

from tests.report.timelines import ABOUT, timeline

from shardstage.report import report_text


def test_no_line_is_longer_than_a_terminal() -> None:
    text = report_text(ABOUT, [timeline(alike=300), timeline("measured")])
    assert max(map(len, text.splitlines())) <= 80


def test_the_grid_shows_warm_up_and_cool_down() -> None:
    rows = [line[12:] for line in report_text(ABOUT, [timeline()]).splitlines() if line.startswith("rank ")][
        :3
    ]
    assert rows[0].startswith("FFFF") and rows[2].startswith("····")
    assert rows[0].rstrip("·").endswith("s")
    assert all(set(row) <= set("FBs·") for row in rows)


def test_shares_add_up_and_the_peak_is_told() -> None:
    lines = report_text(ABOUT, [timeline()]).splitlines()
    row = next(line for line in lines if line.startswith("0 pp=0"))
    shares = [
        float(part) for part in row.replace(" %", "%").split() if part.endswith("%") for part in [part[:-1]]
    ]
    assert abs(sum(shares) - 100) < 0.2
    assert row.endswith("130 B")


def test_the_error_of_the_prediction_is_the_last_line() -> None:
    last = report_text(ABOUT, [timeline(), timeline("measured", slower=2)]).splitlines()[-1]
    assert last.startswith("predicted ") and last.rstrip("%").split()[-1].startswith("-4")
