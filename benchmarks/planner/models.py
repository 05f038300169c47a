"""Decoders as published runs computed them: which kernels ran, which were written out, in plain PyTorch.

    embed → ( norm → attention → + → norm → MLP → + ) × layers → norm → head → cross-entropy in float32

``Kernels`` says what of that was one kernel in the framework of a run. It is what a reader of the framework's code can see, never a number
fitted to its times. One module serves all sizes: a row's model is captured with few layers and unfolded (``published.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

__all__ = ["Decoder", "Kernels", "Shape", "mixtral"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a decoder; ``mlp_mats`` is 3 where the MLP is gated. Each token goes to ``per_token`` of ``experts`` such MLPs."""

    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    mlp_mats: int
    is_tied: bool
    experts: int = 0
    per_token: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """What ran as one kernel: all of attention (flash), its scale, mask and softmax, or none of these; the norm or its parts.

    ``flash-1`` and ``flash-triton`` are FlashAttention before its second version, which compute the same more slowly, ``cudnn`` is that
    of cuDNN, on Hopper a quicker one.
    """

    attention: Literal["flash", "flash-1", "flash-triton", "cudnn", "fused-softmax", "written-out"] = "flash"
    norm: Literal["layer", "rms", "eager-rms"] = "layer"
    is_rotary: bool = False
    dropout: float = 0.0
    has_bias: bool = True


class Decoder(nn.Module):
    """tokens [b, s], labels [b, s] → the summed loss."""

    def __init__(self, shape: Shape, kernels: Kernels, sequence: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab, shape.hidden)
        self.positions = None if kernels.is_rotary else nn.Embedding(sequence, shape.hidden)
        self.layers = nn.ModuleList(_Layer(shape, kernels) for _ in range(shape.layers))
        self.norm = _norm(kernels, shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        self.dropout = kernels.dropout
        self.head_dim, self.is_written_out = shape.head_dim, kernels.attention == "written-out"
        if shape.is_tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)  # [b, s, h]
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        angles = None
        if self.positions is not None:
            x = x + self.positions(places)
        else:
            angles = _angles(places, self.head_dim).to(x.dtype)
        if self.dropout:
            x = F.dropout(x, self.dropout)
        ahead = None
        if self.is_written_out:
            ahead = torch.ones(len(places), len(places), dtype=torch.bool, device=places.device).triu(1)
        for layer in self.layers:
            x = layer(x, angles, ahead)
        logits: Tensor = self.head(self.norm(x))  # [b, s, v]
        return logits


class _Layer(nn.Module):
    def __init__(self, shape: Shape, kernels: Kernels) -> None:
        super().__init__()
        self.attention_norm = _norm(kernels, shape.hidden)
        self.attention = _Attention(shape, kernels)
        self.mlp_norm = _norm(kernels, shape.hidden)
        self.mlp = (_Gated if shape.mlp_mats == 3 else _Plain)(shape, kernels)
        self.dropout = kernels.dropout

    def forward(self, x: Tensor, angles: Tensor | None, ahead: Tensor | None) -> Tensor:
        x = x + self._dropped(self.attention(self.attention_norm(x), angles, ahead))
        return x + self._dropped(self.mlp(self.mlp_norm(x)))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout else x


class _Attention(nn.Module):
    """One product makes q, k and v, group by group of heads: [b, s, groups × (heads a group + 2) × d]."""

    def __init__(self, shape: Shape, kernels: Kernels) -> None:
        super().__init__()
        self.groups, self.head_dim = shape.kv_heads, shape.head_dim
        self.per_group = shape.heads // shape.kv_heads
        width = shape.kv_heads * (self.per_group + 2) * shape.head_dim
        self.qkv = nn.Linear(shape.hidden, width, bias=kernels.has_bias)
        self.out = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=kernels.has_bias)
        self.is_flash = kernels.attention.startswith(("flash", "cudnn"))
        self.dropout = kernels.dropout

    def forward(self, x: Tensor, angles: Tensor | None, ahead: Tensor | None) -> Tensor:
        """``ahead`` [s, s] is true where a position may not look; None where a kernel knows."""
        b, s, _ = x.shape
        grouped = self.qkv(x).view(b, s, self.groups, self.per_group + 2, self.head_dim)
        queries, k, v = grouped.split((self.per_group, 1, 1), dim=3)
        q = queries.reshape(b, s, -1, self.head_dim).transpose(1, 2)
        k, v = (each.squeeze(3).transpose(1, 2) for each in (k, v))  # [b, groups, s, d]
        if angles is not None:
            q, k = _rotated(q, angles), _rotated(k, angles)
        if self.is_flash:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.per_group > 1)
        else:
            y = self._written_out(q, k, v, ahead)
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(b, s, -1))
        return mixed

    def _written_out(self, q: Tensor, k: Tensor, v: Tensor, ahead: Tensor | None) -> Tensor:
        if self.per_group > 1:
            k, v = (each.repeat_interleave(self.per_group, dim=1) for each in (k, v))
        scores = q @ k.transpose(-1, -2)  # [b, a, s, s]
        if ahead is None:  # one kernel scales, masks and normalises
            weights = torch.softmax(scores, dim=-1)
        else:
            masked = (scores * self.head_dim**-0.5).masked_fill(ahead, -1e4)
            weights = torch.softmax(masked.float(), dim=-1).to(q.dtype)
        if self.dropout:
            weights = F.dropout(weights, self.dropout)
        return weights @ v


class _Plain(nn.Module):
    def __init__(self, shape: Shape, kernels: Kernels) -> None:
        super().__init__()
        self.up = nn.Linear(shape.hidden, shape.ffn_hidden, bias=kernels.has_bias)
        self.down = nn.Linear(shape.ffn_hidden, shape.hidden, bias=kernels.has_bias)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return made


class _Gated(nn.Module):
    def __init__(self, shape: Shape, kernels: Kernels) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.hidden, shape.ffn_hidden, bias=False)
        self.up = nn.Linear(shape.hidden, shape.ffn_hidden, bias=False)
        self.down = nn.Linear(shape.ffn_hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return made


class _EagerRms(nn.Module):
    """As LLaMA's first public code wrote it: six kernels in float32."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _norm(kernels: Kernels, hidden: int) -> nn.Module:
    if kernels.norm == "layer":
        return nn.LayerNorm(hidden)
    return nn.RMSNorm(hidden) if kernels.norm == "rms" else _EagerRms(hidden)


def _angles(places: Tensor, head_dim: int) -> Tensor:
    """cos and sin of the rotary positions: [2, s, d / 2]."""
    rates = 10_000.0 ** -(torch.arange(0, head_dim, 2, device=places.device) / head_dim)
    turned = places[:, None] * rates[None]
    return torch.stack((turned.cos(), turned.sin()))


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """x [b, a, s, d] with its halves turned."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles[0], angles[1]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def mixtral(shape: Shape) -> nn.Module:
    """A decoder of gated experts, as ``transformers`` has it."""
    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn_hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_hidden_layers=shape.layers,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.per_token,
        vocab_size=shape.vocab,
        use_cache=False,
    )
    return MixtralForCausalLM(config)
