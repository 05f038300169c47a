"""An engine's state as checkpoint entries: master weights, optimizer state and buffers, by the model's own names."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from shardstage.checkpoint import StateEntry
from shardstage.layout import Replicate
from shardstage.runtime.engine import Engine

__all__ = ["accept_loaded", "kept_bytes", "state_entries"]


def state_entries(engine: Engine) -> list[StateEntry]:
    """What this rank holds of the global tensors; the entries view the engine's own memory, so loading fills it in place."""
    tp_rank = engine.groups.tp
    entries = []
    for leaf in engine.parameters.leaves:
        tensors = {"model": leaf.master.detach()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in engine.optimizer.state(leaf).items()}
        for kind, tensor in tensors.items():
            flat = tensor.view(-1)
            for piece in leaf.pieces:
                length = piece.flat_stop - piece.flat_start
                if not length:
                    continue
                entries.append(
                    StateEntry(
                        key=f"{kind}.{piece.parameter.fqn}",
                        tensor=flat[piece.offset : piece.offset + length],
                        global_shape=piece.parameter.shape,
                        placement=piece.parameter.placement,
                        tp_rank=tp_rank,
                        flat_range=(piece.flat_start, piece.flat_stop),
                    )
                )
    buffers = {
        fqn: stage.get_buffer(name)
        for stage in engine.stages.values()
        for name, fqn in stage.buffer_fqns.items()
    }
    for fqn, buffer in buffers.items():
        entries.append(
            StateEntry(
                key=f"buffer.{fqn}",
                tensor=buffer.reshape(-1),
                global_shape=tuple(buffer.shape),
                placement=Replicate(),
                tp_rank=tp_rank,
                flat_range=(0, buffer.numel()),
            )
        )
    return entries


def accept_loaded(engine: Engine, *, num_steps: int) -> None:
    """Makes loaded entries take effect: blocks see the new masters, the optimizer knows how many steps it has done."""
    engine.optimizer.set_num_steps(num_steps)
    with torch.no_grad():
        engine.parameters.publish()


def kept_bytes(engine: Engine) -> int:
    """Bytes of the tensors that an engine keeps between steps: weights, masters, gradients, optimizer state, buffers; none twice."""
    tensors = [t for stage in engine.stages.values() for t in (*stage.parameters(), *stage.buffers())]
    for leaf in engine.parameters.leaves:
        gradient = leaf.gradient()
        tensors += [leaf.master, *engine.optimizer.state(leaf).values()]
        tensors += [] if gradient is None else [gradient]
    return _covered_bytes(tensors)


def _covered_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory that contiguous tensors cover; some are views of others."""
    local = [getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in tensors]
    ranges = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in local)
    covered = end = 0
    for start, stop in ranges:
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    return covered
