"""The modes under which an unmodified model runs in float64 and drops out what the ranks drop out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardstage.compat import TorchDispatchMode
from shardstage.operators import RandomState

__all__ = ["Promotion", "ReplayedDropout", "WideGroupedProducts", "in_float64"]

_NO_SAMPLE = -1
_DROPOUT, _ATTENTION = F.dropout, F.scaled_dot_product_attention
_NARROW = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Makes the model's parameters and buffers float64, and everything that its code computes in the block."""
    model.double()
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Promotion(), WideGroupedProducts():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(previous)


class Promotion(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its modes untyped
    """Gives every operator that asks for a narrower float (``.float()``, ``softmax(dtype=float32)``) float64 instead.

    Except random numbers, which are others in another dtype.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if str(func).startswith("aten.rand."):
            return func(*args, **(kwargs or {}))
        wide = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widened, args), **wide)


def _widened(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _NARROW else argument


class WideGroupedProducts(TorchFunctionMode):
    """Gives ``torch.nn.functional.grouped_mm`` of rows by expert a float64 form, for torch (2.13) has none."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_grouped = getattr(func, "__name__", "") == "_grouped_mm" and args[0].dtype == torch.float64
        return _grouped_product(*args, **(kwargs or {})) if is_grouped else func(*args, **(kwargs or {}))


def _grouped_product(rows: Tensor, weights: Tensor, *, offs: Tensor, **options: Any) -> Tensor:
    """Rows up to each of ``offs`` times the weights of that group.  rows: [N, K], weights: [G, K, M] → [N, M]"""
    groups = torch.tensor_split(rows, offs.tolist())[: len(weights)]
    products = torch.cat([group @ weight for group, weight in zip(groups, weights, strict=True)])
    return F.pad(products, (0, 0, 0, len(rows) - len(products)))  # rows of no group, as padding has


class ReplayedDropout(TorchFunctionMode):
    """Draws every dropout mask as the ranks do: by seed, step, sample and the ordinal of the call in the model's forward.

    Only the random numbers are shared with the operators of the ranks; what is done with them is written here anew. A mode does not see
    what a function of ``torch.nn.functional`` calls by itself (attention with all its projections), so their names are replaced too.
    """

    def __init__(self, random: RandomState) -> None:
        super().__init__()
        self.random = random
        self._ordinal = 0
        self._replaced = ExitStack()

    def __enter__(self) -> Self:
        for name, ours in (
            ("dropout", self._functional_dropout),
            ("scaled_dot_product_attention", self._attention),
        ):
            self._replaced.callback(setattr, F, name, getattr(F, name))
            setattr(F, name, ours)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._replaced.close()

    def begin_forward(self, positions: tuple[int, ...]) -> None:
        """Says which samples of the global batch the next forward is given."""
        self.random.positions = positions
        self._ordinal = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _DROPOUT:
            return self._functional_dropout(*args, **kwargs)
        if func is torch.dropout:
            return self._dropout(*args, **kwargs)
        if func is _ATTENTION:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _functional_dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        return self._dropout(input, p, training)

    def _dropout(self, input: Tensor, p: float, train: bool) -> Tensor:
        if not train or not p:
            return input
        ordinal, positions = self._next_ordinal(), self.random.positions
        if input.dim() and input.shape[0] % len(positions) == 0:
            shape = (input.shape[0] // len(positions), *input.shape[1:])
            drawn = torch.cat([self._kept(shape, p, ordinal, position) for position in positions])
        else:
            drawn = self._kept(tuple(input.shape), p, ordinal, _NO_SAMPLE)
        return input * drawn / (1 - p)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """softmax(q kᵀ · scale + mask), dropped, times v.  q: [B, H, S, D]"""
        if not dropout_p:
            return _ATTENTION(
                query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        ordinal, probabilities = self._next_ordinal(), scores.softmax(-1)
        shape, num_heads = tuple(scores.shape[-2:]), scores.shape[-3]
        drawn = [
            torch.stack([self._kept(shape, dropout_p, ordinal, position, head) for head in range(num_heads)])
            for position in self.random.positions
        ]
        return (probabilities * torch.stack(drawn) / (1 - dropout_p)) @ value

    def _next_ordinal(self) -> int:
        self._ordinal += 1
        return self._ordinal - 1

    def _kept(self, shape: tuple[int, ...], p: float, *key: int) -> Tensor:
        return self.random.uniforms(shape, torch.device("cpu"), *key) >= p
