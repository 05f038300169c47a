"""``Stage``: one rank's part of the model as a module that runs blocks of local ops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from shardstage.graph.cuts import Segment
from shardstage.graph.named_modules import Part, recompute_parts
from shardstage.graph.recompute import StageRecompute
from shardstage.operators import OperatorContext
from shardstage.runtime.block import Block
from shardstage.runtime.block_code import BlockCode, BlockParts, BlockWriter
from shardstage.runtime.leaves import ParameterInfo

__all__ = ["Stage", "build_stage"]


class Stage(nn.Module):
    """Runs its blocks one after the other on named values.

    Holds the parameters that several blocks use and all buffers; a block holds its own parameters. ``parameters_by_name`` lists
    every parameter once with what is known about it.
    """

    def __init__(
        self,
        *,
        index: int,
        infos: Mapping[str, ParameterInfo],
        buffer_fqns: Mapping[str, str],
        outputs: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.index = index
        self.infos = dict(infos)
        self.buffer_fqns = dict(buffer_fqns)
        self.outputs = outputs
        self.blocks = nn.ModuleList()
        self._codes: list[Mapping[int, BlockParts]] = []
        self._last_uses: dict[int, tuple[tuple[str, ...], ...]] = {}

    def add(self, block: Block, codes: Mapping[int, BlockParts]) -> None:
        self.blocks.append(block)
        self._codes.append(codes)
        self._last_uses.clear()

    def forward(
        self, size: int, positions: tuple[int, ...], values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The values that others need (``outputs``) for a microbatch of ``size`` samples at ``positions`` of the global batch."""
        known = dict(values)
        if size not in self._last_uses:
            self._last_uses[size] = self._find_last_uses(size)
        last_use = self._last_uses[size]
        for number, (block, codes) in enumerate(zip(self.blocks, self._codes, strict=True)):
            code = codes[size]
            results = block(size, positions, tuple(known[name] for name in code.inputs))
            known.update(zip(code.outputs, results, strict=True))
            for name in last_use[number]:
                known.pop(name, None)
        return {name: known[name] for name in self.outputs}

    def num_summands(self, name: str) -> int:
        """How often one backward adds to a parameter's gradient: once for each product with it, and once for all that autograd sums."""
        codes = [by_size[next(iter(by_size))] for by_size in self._codes]
        by_autograd = any(name in code.others for code in codes)
        return sum(code.products.count(name) for code in codes) + by_autograd

    def parameters_by_name(self) -> dict[str, tuple[nn.Module, nn.Parameter]]:
        """Every parameter once: graph value name → (the module that holds it, the parameter)."""
        return {
            name: (module, parameter)
            for module in (self, *self.blocks)
            for name, parameter in module._parameters.items()
            if parameter is not None
        }

    def set_buffer(self, name: str, tensor: Tensor) -> None:
        """Gives a buffer its value, in the dtype of the graph."""
        held = self.get_buffer(name)
        self._buffers[name] = tensor.to(held.dtype)

    def _find_last_uses(self, size: int) -> tuple[tuple[str, ...], ...]:
        last: dict[str, int] = {}
        for number, codes in enumerate(self._codes):
            last.update(dict.fromkeys((*codes[size].inputs, *codes[size].outputs), number))
        kept = set(self.outputs)
        return tuple(
            tuple(name for name, number in last.items() if number == at and name not in kept)
            for at in range(len(self._codes))
        )


def build_stage(
    segments: Mapping[int, Segment],
    infos: Mapping[str, ParameterInfo],
    *,
    context: OperatorContext,
    writer: BlockWriter,
    recompute: StageRecompute,
    parameter_dtype: torch.dtype | None,
    modules: Sequence[str] = (),
) -> Stage:
    """The stage with its parameters and buffers on meta.

    ``segments`` hold the same ops for every size of microbatch. ``parameter_dtype`` overrides the dtype of floating parameters (master
    weights where FSDP2 casts them itself). Only layers are recomputed, or of selective ones the ``modules`` alone: the embedding and the
    head with its loss keep their few, large activations.
    """
    first = next(iter(segments.values()))
    blocks = first.blocks
    outputs = _stage_outputs(first)
    buffer_fqns = {buffer.name: buffer.fqn for buffer in first.graph.buffers}
    stage = Stage(index=first.index, infos=infos, buffer_fqns=buffer_fqns, outputs=outputs)
    codes = [
        {size: _block(segment, parts, outputs, writer) for size, segment in segments.items()}
        for parts in recompute_parts(first.graph, blocks, recompute, modules)
    ]
    uses = Counter(name for by_size in codes for name in by_size[next(iter(by_size))].parameters)
    _hold_shared(stage, first, uses, parameter_dtype)
    for block, by_size in zip(blocks, codes, strict=True):
        own = {
            name: _meta_parameter(first, name, parameter_dtype)
            for name in by_size[next(iter(by_size))].parameters
            if uses[name] == 1 and first.graph.values[name].kind == "parameter"
        }
        stage.add(
            Block(
                name=block.module,
                codes=by_size,
                own=own,
                shared=stage,
                context=context,
            ),
            by_size,
        )
    return stage


def _hold_shared(stage: Stage, segment: Segment, uses: Mapping[str, int], dtype: torch.dtype | None) -> None:
    for name, count in uses.items():
        value = segment.graph.values[name]
        if value.kind == "buffer":
            tensor = torch.empty(value.shape, dtype=getattr(torch, value.dtype), device="meta")
            stage.register_buffer(name, tensor)
        elif count > 1:
            stage.register_parameter(name, _meta_parameter(segment, name, dtype))


def _meta_parameter(segment: Segment, name: str, dtype: torch.dtype | None) -> nn.Parameter:
    value = segment.graph.values[name]
    own_dtype: torch.dtype = getattr(torch, value.dtype)
    chosen = dtype if dtype is not None and own_dtype.is_floating_point else own_dtype
    return nn.Parameter(
        torch.empty(value.shape, dtype=chosen, device="meta"), requires_grad=value.requires_grad
    )


def _block(
    segment: Segment, parts: Sequence[Part], stage_outputs: tuple[str, ...], writer: BlockWriter
) -> BlockParts:
    """Code of a block that these parts tile; its outputs are what later blocks read and what leaves the stage."""
    codes = [_code(segment, part.start, part.stop, stage_outputs, writer) for part in parts]
    read_later = {name for op in segment.graph.ops[parts[-1].stop :] for name in op.inputs}
    outputs = (name for code in codes for name in code.outputs)
    return BlockParts.of(
        codes,
        [part.mode for part in parts],
        tuple(name for name in outputs if name in read_later or name in stage_outputs),
    )


def _code(
    segment: Segment, start: int, stop: int, stage_outputs: tuple[str, ...], writer: BlockWriter
) -> BlockCode:
    """Code of the ops[start:stop]; its outputs are what later ones read and what leaves the stage."""
    graph = segment.graph
    read_later = {name for op in graph.ops[stop:] for name in op.inputs}
    outputs = tuple(
        name
        for op in graph.ops[start:stop]
        for name in op.outputs
        if name is not None and (name in read_later or name in stage_outputs)
    )
    return writer.code(graph, graph.ops[start:stop], outputs)


def _stage_outputs(segment: Segment) -> tuple[str, ...]:
    """What the stage sends, and the loss where it makes it."""
    sent = tuple(dict.fromkeys(edge.value for edge in segment.sends))
    has_loss = segment.graph.output in segment.graph.producer
    return (*sent, segment.graph.output) if has_loss else sent
