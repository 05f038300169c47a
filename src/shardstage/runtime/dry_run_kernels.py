"""``cuda_kernels``: operators that keep on a CUDA device what they do not keep on the CPU, for a dry run's tensors, which have no data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from shardstage.graph.attention import ATTENTION
from shardstage.graph.saved_on import attention_kernel, is_fused

__all__ = ["cuda_kernels"]


def cuda_kernels(capability: float | None = None) -> Mapping[str, Callable[..., Any]]:
    """By target: operators that allocate and keep what CUDA's kernels do, and compute nothing (``graph.saved_on`` has the table).

    ``capability`` is CUDA's compute capability (None: 8.0 or more).
    """
    return MappingProxyType({"aten.rms_norm.default": _rms_norm, ATTENTION: partial(_attention, capability)})


def _attention(
    capability: float | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,
    **keywords: Any,
) -> Tensor:
    shapes = (query.shape, key.shape, value.shape)
    kernel = attention_kernel(*shapes, _name(query), has_mask=attn_mask is not None, capability=capability)
    learns = attn_mask is not None and attn_mask.requires_grad
    if kernel == "written out" or learns:
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(query, key, value, attn_mask, *rest, **keywords)
    if query.shape[-1] == value.shape[-1]:  # a CPU's kernel keeps the same
        return scaled_dot_product_attention(query, key, value, attn_mask, *rest, **keywords)
    bias = attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.empty_like(attn_mask, dtype=query.dtype)
    found: Tensor = _EfficientAttention.apply(query, key, value, bias)  # type: ignore[no-untyped-call]  # torch has no types for it
    return found


class _EfficientAttention(Function):
    """Keeps q [b, h, s, d], k [b, h, t, d], v [b, h, t, e], what is added to scores, the result and the logarithm of each row's sum."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = query.shape
        result = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        rows = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, result, rows)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.saved_tensors[:3], ctx.needs_input_grad[:3], strict=True)
        return (*(torch.empty_like(tensor) if is_wanted else None for tensor, is_wanted in wanted), None)


def _rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dtypes = [_name(tensor) for tensor in (x, weight) if tensor is not None]
    if not is_fused(dtypes[0], dtypes[-1]):
        return torch.rms_norm(x, list(normalized_shape), weight, eps)
    found: Tensor = _FusedRmsNorm.apply(x, weight, len(normalized_shape))  # type: ignore[no-untyped-call]  # torch has no types for it
    return found


class _FusedRmsNorm(Function):
    """Keeps x [.., h], weight [h] and 1 / rms [.., 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, num_dims: int) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        reciprocal_rms = x.new_empty((*x.shape[:-num_dims], *(1,) * num_dims), dtype=dtype)
        ctx.save_for_backward(x, weight, reciprocal_rms)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        wanted = zip((x, weight), ctx.needs_input_grad[:2], strict=True)
        return (*(torch.empty_like(tensor) if is_wanted else None for tensor, is_wanted in wanted), None)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
