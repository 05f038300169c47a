"""``Rounding``: arithmetic in which every operator errs as it would at a coarser precision: Monte Carlo arithmetic.

The result y of an operator is replaced by y + u·|y|·ξ + v·s·ξ', where ξ, ξ' are uniform in [-1, 1] for each element, anew each time:

    u   unit roundoff of the dtype that y has in the run: a rounding to nearest has this bound and this spread
    v   unit roundoff of accumulation: float32 at least, also for products of bfloat16
    s   √n·|y| + ‖a‖·‖b‖ for a sum of n products a·b: the probabilistic error bound of a sum grows with √n, not n (Higham & Mary, SIAM J.
        Sci. Comput. 41, 2019); for terms of mean zero it is the sum of their sizes, Σ|a·b| ≤ ‖a‖·‖b‖, without √n (the same, 42, 2020)

Monte Carlo arithmetic (Parker, UCLA CSD-970002, 1997) propagates these errors through the rest of the computation with its true
derivatives, whatever the depth and the condition of the model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardstage.compat import TorchDispatchMode, storage_key, written_tensors

__all__ = ["ACCUMULATION_ROUNDOFF", "UNIT_ROUNDOFF", "Rounding"]

UNIT_ROUNDOFF: Mapping[str, float] = {
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
    "float32": 2.0**-24,
    "float64": 2.0**-53,
}
"""Half the distance from 1 to the next number, of round to nearest (IEEE 754; bfloat16 has 8 significant bits)."""

ACCUMULATION_ROUNDOFF = 2.0**-24

_POOL_SIZE = (
    1 << 20
)  # random numbers drawn once and read from a random place on: they cost more than what they disturb
# What only moves, selects or counts elements rounds nothing.
_EXACT = frozenset(
    (
        "alias amax amin arange argsort bincount bool cat ceil clone constant_pad_nd contiguous copy_ detach "
        "embedding empty empty_like expand fill_ floor full full_like gather histc index index_select lift_fresh_copy "
        "masked_fill max max_pool2d_with_indices min neg new_empty new_full new_zeros ones ones_like relu roll round "
        "scatter select_backward sign slice_backward sort stack threshold_backward topk tril triu where zero_ zeros "
        "zeros_like"
    ).split()
)
# These add up one row after the other, rounding each time to the dtype of the result (torch 2.13, CPU).
_SUMS_IN_ITS_DTYPE = frozenset({"embedding_dense_backward", "native_layer_norm_backward"})


class Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its modes untyped
    """Disturbs the results of all operators called in the block, forward and backward.

    ``roundoff`` gives u by the dtype that computes here (which is wider than the run's). Counts what it saw: ``num_ops``
    roundings, and ``longest_sum`` terms in one sum.
    """

    def __init__(self, roundoff: Mapping[torch.dtype, float], *, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_ops = 0
        self.longest_sum = 1
        self._roundoff = roundoff
        self._random = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        pool = torch.rand(_POOL_SIZE, generator=generator, dtype=torch.float64).mul_(2).sub_(1)
        self._pools = {dtype: pool.to(dtype) for dtype in roundoff}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(func).split(".")[1]
        if name in _EXACT or (name == "_to_copy" and not _narrows(args[0], result)):
            return result
        fresh = _fresh_results(func, args, kwargs, result)
        if any(tensor.dtype in self._roundoff for tensor in fresh):
            self._disturb(func, name, args, fresh)
        return result

    def disturb_sum(self, total: Tensor, unit: float) -> None:
        """What rounding a sum to a narrower dtype after each term does to it: y becomes y + u·|y|·ξ, in place."""
        self._pools.setdefault(total.dtype, next(iter(self._pools.values())).to(total.dtype))
        total.mul_((self._noise(total) * unit).add_(1))

    def _disturb(self, func: Any, name: str, args: tuple[Any, ...], results: Sequence[Tensor]) -> None:
        self.num_ops += 1
        num_terms = _num_terms(name, args, results)
        self.longest_sum = max(self.longest_sum, num_terms)
        scales = _sum_scales(func, name, args, results)
        for tensor, scale in zip(results, scales, strict=True):
            unit = self._roundoff.get(tensor.dtype)
            if unit is None or not tensor.numel():
                continue
            accumulation = unit if name in _SUMS_IN_ITS_DTYPE else min(unit, ACCUMULATION_ROUNDOFF)
            relative = unit + accumulation * math.sqrt(num_terms)
            tensor.mul_((self._noise(tensor) * relative).add_(1))  # a product: -inf of a mask stays -inf
            if scale is not None:
                tensor.add_(scale * self._noise(tensor), alpha=accumulation)

    def _noise(self, like: Tensor) -> Tensor:
        pool, numel = self._pools[like.dtype], like.numel()
        if numel > _POOL_SIZE:
            pool = pool.repeat(-(-numel // _POOL_SIZE) + 1)
        start = self._random.randrange(pool.numel() - numel + 1)
        return pool[start : start + numel].view(like.shape)


def _narrows(source: Tensor, result: Tensor) -> bool:
    """Whether a conversion rounds: to a float of fewer bits."""
    both_float = source.is_floating_point() and result.is_floating_point()
    return both_float and torch.finfo(result.dtype).bits < torch.finfo(source.dtype).bits


def _fresh_results(func: Any, args: Any, kwargs: Any, result: Any) -> list[Tensor]:
    """The tensors that the call computed: new ones, or those that it changed in place; not views of its arguments."""
    tensors = [
        t for t in (result if isinstance(result, tuple | list) else (result,)) if isinstance(t, Tensor)
    ]
    written = {id(tensor) for tensor in written_tensors(func, args, kwargs)}
    given = {storage_key(t) for t in _flat(args) if isinstance(t, Tensor)}
    return [t for t in tensors if id(t) in written or storage_key(t) not in given]


def _flat(arguments: Sequence[Any]) -> list[Any]:
    return [x for a in arguments for x in (a if isinstance(a, tuple | list) else (a,))]


def _num_terms(name: str, args: tuple[Any, ...], results: Sequence[Tensor]) -> int:
    """How many terms make one element of the result."""
    if name in _PRODUCTS:
        return int(args[_PRODUCTS[name]].shape[-1])
    if name in ("convolution", "_convolution"):
        return math.prod(args[1].shape[1:])
    tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    if not tensors or not results:
        return 1
    largest = max(tensor.numel() for tensor in tensors)
    if name.startswith("nll_loss"):
        return max(1, tensors[0].shape[0] if tensors[0].dim() else 1)
    if "softmax" in name or "norm" in name:
        return max(t.shape[-1] if t.dim() else 1 for t in tensors)
    return max(1, largest // max(1, results[0].numel()))


# Position of the first factor among the arguments of a matrix product.
_PRODUCTS: Mapping[str, int] = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}


def _sum_scales(
    func: Any, name: str, args: tuple[Any, ...], results: Sequence[Tensor]
) -> list[Tensor | None]:
    """What a sum of cancelling terms errs by, in units of its roundoff, for each result.

    The L2 norm of the terms where they are added in a tree; the sum of their sizes and √n·|y| where one is added after the other.
    """
    none: list[Tensor | None] = [None] * len(results)
    if name in _PRODUCTS:
        first, second = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
        norms = [torch.linalg.vector_norm(t, dim=d, keepdim=True) for t, d in ((first, -1), (second, -2))]
        return [norms[0] * norms[1]]
    if name == "sum" and args[0].is_floating_point():
        dims = args[1] if len(args) > 1 and args[1] else None
        norm = torch.linalg.vector_norm(args[0], dim=dims)
        return [norm.view(results[0].shape)]
    if name == "native_layer_norm_backward":
        dims = tuple(range(args[0].dim() - len(args[2])))
        size = args[0].abs().sum(dims)
        grown = math.sqrt(args[0].numel() // max(1, size.numel()))
        return [size + grown * t.abs() if t.shape == size.shape else None for t in results]
    if name == "embedding_dense_backward":
        counts = func(torch.ones_like(args[0]), *args[1:])
        return [func(args[0].abs(), *args[1:]) + counts.sqrt() * results[0].abs()]
    if name == "convolution_backward":
        return [torch.full_like(t, float(t.square().mean().sqrt())) for t in results]
    return none
