"""The page of ``shardstage plan --out page.html``: what the terminal says, the front as a picture, the mesh on the topology."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Final

from shardstage.cli.answer import Answer, held, held_text, share_text
from shardstage.cli.choosing import Chosen, setting
from shardstage.cli.told import PLAN, Fact, Rows
from shardstage.units import format_s

if TYPE_CHECKING:
    from shardstage.cluster import Cluster
    from shardstage.layout.mesh import Axis
    from shardstage.planner import Point

__all__ = ["answer_page"]

STYLE: Final = """
dl b { font-size: 17px; } p { margin: 6px 0; max-width: 100ch; } svg { display: block; } .front { max-width: 100%; height: auto; }
dd { white-space: pre-wrap; } main { padding-bottom: 40px; }
svg text { fill: currentColor; } .ranks rect + text { fill: #1c2226; }
td:first-child { min-width: 10rem; } th.why, td.why { text-align: left; white-space: normal; min-width: 14rem; }
pre { font-size: 13px; line-height: 1.35; margin: 6px 0; }
"""
"""What this page has beyond the report's."""

WIDTH: Final = 520
HEIGHT: Final = 300
MARGIN: Final = 60
LABEL_WIDTH: Final = 56
"""Points nearer than this to a labelled one say their figures under the pointer only."""


def answer_page(answer: Answer) -> str:
    """A page that stands alone."""
    from shardstage.report import page_style

    name, machine = escape(answer.model), answer.machine
    facts = (*answer.plan_facts(), *answer.search_facts(), *answer.what_ifs())
    notes = (Fact("note", note) for note in answer.notes)
    body = "".join(
        f"<section><h2>{title}</h2>{content}</section>" for title, content in _sections(answer) if content
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Shardstage: {name}</title><style>{page_style()}{STYLE}</style></head><body>"
        f"<header><h1>{name}</h1><p>{escape(setting(answer.graph, machine, answer.num_ranks))}</p>"
        f"<dl>{''.join(map(_fact, (*facts, *notes)))}</dl></header><main>{body}</main></body></html>\n"
    )


def _sections(answer: Answer) -> Iterator[tuple[str, str]]:
    yield "Time against memory", _front_picture(answer.comparison.front) + _table(answer.less_memory())
    yield "The mesh on the machine", _mesh_picture(answer.machine, answer.chosen)
    yield "Runners-up", _table(answer.runners_up())
    yield "Why not", _table(answer.why_not(is_whole=True))
    choice = "".join(f"<dl>{_fact(fact)}</dl>" for fact in answer.simulated_choice())
    yield "Simulated act by act", _table(answer.simulations()) + choice
    yield "How the proof deals with all plans", _table(answer.counted())
    yield "Who does what", _scrolled(f"<pre>{escape(answer.explained)}</pre>" if answer.explained else "")


def _fact(fact: Fact) -> str:
    text = f"<b>{_breakable(fact.text)}</b>" if fact.name == PLAN else escape(fact.text)
    return f"<dt>{escape(fact.name)}</dt><dd>{text}</dd>"


def _table(told: Rows) -> str:
    """Nothing where there is no row."""
    if not told.rows:
        return ""
    classes = [' class="why"' if head.startswith("why") else "" for head in told.heads]
    heads = "".join(f"<th{of}>{escape(head)}</th>" for of, head in zip(classes, told.heads, strict=True))
    first = _breakable if told.heads[0] == PLAN else escape
    rows = ""
    for row in told.rows:
        cells = (first(row[0]), *map(escape, row[1:]))
        rows += f"<tr>{''.join(f'<td{of}>{cell}</td>' for of, cell in zip(classes, cells, strict=True))}</tr>"
    of = told.title.partition(": ")[2]
    caption = f'<p class="caption">Memory: {escape(of)}.</p>' if of else ""
    return caption + _scrolled(f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>")


def _breakable(plan: str) -> str:
    """A shorthand, which may break where one decision ends, or one stage."""
    return escape(plan).replace(",", ",<wbr>").replace("/", "/<wbr>")


def _scrolled(wide: str) -> str:
    return f'<div class="scroll">{wide}</div>' if wide else ""


def _front_picture(points: Sequence[Point]) -> str:
    """Peak memory to the right, of several classes its share of what the device can hold; step time upwards."""
    if not points:
        return "<p>The plan was given, not searched.</p>"
    most_held = max(map(held, points)) * 1.1
    is_mixed = len(points[0].class_peaks) > 1
    most_s = max(p.prediction.step_time_s for p in points) * 1.15

    def at(point: Point) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * held(point) / most_held
        return x, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * point.prediction.step_time_s / most_s

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, points))
    dots, labelled = "", math.inf
    for point, (x, y) in ((point, at(point)) for point in points):  # by falling memory: from right to left
        seconds, size = format_s(point.prediction.step_time_s), held_text(point)
        short = share_text(point) if is_mixed else size
        dots += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#2563eb"><title>{escape(point.text)}: {seconds}, {size}</title></circle>'
        if labelled - x > LABEL_WIDTH:
            labelled = x
            dots += f'<text x="{x:.1f}" y="{y - 9:.1f}" font-size="12" text-anchor="middle">{seconds}</text>'
            dots += f'<text x="{x:.1f}" y="{HEIGHT - MARGIN + 16}" font-size="12" text-anchor="middle">{short}</text>'
    base = HEIGHT - MARGIN
    what = "fullest rank, of what its device can hold" if is_mixed else "peak memory of a rank"
    return (
        f'<svg class="front" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="step time against peak memory">'
        f'<path d="M{MARGIN} {MARGIN / 2}V{base}H{WIDTH - MARGIN / 2}" fill="none" stroke="#888"/>'
        f'<polyline points="{line}" fill="none" stroke="#2563eb"/>{dots}'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" font-size="13" text-anchor="middle">{what}</text>'
        f'<text x="14" y="{HEIGHT / 2}" font-size="13" transform="rotate(-90 14 {HEIGHT / 2})" text-anchor="middle">'
        "step time</text></svg>"
    )


