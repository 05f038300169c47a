"""``describe``: what lies where, as text for people."""

from __future__ import annotations

import re
from collections import Counter
from math import prod

from shardstage.layout import Placement
from shardstage.sharding.call import local_shape
from shardstage.sharding.sharding import Sharding

__all__ = ["describe"]

_MEANING = {
    "I": "whole",
    "R": "whole, gradient summed over tp once a step",
}


def describe(sharding: Sharding) -> str:
    """Tables of parameters and of ops that are not shared, each folded over repeated layers.

    parameter                                    shape     placement      elements by rank
    model.layers.*.self_attn.q_proj.weight  × 8  128 × 128  S(0: 64/64)  8192 8192
    """
    parameters = _parameter_rows(sharding)
    lines = [f"tensor parallel over {sharding.num_ranks} ranks{_sequence_words(sharding)}", ""]
    lines += _table(("parameter", "", "shape", "placement", "elements by rank"), parameters)
    unsharded = _unsharded_rows(sharding)
    if unsharded:
        lines += ["", *_table(("runs whole on every rank", "", "why", "where"), unsharded)]
    return "\n".join(lines)


def _sequence_words(sharding: Sharding) -> str:
    return ", activations between regions cut along the sequence" if sharding.is_sequence_parallel else ""


def _parameter_rows(sharding: Sharding) -> list[tuple[str, ...]]:
    graph = sharding.graph
    found = Counter(
        (_folded(p.fqn), graph.values[p.name].shape, sharding.parameters[p.fqn]) for p in graph.parameters
    )
    return [
        (
            fqn,
            _times(count),
            " × ".join(map(str, shape)) or "scalar",
            _MEANING.get(str(placement), str(placement)),
            " ".join(str(_numel(shape, placement, rank)) for rank in range(sharding.num_ranks)),
        )
        for (fqn, shape, placement), count in found.items()
    ]


def _unsharded_rows(sharding: Sharding) -> list[tuple[str, ...]]:
    ops = {op.name: op for op in sharding.graph.ops}
    found: Counter[tuple[str, str, str]] = Counter()
    for item in sharding.unsharded:
        op = ops[item.op]
        found[f"{op.target} in {_folded(op.module) or 'the model'}", item.reason, item.source] += 1
    return [(what, _times(count), why, where) for (what, why, where), count in found.items()]


def _folded(path: str) -> str:
    """The path with the numbers of layers replaced by ``*``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _times(count: int) -> str:
    return f"× {count}" if count > 1 else ""


def _numel(shape: tuple[int, ...], placement: Placement, rank: int) -> int:
    return prod(local_shape(shape, placement, rank))


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
