"""``at``: the same computation for another microbatch and sequence length.

A graph is captured at *markers*: a microbatch and a length that are prime and divide no dimension of the model. Whatever they divide
came from them, so a size k · B^i · S^j of the graph is k · b^i · s^j at microbatch b and length s:

    captured at B = 1009, S = 131    view(x, (1009, 131, -1, 64))    flatten: (132179, 512)
    at b = 4, s = 4096               view(x, (4, 4096, -1, 64))      flatten: (16384, 512)

Models also shift by one token and look at pairs of positions: S - 1, S + 1 and 2S - 1 follow the length too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardstage.errors import CaptureError

if TYPE_CHECKING:
    from shardstage.graph.model_graph import ModelGraph

__all__ = ["at", "markers"]

# From here on an integer means "to the end" (torch writes 2**63 - 1), whatever divides it.
_NO_SIZE = 1 << 62
# Beyond the small integers that models write down, such as a number of buckets.
_SMALLEST_MICROBATCH = 1009
_SHORTEST_LENGTH = 97
_SMALLEST_PRIME = 11
_POWERS_OF_TWO = frozenset(1 << power for power in range(1, 24))
# (multiple of the length, distance from it)
_NEAR_LENGTH = ((1, -1), (1, 1), (2, -1))


def at(graph: ModelGraph, *, microbatch: int, sequence: int | None = None) -> ModelGraph:
    """The graph for ``microbatch`` samples of ``sequence`` tokens; without ``sequence``, of as many as before. Images have no such length.

    The result is not scalable: its sizes are numbers like any other. Raises CaptureError where the graph is bound to its sizes.
    """
    sequence = graph.sequence if sequence is None or graph.sequence is None else sequence
    if (microbatch, sequence) == (graph.microbatch, graph.sequence):
        return graph
    _require_scalable(graph, microbatch, sequence)
    resize = _resizer(graph, microbatch, sequence)
    values = {
        name: replace(value, shape=tuple(map(resize, value.shape)))
        if value.kind not in ("parameter", "buffer", "constant")
        else value
        for name, value in graph.values.items()
    }
    return replace(
        graph,
        ops=tuple(
            replace(op, args=_resized(op.args, resize), kwargs=_resized(op.kwargs, resize))
            for op in graph.ops
        ),
        values=values,
        microbatch=microbatch,
        sequence=sequence,
        is_scalable=False,
        is_sequence_scalable=False,
    )


def markers(
    sizes: Iterable[int], *, sequence: int | None, max_sequence: int | None = None
) -> tuple[int, int | None]:
    """A microbatch and a length to capture at, for a model that has ``sizes`` of its own.

    The length is close to ``sequence`` where that is long, so that a model which branches on it (a sliding window) takes the same
    branch, and not beyond ``max_sequence``; None where no such prime exists, or without ``sequence``.
    """
    taken = {size for size in sizes if size > 1}
    microbatch = next(p for p in _upwards(_SMALLEST_MICROBATCH) if _is_marker(p, taken))
    if sequence is None:
        return microbatch, None
    limit = max_sequence if max_sequence is not None else 2 * sequence + 10 * _SHORTEST_LENGTH
    wanted = min(max(sequence, _SHORTEST_LENGTH), limit)
    ambiguous = {microbatch, *_near(taken | _POWERS_OF_TWO)}
    lengths = (*range(wanted, limit + 1), *range(wanted, _SMALLEST_PRIME - 1, -1))
    return microbatch, next((p for p in lengths if p not in ambiguous and _is_marker(p, taken)), None)


def _require_scalable(graph: ModelGraph, microbatch: int, sequence: int | None) -> None:
    if not graph.is_scalable and microbatch != graph.microbatch:
        raise CaptureError(
            f"the graph holds for microbatches of {graph.microbatch} samples only, not {microbatch}",
            hint=f"graph.at(microbatch={graph.microbatch})",
        )
    if not graph.is_sequence_scalable and sequence != graph.sequence:
        raise CaptureError(
            f"the graph holds for sequences of {graph.sequence} tokens only, not {sequence}",
            hint=f"capture(model, sequence={sequence})",
        )


def _resizer(graph: ModelGraph, microbatch: int, sequence: int | None) -> Callable[[int], int]:
    known: dict[int, int] = {}

    def resize(size: int) -> int:
        if size not in known:
            known[size] = _resize(size, graph, microbatch, sequence)
        return known[size]

    return resize


def _resize(size: int, graph: ModelGraph, microbatch: int, sequence: int | None) -> int:
    if size == 0 or abs(size) >= _NO_SIZE:
        return size
    samples = 1
    if graph.is_scalable:
        power, size = _divided(size, graph.microbatch)
        samples = microbatch**power
    if graph.is_sequence_scalable and graph.sequence is not None and sequence is not None:
        size = _resize_length(size, graph.sequence, sequence)
    return samples * size


def _resize_length(size: int, marker: int, sequence: int) -> int:
    power, rest = _divided(size, marker)
    if power:
        return int(rest * sequence**power)
    for multiple, distance in _NEAR_LENGTH:
        if size == multiple * marker + distance:
            return multiple * sequence + distance
    return size


def _divided(size: int, marker: int) -> tuple[int, int]:
    """(power, rest) of size = marker**power * rest."""
    power = 0
    while size % marker == 0:
        size, power = size // marker, power + 1
    return power, size


def _resized(argument: Any, resize: Callable[[int], int]) -> Any:
    if isinstance(argument, tuple):
        return tuple(_resized(item, resize) for item in argument)
    if isinstance(argument, bool):
        return argument
    if isinstance(argument, int):
        return resize(argument)
    is_whole = isinstance(argument, float) and abs(argument) < _NO_SIZE and argument.is_integer()
    return float(resize(int(argument))) if is_whole else argument


def _near(sizes: Set[int]) -> set[int]:
    """Lengths L for which a size would be taken for L - 1, L + 1 or 2L - 1."""
    return {(size - distance) // multiple for size in sizes for multiple, distance in _NEAR_LENGTH}


def _upwards(start: int) -> Iterable[int]:
    return range(start, start + 100_000)


def _is_marker(candidate: int, taken: Set[int]) -> bool:
    is_prime = candidate > 1 and all(candidate % d for d in range(2, int(candidate**0.5) + 1))
    return is_prime and all(size % candidate for size in taken)
