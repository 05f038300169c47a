"""``Stored``: the checkpoint that a rank would write and read, by the code that does, and who keeps which elements.

Between them the data-parallel ranks must keep every element of a parameter's local tensor: all of them each, or each its own.

    kept by dp 0, 1, 2      0..40 | 40..80 | 80..100     one copy
                            0..100 | 0..100 | 0..100     one copy each
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shardstage.checkpoint.box_planners import BoxLoadPlanner, BoxSavePlanner
from shardstage.errors import ProgramError
from shardstage.layout import Shard
from shardstage.runtime.engine import Engine
from shardstage.runtime.leaves import ParameterInfo, Piece
from shardstage.training.state import state_entries

__all__ = ["Stored", "require_every_element", "stored"]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A rank's part of a checkpoint: boxes and bytes that it can write.

    ``whole_bytes`` are those of everything that it and the data-parallel ranks beside it keep of a parameter, weights and optimizer
    state of all tensor-parallel ranks together, or of a buffer, by fqn.
    """

    num_boxes: int
    num_bytes: int
    whole_bytes: Mapping[str, int]


def stored(engine: Engine) -> Stored:
    """Plans a save and a load of the engine's state. Raises ``ProgramError`` if an element is kept by nobody, or by some and not by all."""
    dp_pieces = [engine.parameters.pieces_of(dp) for dp in range(engine.groups.mesh.dp)]
    require_every_element(dp_pieces)
    entries = state_entries(engine)
    saving = BoxSavePlanner(entries)
    saving.set_up_planner({}, is_coordinator=True)
    plan = saving.create_local_plan()
    _, metadata = saving.create_global_plan([plan])
    loading = BoxLoadPlanner(entries)
    loading.set_up_planner({}, metadata)
    loading.create_local_plan()  # raises where something of what was planned to be saved is not found again
    written = [(item.index.fqn, item.tensor_data) for item in plan.items if item.tensor_data is not None]
    return Stored(
        num_boxes=len(written),
        num_bytes=sum(data.chunk.sizes.numel() * _itemsize(data) for _, data in written),
        whole_bytes={**_parameter_bytes(engine, dp_pieces), **_buffer_bytes(engine)},
    )


def _parameter_bytes(engine: Engine, dp_pieces: Iterable[Iterable[Piece]]) -> dict[str, int]:
    infos = {piece.parameter.fqn: piece.parameter for pieces in dp_pieces for piece in pieces}
    if not infos:
        return {}
    leaf = engine.parameters.leaves[0]
    element_bytes = sum(t.element_size() for t in (leaf.master, *engine.optimizer.state(leaf).values()))
    return {fqn: math.prod(info.shape) * element_bytes for fqn, info in infos.items()}


def _buffer_bytes(engine: Engine) -> dict[str, int]:
    return {
        fqn: stage.get_buffer(name).nbytes
        for stage in engine.stages.values()
        for name, fqn in stage.buffer_fqns.items()
    }


def _itemsize(data: object) -> int:
    size: int = data.properties.dtype.itemsize  # type: ignore[attr-defined]  # torch's TensorWriteData is untyped here
    return size


def require_every_element(dp_pieces: Iterable[Iterable[Piece]]) -> None:
    """Raises ``ProgramError`` unless the pieces by dp rank cover each parameter's local tensor once, or once on every rank."""
    ranges: dict[str, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    infos: dict[str, ParameterInfo] = {}
    num_dp = 0
    for dp, pieces in enumerate(dp_pieces):
        num_dp += 1
        for piece in pieces:
            infos[piece.parameter.fqn] = piece.parameter
            if piece.flat_start < piece.flat_stop:
                ranges[piece.parameter.fqn][dp].append((piece.flat_start, piece.flat_stop))
    for fqn, info in infos.items():
        _require_whole_axis(info)
        numel = math.prod(info.local_shape)
        by_dp = ranges[fqn]
        if len(by_dp) == num_dp and all(_covers(kept, numel) for kept in by_dp.values()):
            continue
        if not _covers([kept for each in by_dp.values() for kept in each], numel):
            raise ProgramError(
                f"the data-parallel ranks keep {_shown(by_dp)} of the {numel} elements of {fqn}: not each element once",
                hint="a checkpoint of this plan would lose some; please report it",
            )


def _require_whole_axis(info: ParameterInfo) -> None:
    placement = info.placement
    if isinstance(placement, Shard) and placement.length != info.shape[placement.dim]:
        raise ProgramError(
            f"the tensor-parallel ranks hold {placement.length} of {info.shape[placement.dim]} rows of {info.fqn}",
            hint="a checkpoint of this plan would lose some; please report it",
        )


def _covers(ranges: Iterable[tuple[int, int]], numel: int) -> bool:
    """Whether ranges, in any order, are 0..numel without a gap and without an overlap."""
    end = 0
    for start, stop in sorted(ranges):
        if start != end:
            return False
        end = stop
    return end == numel


def _shown(by_dp: Mapping[int, list[tuple[int, int]]]) -> str:
    parts = [f"{start}..{stop} (dp={dp})" for dp, kept in sorted(by_dp.items()) for start, stop in kept]
    return ", ".join(parts[:4]) + (" …" if len(parts) > 4 else "") if parts else "none"
