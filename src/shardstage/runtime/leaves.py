"""``Leaf``: a tensor that the optimizer steps, and which parts of which parameters lie in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from shardstage.layout import Placement

__all__ = ["Leaf", "ParameterInfo", "Piece"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterInfo:
    """A parameter as one rank sees it.

    ``name`` is its value in the graph, ``fqn`` the model's name. ``shape`` is the whole parameter's, ``local_shape`` that of this rank's
    tensor-parallel shard. ``stages`` are the stages that hold it: more than one where it is tied across them.
    """

    name: str
    fqn: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    placement: Placement
    stages: tuple[int, ...]

    @property
    def is_decayed(self) -> bool:
        return len(self.shape) >= 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Elements ``flat_start <= i < flat_stop`` of a parameter's row-major local tensor, at ``offset`` of the leaf they lie in."""

    parameter: ParameterInfo
    flat_start: int
    flat_stop: int
    offset: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Leaf:
    """What one optimizer step updates in place: a parameter, a shard of one, or a shard of a bucket of several.

    ``master`` has the precision of the optimizer (float32 or wider). ``gradient`` gives the reduced gradient of the same shape, or
    ``None`` if there was none. ``is_counted`` says that this rank's share of it goes into the global gradient norm: of the
    ranks that hold the same elements, exactly one counts them. ``owns_gradient``: ``master.grad`` is where autograd accumulates.
    """

    master: Tensor
    gradient: Callable[[], Tensor | None]
    pieces: tuple[Piece, ...]
    is_decayed: bool
    is_counted: bool
    owns_gradient: bool = False
