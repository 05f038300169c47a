"""``About``: what a report says of a run besides its timelines."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["About", "RankNote"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankNote:
    """What the ranks at one pipeline coordinate hold, in words: the modules of their stages."""

    pp: int
    stages: str


@dataclass(frozen=True, kw_only=True)
class About:
    """``facts`` are pairs of a name and a text, shown in order; ``tokens`` are those of a step, for tokens/s."""

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    tokens: int | None = None
    ranks: tuple[RankNote, ...] = ()
