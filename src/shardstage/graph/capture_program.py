"""``graph_of``: an exported program as a ``ModelGraph``, under the model's own names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from shardstage.errors import CaptureError
from shardstage.graph.capture_replay import TensorMeta, annotate
from shardstage.graph.model_graph import Constant, ModelGraph, Parameter, Value
from shardstage.graph.normalise import normalise

__all__ = ["StoredNames", "graph_of"]

# A tensor written into code that has more elements than this belongs into a buffer.
_LARGEST_CONSTANT = 1 << 20

_Kind = Literal["input", "parameter", "buffer", "constant"]


@dataclass(frozen=True, kw_only=True)
class StoredNames:
    """The names under which a model holds each parameter and buffer: the first of them stands for the tensor."""

    first: Mapping[str, str]
    ties: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, model: nn.Module) -> StoredNames:
        names: dict[int, list[str]] = {}
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            names.setdefault(id(tensor), []).append(name)
        return cls(
            first={name: group[0] for group in names.values() for name in group},
            ties={group[0]: tuple(group[1:]) for group in names.values()},
        )


def graph_of(
    program: torch.export.ExportedProgram,
    stored: StoredNames,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    prefix: str,
    microbatch: int,
    sequence: int | None,
) -> ModelGraph:
    """The program's graph; ``model`` lies at ``prefix`` of what was exported, and ``batch`` is its only input.

    Raises CaptureError where the program is no list of operators that ends in a scalar with a gradient.
    """
    placeholders = _Placeholders(stored)
    signature = program.graph_signature
    for placeholder, name in zip(signature.user_inputs, batch, strict=True):
        placeholders.add(str(placeholder), "input", name, batch[name])
    for placeholder, path in signature.inputs_to_parameters.items():
        fqn = stored.first[path.removeprefix(f"{prefix}.")]
        placeholders.add(placeholder, "parameter", fqn, model.get_parameter(fqn))
    for placeholder, path in signature.inputs_to_buffers.items():
        fqn = stored.first[path.removeprefix(f"{prefix}.")]
        placeholders.add(placeholder, "buffer", fqn, model.get_buffer(fqn))
    for placeholder, key in signature.inputs_to_lifted_tensor_constants.items():
        placeholders.add(placeholder, "constant", key, program.constants[key])
    traced, output = normalise(program.graph_module, placeholders.names, prefix)
    ops, made, output = annotate(traced, placeholders.metas, output)
    read = {name for op in ops for name in op.inputs}
    kept = {n: v for n, v in placeholders.values.items() if n in read or v.kind in ("input", "parameter")}
    _require_loss(made.get(output))
    return ModelGraph(
        ops=ops,
        values={**kept, **made},
        inputs=tuple(batch),
        parameters=placeholders.listed("parameter", kept),
        buffers=placeholders.listed("buffer", kept),
        constants=tuple(
            placeholders.constant(name) for name, value in kept.items() if value.kind == "constant"
        ),
        output=output,
        microbatch=microbatch,
        sequence=sequence,
    )


class _Placeholders:
    """What the traced graph reads from outside, under names that hold across captures."""

    def __init__(self, stored: StoredNames) -> None:
        self.names: dict[str, str] = {}
        self.values: dict[str, Value] = {}
        self.metas: dict[str, TensorMeta] = {}
        self._stored = stored
        self._tensors: dict[str, Tensor] = {}
        self._fqns: dict[str, str] = {}

    def add(self, placeholder: str, kind: _Kind, fqn: str, tensor: Tensor) -> None:
        name = self._name(kind, fqn)
        meta = TensorMeta.of(tensor)
        meta = replace(meta, requires_grad=meta.requires_grad and kind == "parameter")
        self.names[placeholder] = name
        self.metas[name], self._tensors[name], self._fqns[name] = meta, tensor, fqn
        self.values[name] = Value(
            name=name, shape=meta.shape, dtype=meta.dtype, kind=kind, requires_grad=meta.requires_grad
        )

    def listed(self, kind: _Kind, kept: Mapping[str, Value]) -> tuple[Parameter, ...]:
        return tuple(
            Parameter(name=name, fqn=self._fqns[name], ties=self._stored.ties[self._fqns[name]])
            for name, value in kept.items()
            if value.kind == kind
        )

    def constant(self, name: str) -> Constant:
        tensor = self._tensors[name]
        if tensor.numel() > _LARGEST_CONSTANT:
            raise CaptureError(
                f"the model's code holds a tensor of shape {tuple(tensor.shape)} that is neither parameter nor buffer",
                hint="self.register_buffer(..., persistent=False)",
            )
        return Constant(name=name, elements=tuple(tensor.detach().flatten().tolist()))

    def _name(self, kind: _Kind, fqn: str) -> str:
        """``p_lm_head_weight`` for lm_head.weight; inputs keep their names."""
        plain = fqn if kind == "input" else f"{kind[0]}_{fqn.replace('.', '_')}"
        name, number = plain, 1
        while name in self._fqns and self._fqns[name] != fqn:
            name, number = f"{plain}_{number}", number + 1
        return name


def _require_loss(loss: Value | None) -> None:
    if loss is None or loss.shape != () or not loss.requires_grad:
        found = "no tensor of the graph" if loss is None else f"a tensor of shape {loss.shape}"
        raise CaptureError(
            f"the loss must be a scalar that depends on the parameters, and is {found}",
            hint='cross_entropy(..., reduction="sum")',
        )
