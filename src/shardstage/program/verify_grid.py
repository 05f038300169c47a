"""The grid that an error of ``verify`` draws: ranks as rows, time steps as columns, the failing cells marked.

          6            7          8       9
rank 0 │ 0SEND_F2>1   0RECV_B0<1         0B0
rank 2 │ 1F1                    ▶1F1◀    1SEND_B0>0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardstage.program.instruction import Instruction

__all__ = ["Track", "draw", "times_of"]

_WIDTH = 80
_MAX_TRACKS = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """What a rank does: instructions and the time step of each, ascending; ``marked`` is the index of the one that fails."""

    rank: int
    instructions: Sequence[Instruction]
    times: Sequence[int]
    marked: int | None = None


def draw(tracks: Sequence[Track]) -> str:
    """The neighbourhood of the marked instructions, at most 80 columns wide and few ranks high."""
    shown = _nearest(tracks)
    labels = [f"rank {track.rank}" for track in shown]
    cells = [_cells(track) for track in shown]
    centre = next((t.times[t.marked] for t in shown if t.marked is not None), 0)
    window = _window(cells, centre, _WIDTH - max(map(len, labels)) - 3)
    widths = [max(len(str(at)), *(len(row.get(at, "")) for row in cells)) for at in window]
    margin = max(map(len, labels))
    heading = "  ".join(str(at).ljust(width) for at, width in zip(window, widths, strict=True))
    lines = [f"{'':{margin}} │ {heading}"]
    for label, row in zip(labels, cells, strict=True):
        line = "  ".join(row.get(at, "").ljust(width) for at, width in zip(window, widths, strict=True))
        lines.append(f"{label:{margin}} │ {line}")
    return "\n".join(line.rstrip() for line in lines)


def times_of(rows: Sequence[Sequence[Instruction]], stage_ranks: Sequence[int]) -> list[list[int]]:
    """The time step of every instruction of a pipeline if each takes one and a receive waits for its send.

    A receive that waits in vain runs all the same, so that what follows can be drawn.
    """
    sent_at: dict[tuple[int | None, str, int | None, int | None], int] = {}
    times: list[list[int]] = [[] for _ in rows]
    sends = {_route(instruction) for row in rows for instruction in row if instruction.is_send}
    while any(len(done) < len(row) for done, row in zip(times, rows, strict=True)):
        num_done = sum(map(len, times))
        for done, row in zip(times, rows, strict=True):
            while len(done) < len(row):
                route = _route(row[len(done)])
                if row[len(done)].is_receive and route in sends and route not in sent_at:
                    break
                _take(row[len(done)], done, sent_at)
        if sum(map(len, times)) == num_done:
            waiting = [at for at, row in enumerate(rows) if len(times[at]) < len(row)]
            first = min(waiting, key=lambda at: times[at][-1] if times[at] else 0)
            _take(rows[first][len(times[first])], times[first], sent_at)
    return times


def _take(
    instruction: Instruction,
    done: list[int],
    sent_at: dict[tuple[int | None, str, int | None, int | None], int],
) -> None:
    """Runs one instruction as early as it can."""
    earliest = done[-1] + 1 if done else 0
    route = _route(instruction)
    if instruction.is_receive:
        earliest = max(earliest, sent_at.get(route, -1) + 1)
    if instruction.is_send:
        sent_at.setdefault(route, earliest)
    done.append(earliest)


def _route(instruction: Instruction) -> tuple[int | None, str, int | None, int | None]:
    """From which stage to which, which way and for which microbatch: the same for a send and its receive."""
    ends = (instruction.stage, instruction.peer)
    source, target = ends if instruction.is_send else ends[::-1]
    return source, instruction.kind[-1], instruction.microbatch, target


def _nearest(tracks: Sequence[Track]) -> list[Track]:
    """The marked tracks and their neighbours."""
    marked = [at for at, track in enumerate(tracks) if track.marked is not None]
    near = sorted(range(len(tracks)), key=lambda at: (min((abs(at - m) for m in marked), default=0), at))
    return [tracks[at] for at in sorted(near[: max(_MAX_TRACKS, len(marked))])]


def _cells(track: Track) -> Mapping[int, str]:
    return {
        time: f"▶{instruction.name}◀" if at == track.marked else instruction.name
        for at, (time, instruction) in enumerate(zip(track.times, track.instructions, strict=True))
    }


def _window(cells: Sequence[Mapping[int, str]], centre: int, width: int) -> list[int]:
    """Time steps around the centre, alternately before and after, while their columns fit."""
    times = sorted({at for row in cells for at in row})
    before = [at for at in times if at < centre][::-1]
    after = [at for at in times if at > centre]
    order = [centre, *(at for pair in zip(before, after, strict=False) for at in pair)]
    order += before[len(after) :] + after[len(before) :]
    window: list[int] = []
    used = 0
    for at in order:
        used += 2 + max(len(str(at)), *(len(row.get(at, "")) for row in cells))
        if used > width + 2 and window:
            break
        window.append(at)
    return sorted(window)
