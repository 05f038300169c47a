"""A world of which only one rank is there: its collectives return at once and move nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from shardstage.compat import fake_store
from shardstage.errors import ProgramError

__all__ = ["fake_world"]


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Makes this thread rank ``rank`` of ``world_size`` that do not exist; torch's groups are those of that world until the end.

    Raises ``ProgramError`` in a rank of a real world.
    """
    if dist.is_initialized():
        raise ProgramError(
            f"a dry run needs a world of its own, and this is rank {dist.get_rank()} of a real one",
            hint="shardstage rehearse",
        )
    dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
