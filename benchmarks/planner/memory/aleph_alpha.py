"""A rank's part of LLaMA as Aleph Alpha's library ``scaling`` computes it, operator by operator, on tensors without memory.

    embedding → ( norm → attention → + → norm → gated MLP → + ) × layers → norm → head → logits gathered over tp → loss

Which results are copied, kept and gathered follows core/nn/attention, core/nn/mlp.py, core/nn/norm, core/nn/linear/utils.py and
transformer/model of github.com/Aleph-Alpha/scaling; collectives are stood in for by what they allocate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

__all__ = ["Embedding", "Head", "Layer", "LocalShape", "recomputed"]


@dataclass(frozen=True, kw_only=True)
class LocalShape:
    """Sizes of one tensor-parallel rank: its heads and its part of the MLP; ``vocab`` is whole.

    ``attention``: its kernel. "torch" is a softmax in float32, "fused" one that takes and gives half precision; both are assumptions:
    the runs' configuration was not published, nor was the fused kernel.
    """

    hidden: int
    heads: int
    head_dim: int
    ffn_hidden: int
    vocab: int
    tp: int
    is_sequence_parallel: bool
    attention: Literal["torch", "fused", "flash-1", "flash-2"]
    has_fused_norm: bool


def recomputed(unit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The unit under activation checkpointing, which runs all of it again (activation_checkpointing.py)."""

    def run(x: Tensor) -> Tensor:
        with set_checkpoint_early_stop(False):
            made: Tensor = checkpoint(unit, x, use_reentrant=False, preserve_rng_state=False)
        return made

    return run