COLOURS: Final = ("#bfdbfe", "#fde68a", "#bbf7d0", "#fecaca", "#ddd6fe", "#fed7aa", "#a5f3fc", "#e5e7eb")
CELL: Final = 34
MOST_NODES: Final = 8


def _mesh_picture(machine: Cluster, chosen: Chosen) -> str:
    """The first nodes, a box for each rank: coloured by pipeline rank, named by its coordinates."""
    mesh = chosen.plan.mesh
    axes: dict[Axis, str] = {
        "pp": "pipeline rank (colour)",
        "dp": "data-parallel rank",
        "tp": "tensor-parallel rank",
    }
    if mesh.cp > 1:
        axes["cp"] = "context-parallel rank"
    on = machine if chosen.mixed is None else chosen.mixed.cluster
    rows = [*_rows(on, mesh.world_size)]
    left = 70 if len(on.parts) == 1 else 140
    drawn = ""
    for row, (name, ranks) in enumerate(rows[:MOST_NODES]):
        y = 20 + row * (CELL + 6)
        drawn += f'<text x="4" y="{y + 21}" font-size="11">{escape(name)}</text>'
        for column, rank in enumerate(ranks):
            x, pp = left + column * (2 * CELL + 4), mesh.coordinate(rank, "pp")
            at = " ".join(f"{axis[0]}{mesh.coordinate(rank, axis)}" for axis in axes)
            drawn += (
                f'<rect x="{x}" y="{y}" width="{2 * CELL}" height="{CELL}" rx="4" fill="{COLOURS[pp % len(COLOURS)]}"/>'
                f'<text x="{x + CELL}" y="{y + 21}" font-size="10" text-anchor="middle">{at}</text>'
            )
    others = sum(len(ranks) for _, ranks in rows[MOST_NODES:])
    more = f"<p>… and {others:,} more ranks.</p>" if others else ""
    width = left + 10 + max(len(ranks) for _, ranks in rows) * (2 * CELL + 4)
    height = 30 + min(MOST_NODES, len(rows)) * (CELL + 6)
    return (
        _scrolled(
            f'<svg class="ranks" viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="ranks on nodes">{drawn}</svg>'
        )
        + f"<p>{', '.join(f'{axis[0]}: {what}' for axis, what in axes.items())}.</p>{more}"
    )


def _rows(machine: Cluster, num_ranks: int) -> Iterator[tuple[str, range]]:
    """Each node's name, with that of its class where there are several, and its ranks."""
    number = 0
    for index, part in enumerate(machine.parts):
        of, stop = machine.part(index), min(num_ranks, part.first_rank + part.num_devices)
        node, kind = of.devices_per(of.levels[0]), f", {part.name}" if machine.is_mixed else ""
        for first in range(part.first_rank, stop, node):
            yield f"{of.levels[0].name} {number}{kind}", range(first, min(first + node, stop))
            number += 1
