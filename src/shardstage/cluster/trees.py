"""Trees of link levels: what a group of ranks crosses, in one tree or in several that a network joins.

    part 0                part 1                each part keeps the levels below its own network;
    node   node           node                  one network joins all nodes of all parts,
    └──────┴── network ────┘                    as slow as the slowest of the parts' own

A part of one level, such as a single host, has no network: it is joined as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from shardstage.cluster.groups import Group, most_parts, spread
from shardstage.cluster.links import Crossing, LinkLevel

__all__ = ["Tree", "below_network", "crossings", "joint_crossings", "joint_levels", "joint_network"]

Tree = Sequence[LinkLevel]
"""Levels, innermost first."""


def crossings(group: Group, levels: Tree) -> tuple[Crossing, ...]:
    """The levels that a group crosses, innermost first; where parts are uneven, the worst counts."""
    found = []
    unit = 1
    for depth, level in enumerate(levels):
        parts = most_parts(group, unit, level.size)
        if parts > 1:
            found.append(Crossing(level, depth, parts, spread(group, unit).fewest))
        unit *= level.size
    return tuple(found)


def joint_crossings(members: Sequence[tuple[Group, Tree]], network: LinkLevel) -> tuple[Crossing, ...]:
    """What a group crosses that lies in several trees: at each depth the worst of them, then the network.

    A member is the group's ranks within one tree, counted from its first, and the tree's levels below the network.
    """
    depths = max(len(levels) for _, levels in members)
    inner = [found for depth in range(depths) for found in _worst(members, depth)]
    tops = [spread(group, _unit(levels, len(levels))) for group, levels in members]
    outer = Crossing(network, depths, sum(top.units for top in tops), min(top.fewest for top in tops))
    return (*inner, outer)


def below_network(levels: Tree) -> tuple[LinkLevel, ...]:
    """The levels that stay a part's own where parts are joined."""
    return tuple(levels[:-1]) if len(levels) > 1 else tuple(levels)


def joint_levels(trees: Sequence[Tree], network: LinkLevel) -> tuple[LinkLevel, ...]:
    """One tree to speak of for joined ones: by position the worst of their levels, then the network.

    A level joins as many as the smallest of them does: what fits there fits in every part.
    """
    own = [below_network(levels) for levels in trees]
    at_depth = [[tree[depth] for tree in own if depth < len(tree)] for depth in range(max(map(len, own)))]
    return (*(_slowest(levels) for levels in at_depth), network)


def joint_network(parts: Sequence[tuple[int, Tree]]) -> LinkLevel | None:
    """The slowest of the parts' outermost levels, sized for all their nodes; None where no part has a network."""
    networks = [levels[-1] for _, levels in parts if len(levels) > 1]
    if not networks:
        return None
    own = [(num_devices, below_network(levels)) for num_devices, levels in parts]
    num_nodes = sum(-(-num_devices // _unit(tree, len(tree))) for num_devices, tree in own)
    slowest = _slowest([levels[-1] for _, levels in parts])
    return replace(slowest, name=_either(level.name for level in networks), size=num_nodes)


def _worst(members: Sequence[tuple[Group, Tree]], depth: int) -> list[Crossing]:
    """The crossing of one level by a group in several trees; none where it leaves no part of any."""
    here = [(group, levels, _unit(levels, depth)) for group, levels in members if depth < len(levels)]
    parts = [most_parts(group, unit, levels[depth].size) for group, levels, unit in here]
    if max(parts) == 1:
        return []
    crossed = [levels[depth] for (_, levels, _), count in zip(here, parts, strict=True) if count > 1]
    lanes = min(spread(group, unit).fewest for group, _, unit in here)
    return [Crossing(_slowest(crossed), depth, max(parts), lanes)]


def _slowest(levels: Sequence[LinkLevel]) -> LinkLevel:
    """The level itself where all are one; else a level with the worst of every figure."""
    if all(level == levels[0] for level in levels):
        return levels[0]
    steps = [level.step_s for level in levels]
    return LinkLevel(
        name=_either(level.name for level in levels),
        size=min(level.size for level in levels),
        latency_s=max(level.latency_s for level in levels),
        bytes_per_s=min(level.bytes_per_s for level in levels),
        step_s=None if None in steps else max(step for step in steps if step is not None),
        source="the worst of each: " + " | ".join(dict.fromkeys(level.source for level in levels)),
    )


def _either(names: Iterable[str]) -> str:
    return "/".join(dict.fromkeys(names))


def _unit(levels: Tree, depth: int) -> int:
    """How many devices one part of the level at ``depth`` has."""
    return math.prod(level.size for level in levels[:depth])
