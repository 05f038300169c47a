"""An engine's state as checkpoint entries: master weights, optimizer state and buffers, by the model's own names."""

from __future__ import annotations

import torch

from shardstage.checkpoint import StateEntry
from shardstage.layout import Replicate
from shardstage.runtime.engine import Engine

__all__ = ["accept_loaded", "state_entries"]


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
    for name, fqn in engine.stage.buffer_fqns.items():
        buffer = engine.stage.get_buffer(name)
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
