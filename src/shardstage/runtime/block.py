"""``Block``: consecutive ops of a stage as one module: the unit of recompute, of parameter sharding and of compilation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from shardstage.graph.saved import SELECTIVE_TARGETS
from shardstage.operators import OperatorContext
from shardstage.runtime.block_code import BlockCode, BlockParts, PartCode

__all__ = ["Block"]


class Block(nn.Module):
    """Runs its ops on local tensors.

    The parameters that only this block uses are its own (``self.<value name>``); those it shares with other blocks are read from
    ``shared``, where the stage holds them. With recompute, only the inputs of a part (full) or those and the results of its matrix
    products (selective) are kept for backward.
    """

    def __init__(
        self,
        *,
        name: str,
        codes: Mapping[int, BlockParts],
        own: Mapping[str, nn.Parameter],
        shared: nn.Module,
        context: OperatorContext,
    ) -> None:
        super().__init__()
        self.block_name = name
        self._codes = dict(codes)
        self._shared = (shared,)  # in a tuple: not a submodule, its parameters are not this block's
        self._context = context
        for value, parameter in own.items():
            self.register_parameter(value, parameter)

    def forward(
        self, size: int, positions: tuple[int, ...], inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Outputs for a microbatch of ``size`` samples that stand at ``positions`` of the global batch."""
        code = self._codes[size]
        known = dict(zip(code.inputs, inputs, strict=True))
        for part in code.parts:
            results = self._part(part, positions, tuple(known[name] for name in part.code.inputs))
            known.update(zip(part.code.outputs, results, strict=True))
            for name in part.last_used:
                known.pop(name, None)
        return tuple(known[name] for name in code.outputs)

    def outputs(self, size: int) -> tuple[str, ...]:
        """Names of the values that ``forward`` returns for a microbatch of ``size`` samples."""
        return self._codes[size].outputs

    def _part(
        self, part: PartCode, positions: tuple[int, ...], inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        if part.recompute == "none" or not torch.is_grad_enabled():
            return self._run(part.code, positions, inputs)
        outputs: tuple[Tensor, ...] = checkpoint(
            self._run,
            part.code,
            positions,
            inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=_selective_contexts if part.recompute == "selective" else _no_contexts,
        )
        return outputs

    def _run(
        self, code: BlockCode, positions: tuple[int, ...], inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        self._context.random.positions = positions  # again when recomputed, under a later microbatch
        return code.function(*(self._parameter(name) for name in code.parameters), *inputs)

    def _parameter(self, name: str) -> Tensor:
        own = self._parameters.get(name)
        if own is not None:
            return own
        shared = self._shared[0]
        return shared.get_parameter(name) if name in shared._parameters else shared.get_buffer(name)


_SAVED_OPS = frozenset(SELECTIVE_TARGETS)


def _keep_matrix_products(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    is_kept = str(op) in _SAVED_OPS
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _no_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), nullcontext()


_selective_contexts = partial(create_selective_checkpoint_contexts, _keep_matrix_products)
