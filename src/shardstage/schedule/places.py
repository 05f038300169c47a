"""``stage_ranks``: which pipeline rank runs each stage."""

from __future__ import annotations

from typing import Literal

__all__ = ["Places", "place_stages"]

Places = Literal["one", "loop", "v"]
"""``one``: a stage a rank. ``loop``: stage s on rank s mod p, round after round. ``v``: down the ranks and up again, so that rank 0
holds the first stage and the last."""


def place_stages(places: Places, num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """The rank of every stage.

    p = 3    stage 0 1 2 3 4 5
    loop     rank  0 1 2 0 1 2
    v        rank  0 1 2 2 1 0
    """
    down = tuple(range(num_ranks))
    if places == "v":
        return down + down[::-1]
    return down * stages_per_rank
