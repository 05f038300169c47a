"""What an operator knows besides its arguments: the group it talks in, the state of the random numbers, where weight gradients go."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

__all__ = ["OperatorContext", "RandomState", "WeightGradients"]


@dataclass(kw_only=True)
class RandomState:
    """Says what the next random numbers depend on: never on which rank draws them.

    The owner sets ``step`` at the start of each, and ``positions`` (those of the microbatch's samples in the global batch) before each
    forward *and* before each recomputation of one.
    """

    seed: int = 0
    step: int = 0
    positions: tuple[int, ...] = ()
    _generators: dict[torch.device, torch.Generator] = field(default_factory=dict, repr=False)

    def uniforms(self, shape: tuple[int, ...], device: torch.device, *key: int) -> torch.Tensor:
        """Float32 numbers in [0, 1) that depend on seed, step, ``key`` and nothing else (and on the kind of device)."""
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device)
        generator.manual_seed(self.seed_of(*key))
        return torch.rand(shape, generator=generator, dtype=torch.float32, device=device)

    def seed_of(self, *key: int) -> int:
        """A 63-bit number that depends on seed, step and ``key``, equal in every process."""
        return _stable_hash(self.seed, self.step, *key)


Accumulate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""``accumulate(weight, left, right)`` adds ``left @ right``, ``[weight.shape[0], k] @ [k, weight.shape[1]]``, to the gradient."""


@dataclass(kw_only=True)
class WeightGradients:
    """Where the gradients of weights go. Who owns the parameters sets ``accumulate``; ``None`` leaves them to autograd.

    While ``deferred`` is a list, products are put there for ``run`` instead of being computed.
    """

    accumulate: Accumulate | None = None
    deferred: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = field(default=None, repr=False)

    def add(self, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """Takes a product that is a summand of the weight's gradient."""
        assert self.accumulate is not None
        if self.deferred is None:
            self.accumulate(weight, left, right)
        else:
            self.deferred.append((weight, left.detach(), right.detach()))

    def run(self, products: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        """Computes deferred products, each freed when it is done."""
        if not products:
            return
        assert self.accumulate is not None
        with torch.no_grad():
            while products:
                self.accumulate(*products.pop())


@dataclass(frozen=True, kw_only=True)
class OperatorContext:
    """The tensor-parallel group of this rank (None where it is alone), the random numbers of its engine, where weight gradients go.

    ``may_overwrite`` lets reductions work in place on what the op before made for them. It must be False where some results are kept
    for a recomputation (selective recompute), as those must not change. ``device_kind`` is what operators are to be quick on: a dry run's
    tensors lie on none.
    """

    tp_group: dist.ProcessGroup | None
    tp_rank: int
    tp_size: int
    random: RandomState
    may_overwrite: bool = True
    device_kind: str = "cpu"
    compute_capability: float | None = None
    weights: WeightGradients = field(default_factory=WeightGradients)


def _stable_hash(*words: int) -> int:
    """A 63-bit number, equal in every process."""
    digest = hashlib.blake2b(b"".join(w.to_bytes(8, "little", signed=True) for w in words), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1
