"""``parse_change``: one "what if" as text.

bandwidth=F     every link moves F times as many bytes a second; ``LEVEL.bandwidth=F`` only those of one level of the cluster
latency=F       every link's latency, times F; ``LEVEL.latency=F`` likewise
slow=RANK:F     one device computes F times as long
nodes=±N        so many nodes more or fewer, dp grown or shrunk with them
dp=N            so many data-parallel ranks
microbatch=N    so many samples in a microbatch
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from shardstage.errors import ConfigError

__all__ = ["Change", "ChangeKind", "parse_change"]

ChangeKind = Literal["bandwidth", "latency", "slow", "nodes", "dp", "microbatch"]

_EXAMPLES = {
    "bandwidth": "bandwidth=0.5",
    "latency": "latency=2",
    "slow": "slow=3:1.5",
    "nodes": "nodes=+2",
    "dp": "dp=16",
    "microbatch": "microbatch=2",
}
_HINT = ", ".join(f'--what-if "{example}"' for example in _EXAMPLES.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """``value`` is the factor, or the number; ``level`` names a link level (none: all); ``rank`` is that of the slow device."""

    kind: ChangeKind
    value: float
    level: str = ""
    rank: int = 0

    def __str__(self) -> str:
        if self.kind == "slow":
            return f"slow={self.rank}:{self.value:g}"
        sign = "+" if self.kind == "nodes" and self.value > 0 else ""
        return f"{f'{self.level}.' if self.level else ''}{self.kind}={sign}{self.value:g}"

    @property
    def is_of_prices(self) -> bool:
        """Whether the same Program runs, only faster or slower; else it must be lowered anew."""
        return self.kind in ("bandwidth", "latency", "slow")


def parse_change(text: str) -> Change:
    """The change that a text writes; ``ConfigError`` says what is wrong with it and shows a right one."""
    left, equals, right = text.strip().partition("=")
    level, _, kind = left.rpartition(".")
    if not equals or kind not in _EXAMPLES:
        raise ConfigError(f"{text!r} is no change; one can ask for {', '.join(_EXAMPLES)}", hint=_HINT)
    found = cast("ChangeKind", kind)
    if level and found not in ("bandwidth", "latency"):
        raise ConfigError(f"{text!r}: only bandwidth and latency are of a link level", hint=_example(found))
    if found == "slow":
        return _slow(text, right)
    if found in ("bandwidth", "latency"):
        return Change(kind=found, value=_factor(text, right, found), level=level)
    return Change(kind=found, value=_count(text, right, found))


def _slow(text: str, right: str) -> Change:
    match = re.fullmatch(r"(\d+):(.+)", right)
    if match is None:
        raise ConfigError(f"{text!r} names no rank and factor", hint=_example("slow"))
    return Change(kind="slow", rank=int(match[1]), value=_factor(text, match[2], "slow"))


def _factor(text: str, number: str, kind: ChangeKind) -> float:
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{text!r}: {number!r} is no positive factor", hint=_example(kind))
    return value


def _count(text: str, number: str, kind: ChangeKind) -> int:
    if re.fullmatch(r"[+-]\d+" if kind == "nodes" else r"\d+", number) is None or int(number) == 0:
        wanted = (
            "a number with a sign, of nodes more or fewer" if kind == "nodes" else "a number of one or more"
        )
        raise ConfigError(f"{text!r}: {number!r} is not {wanted}", hint=_example(kind))
    return int(number)


def _example(kind: ChangeKind) -> str:
    return f'--what-if "{_EXAMPLES[kind]}"'