class Embedding(nn.Module):
    """Tokens [b, s] to [b, s, h]: rows of other ranks are zeroes, then all are summed."""

    def __init__(self, shape: LocalShape) -> None:
        super().__init__()
        self.shape = shape
        self.weight = _weight(shape.vocab // shape.tp, shape.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        found = F.embedding(tokens, self.weight)
        if self.shape.tp > 1:
            found = found.masked_fill_((tokens == 0).unsqueeze(-1), 0.0)
        return _scattered(found, self.shape) if self.shape.is_sequence_parallel else found


class Layer(nn.Module):
    """One decoder layer: [b, s, h] to [b, s, h], of s / tp positions where sequence parallelism says so."""

    def __init__(self, shape: LocalShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.heads * shape.head_dim
        self.norms = nn.ParameterList([_weight(shape.hidden), _weight(shape.hidden)])
        self.query_key_value = _weight(3 * width, shape.hidden)
        self.dense = _weight(shape.hidden, width)
        self.up, self.gate = (_weight(shape.ffn_hidden, shape.hidden) for _ in range(2))
        self.down = _weight(shape.hidden, shape.ffn_hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self._attended(_norm(x, self.norms[0], self.shape)) + x
        return self._gated(_norm(x, self.norms[1], self.shape)) + x

    def _attended(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        projected = F.linear(x, self.query_key_value)
        projected = projected.view(b, s, self.shape.heads, -1).transpose(0, 1)  # [s, b, heads, 3 d]
        query, key, value = torch.split(projected, self.shape.head_dim, dim=-1)
        query, key = _rotated(query), _rotated(key)
        if self.shape.attention.startswith("flash"):
            made = _flash(query, key, value, self.shape)  # [b heads, s, d]
        else:
            made = _written_out(query, key, value, self.shape)
        made = made.view(b, self.shape.heads, s, -1).transpose(1, 2).reshape(b, s, -1)
        return self._out(F.linear(made, self.dense))

    def _gated(self, x: Tensor) -> Tensor:
        up = F.linear(x, self.up)
        gate = F.linear(x, self.gate)
        product = F.silu(up) * gate
        return self._out(F.linear(product, self.down))

    def _out(self, partial_sum: Tensor) -> Tensor:
        return _scattered(partial_sum, self.shape) if self.shape.is_sequence_parallel else partial_sum


class Head(nn.Module):
    """The last norm, the head and the loss: a scalar. ``logits`` are held on to by the pipeline's buffers; what a communication was given
    or made is in ``communicated`` until the host has waited for the device: its stream was recorded, and the host is far ahead."""

    def __init__(self, shape: LocalShape, *, is_recomputed: bool) -> None:
        super().__init__()
        self.shape = shape
        self.logits: list[Tensor] = []
        self.communicated: list[Tensor] = []
        self.norm = _weight(shape.hidden)
        self.weight = _weight(shape.vocab // shape.tp, shape.hidden)
        run = recomputed if is_recomputed else lambda unit: unit
        self.normed, self.projected = run(self._normed), run(self._projected)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.projected(self.normed(x))
        self.logits.append(logits)
        return self._loss(logits)

    def _normed(self, x: Tensor) -> Tensor:
        return _norm(x, self.norm, self.shape)

    def _projected(self, x: Tensor) -> Tensor:
        part = F.linear(x, self.weight)
        return _applied(_Concatenated, part, self.shape.tp, self.communicated) if self.shape.tp > 1 else part

    def _loss(self, logits: Tensor) -> Tensor:
        """Of every token; the hit rate is counted while the logits in float32 are there."""
        wide = logits.float().reshape(-1, logits.shape[-1])
        targets = torch.zeros(wide.shape[0], dtype=torch.int64, device="meta")
        loss = F.cross_entropy(wide, targets, reduction="none").sum()
        (wide.argmax(-1) == targets).float().sum()
        return loss


def _weight(*sizes: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(sizes, dtype=torch.bfloat16, device="meta"))


def _norm(x: Tensor, weight: Tensor, shape: LocalShape) -> Tensor:
    """As LLaMA's code computes it, or FlashAttention's kernel for it; sequence parallelism gathers the positions of what it gives."""
    if shape.has_fused_norm:
        made = _applied(_FusedNorm, x, weight)
    else:
        wide = x.float()
        made = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x) * weight
    return _applied(_Gathered, made, shape.tp) if shape.is_sequence_parallel else made


def _rotated(x: Tensor) -> Tensor:
    """x [s, b, heads, d] with its halves turned; cosines and sines are those of each sample's positions."""
    s, b, _, d = x.shape
    cos, sin = (torch.empty((s, b, 1, d), dtype=x.dtype, device="meta") for _ in range(2))
    first, second = x[..., : d // 2], x[..., d // 2 :]
    return (x * cos) + (torch.cat((-second, first), dim=-1) * sin)


def _written_out(query: Tensor, key: Tensor, value: Tensor, shape: LocalShape) -> Tensor:
    """All scores at once (attention.py, multi_head_attention): what it names lives until it returns."""
    s, b, heads, _ = query.shape
    q, k, v = (each.reshape(s, b * heads, -1) for each in (query, key, value))
    scores = torch.empty((b * heads, s, s), dtype=q.dtype, device="meta")
    scores = torch.baddbmm(scores, q.transpose(0, 1), k.permute(1, 2, 0), beta=0.0)
    by_head = scores.view(b, heads, s, s)
    mask = _mask(b, s)
    if shape.attention == "fused":
        weights = _applied(_FusedSoftmax, by_head)
    else:
        weights = _masked_softmax(by_head, mask)
    weights = weights.view(b * heads, s, s)
    return torch.bmm(weights, v.transpose(0, 1))


def _mask(b: int, s: int) -> Tensor:
    """[b, 1, s, s] of booleans, made anew in each layer."""
    blocks = [torch.ones((s, s), dtype=torch.bool, device="meta").clone() for _ in range(b)]
    return ~torch.tril(torch.stack(blocks)).unsqueeze(1)


def _masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """masked_softmax.py: a copy in float32 is masked in place."""
    masked = scores.float()
    masked.masked_fill_(mask, -10_000.0)
    weights = torch.softmax(masked, dim=-1)
    return weights.to(scores.dtype)


def _flash(query: Tensor, key: Tensor, value: Tensor, shape: LocalShape) -> Tensor:
    s, b, heads, d = query.shape
    q, k, v = (each.transpose(0, 1).reshape(b * s, heads, d) for each in (query, key, value))
    made = _applied(_Flash, q, k, v, shape.attention == "flash-1")
    return made.view(b, s, heads, d).transpose(1, 2).reshape(b * heads, s, d)


def _scattered(x: Tensor, shape: LocalShape) -> Tensor:
    return _applied(_Scattered, x.contiguous(), shape.tp)


def _applied(function: type[torch.autograd.Function], *given: object) -> Tensor:
    made: Tensor = function.apply(*given)  # type: ignore[no-untyped-call]  # torch has no types for it
    return made


class _Flash(torch.autograd.Function):
    """FlashAttention of sequences one after another: q, k, v, the result and a number a row are kept.

    Its backward adds the gradient of q up in float32; its first version also keeps a result in float32 while it goes over the keys.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_first_version: bool) -> Tensor:
        wide = torch.empty(q.shape, dtype=torch.float32, device="meta") if is_first_version else None
        made = torch.empty_like(q, memory_format=torch.contiguous_format)
        rows = torch.empty(q.shape[:2], dtype=torch.float32, device="meta")
        del wide
        ctx.save_for_backward(q, k, v, made, rows)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, rows = ctx.saved_tensors
        wide = torch.empty(q.shape, dtype=torch.float32, device="meta")
        sums = torch.empty_like(rows)
        made = tuple(torch.empty_like(each, memory_format=torch.contiguous_format) for each in (q, k, v))
        del wide, sums
        return *made, None


class _FusedSoftmax(torch.autograd.Function):
    """Scale, mask and softmax in one kernel; its gradient overwrites the one it gets."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        weights = torch.empty_like(scores)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (_,) = ctx.saved_tensors
        return gradients[0].view_as(gradients[0])


class _FusedNorm(torch.autograd.Function):
    """Keeps its input and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32, device="meta"))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _Gathered(torch.autograd.Function):
    """All positions of all ranks; their gradients are summed and scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: int) -> Tensor:
        ctx.tp = tp
        return _positions(x, times=tp)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _positions(gradients[0].contiguous(), parts=ctx.tp), None


class _Scattered(torch.autograd.Function):
    """The sum over ranks of this rank's positions; gradients of all positions are gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: int) -> Tensor:
        ctx.tp = tp
        return _positions(x, parts=tp)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _positions(gradients[0].contiguous(), times=ctx.tp), None


def _positions(x: Tensor, *, times: int = 1, parts: int = 1) -> Tensor:
    b, s, h = x.shape
    return torch.empty((b, s * times // parts, h), dtype=x.dtype, device="meta")


class _Concatenated(torch.autograd.Function):
    """Parts of the vocabulary gathered in a list and concatenated; torch gathers a list into a buffer of its own first."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, tp: int, communicated: list[Tensor]) -> Tensor:
        ctx.tp = tp
        parts = [part, *(torch.empty_like(part) for _ in range(tp - 1))]
        flat = torch.empty(tp * part.numel(), dtype=part.dtype, device="meta")
        communicated += [*parts, flat]
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].chunk(ctx.tp, dim=-1)[0].contiguous(), None, None
