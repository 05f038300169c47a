"""``Leaf``: a tensor that the optimizer steps, and which parts of which parameters lie in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from shardstage.layout import Placement, Replicate

__all__ = ["Leaf", "ParameterInfo", "Piece"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterInfo:
    """A parameter as one rank sees it.

    ``name`` is its value in the graph, ``fqn`` the model's name. ``shape`` is the whole parameter's, ``local_shape`` that of this rank's
    tensor-parallel shard. ``ties`` are the pipeline ranks that hold it, where there are several. ``block`` is the one block of its
    stage that uses it, ``None`` where several do.
    """

    name: str
    fqn: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    placement: Placement
    ties: tuple[int, ...] = ()
    block: int | None = None

    @property
    def is_decayed(self) -> bool:
        """Weight decay is for matrices, not for biases and norms."""
        return len(self.shape) >= 2

    @property
    def is_tp_partial(self) -> bool:
        """Whether tensor-parallel ranks hold it whole and each sees a summand of its gradient."""
        return isinstance(self.placement, Replicate) and self.placement.has_partial_grad


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
    ``is_apart``: the gradient is narrower than ``master`` or lies elsewhere, and is brought to it for the step; ``is_sent``: it lies
    elsewhere, as ``master`` lies in the host's memory.
    """

    master: Tensor
    gradient: Callable[[], Tensor | None]
    pieces: tuple[Piece, ...]
    is_decayed: bool
    is_counted: bool
    owns_gradient: bool = False
    is_apart: bool = False
    is_sent: bool = False
