"""The page of ``shardstage plan --out page.html``: the front as a picture, the mesh on the topology, and why not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Final

from shardstage.cli.choosing import Chosen
from shardstage.cli.comparison import Comparison, held, held_text, share_text, what_if_text
from shardstage.plan import shorthand
from shardstage.units import format_bytes, format_ratio, format_s

if TYPE_CHECKING:
    from shardstage.cluster import Cluster
    from shardstage.layout.mesh import Axis
    from shardstage.planner import Point

__all__ = ["comparison_page"]

WIDTH: Final = 640
HEIGHT: Final = 300
MARGIN: Final = 60
LABEL_WIDTH: Final = 56
"""Points nearer than this to a labelled one say their figures under the pointer only."""


def comparison_page(model: str, machine: Cluster, chosen: Chosen, comparison: Comparison) -> str:
    """A page that stands alone: the front as a picture, the mesh on the topology, the tables."""
    rows = "".join(
        f"<tr><td>{escape(a.change)}</td><td>{format_s(a.prediction.step_time_s) if a.prediction else ''}</td>"
        f"<td>{format_bytes(a.prediction.peak_bytes) if a.prediction else ''}</td><td>{escape(a.reason)}</td></tr>"
        for a in comparison.alternatives
    )
    what_if = (
        "" if comparison.modules is None else f"<p>What if: {escape(what_if_text(comparison.modules))}</p>"
    )
    proof, found = "", chosen.found or chosen.mixed
    if found is not None:
        certificate = found.certificate
        proof = f"Best of {certificate.enumerated:,} plans, gap {format_ratio(certificate.gap)}."
    devices = f"{chosen.plan.mesh.world_size:,} × {machine.device.name}"
    if chosen.mixed is not None:
        devices = " + ".join(f"{share.num_used:,} × {share.name}" for share in chosen.mixed.shares)
    why_not = f"<h2>Why not</h2><table><tr><th>change<th>step time<th>memory<th>reason</tr>{rows}</table>"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Shardstage: {escape(model)}</title>"
        "<style>body{font:15px system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}"
        "td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}svg{max-width:100%}</style>"
        f"<h1>{escape(model)} on {escape(devices)}</h1>"
        f"<p><b>{escape(shorthand(chosen.plan))}</b></p><p>{format_s(chosen.prediction.step_time_s)} a step, "
        f"{format_bytes(chosen.prediction.peak_bytes)} a rank. {proof}</p>"
        f"<h2>Time against memory</h2>{_front_picture(comparison.front)}"
        f"<h2>The mesh on the machine</h2>{_mesh_picture(machine, chosen)}"
        f"{why_not if rows else ''}{what_if}</html>\n"
    )


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
            dots += f'<text x="{x:.1f}" y="{y - 9:.1f}" font-size="11" text-anchor="middle">{seconds}</text>'
            dots += f'<text x="{x:.1f}" y="{HEIGHT - MARGIN + 16}" font-size="11" text-anchor="middle">{short}</text>'
    base = HEIGHT - MARGIN
    what = "fullest rank, of what its device can hold" if is_mixed else "peak memory of a rank"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="step time against peak memory">'
        f'<path d="M{MARGIN} {MARGIN / 2}V{base}H{WIDTH - MARGIN / 2}" fill="none" stroke="#888"/>'
        f'<polyline points="{line}" fill="none" stroke="#2563eb"/>{dots}'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" font-size="12" text-anchor="middle">{what}</text>'
        f'<text x="14" y="{HEIGHT / 2}" font-size="12" transform="rotate(-90 14 {HEIGHT / 2})" text-anchor="middle">'
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
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="ranks on nodes">{drawn}</svg>'
        f"<p>{', '.join(f'{axis[0]}: {what}' for axis, what in axes.items())}.</p>{more}"
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
