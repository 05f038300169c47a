"""All ranks of a sharded graph in one process, op by op, with collectives over lists in place of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardstage.graph import ModelGraph, Ref
from shardstage.layout import Placement, Shard
from shardstage.operators import OperatorContext, RandomState, library
from shardstage.operators.moves import intervals_of, take
from shardstage.operators.resolve import literal, resolve
from shardstage.sharding import Sharding, localize

POSITIONS = (5, 2, 9)
"""Of the three samples of every batch in the global batch."""

Lists = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Loss, and gradients by fqn, as one device would have them."""

    loss: Tensor
    gradients: Mapping[str, Tensor]


def run_whole(graph: ModelGraph, state: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Outcome:
    """One device."""
    parameters = _leaves(graph, {p.fqn: state[p.fqn] for p in graph.parameters})
    env = _environment(graph, parameters, state, batch)
    _run_in_lockstep([graph], [env], [library(_context(0, 1))])
    loss = env[graph.output]
    loss.backward()
    return Outcome(loss=loss.detach(), gradients=_gradients(parameters))


def run_sharded(sharding: Sharding, state: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Outcome:
    """All ranks; every rank's loss and every replicated gradient must agree, and shards are put together."""
    n = sharding.num_ranks
    graphs = [localize(sharding, rank) for rank in range(n)]
    fqns = {p.name: p.fqn for p in sharding.graph.parameters}
    parameters = []
    for rank, graph in enumerate(graphs):
        held = {fqn: _part(state[fqn], sharding.parameters[fqn], rank) for fqn in fqns.values()}
        assert all(graph.values[name].shape == held[fqn].shape for name, fqn in fqns.items())
        parameters.append(_leaves(graph, held))
    envs = [_environment(g, p, state, batch) for g, p in zip(graphs, parameters, strict=True)]
    _run_in_lockstep(graphs, envs, [library(_context(rank, n)) for rank in range(n)])
    losses = [env[graphs[0].output] for env in envs]
    torch.autograd.backward(losses, [torch.ones_like(loss) for loss in losses])
    for loss in losses:
        torch.testing.assert_close(loss, losses[0], rtol=1e-12, atol=1e-12)
    gradients = put_together([_gradients(p) for p in parameters], sharding)
    return Outcome(loss=losses[0].detach(), gradients=gradients)


def put_together(gradients: Sequence[Mapping[str, Tensor]], sharding: Sharding) -> dict[str, Tensor]:
    """Gradients of whole parameters from those of each rank."""
    return {
        fqn: _whole_gradient([part[fqn] for part in gradients], placement, fqn)
        for fqn, placement in sharding.parameters.items()
        if fqn in gradients[0]
    }


def assert_same(found: Outcome, expected: Outcome, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found.loss, expected.loss, rtol=tolerance, atol=tolerance)
    for fqn, gradient in expected.gradients.items():
        scale = float(gradient.abs().max()) if gradient.numel() else 0.0
        torch.testing.assert_close(
            found.gradients[fqn],
            gradient,
            rtol=0,
            atol=tolerance * max(1.0, scale),
            msg=lambda text, fqn=fqn: f"gradient of {fqn}: {text}",
        )


def _context(rank: int, size: int) -> OperatorContext:
    random = RandomState(seed=11, step=3, positions=POSITIONS)
    return OperatorContext(tp_group=None, tp_rank=rank, tp_size=size, random=random)


def _leaves(graph: ModelGraph, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    needs = {p.fqn: graph.values[p.name].requires_grad for p in graph.parameters}
    return {fqn: t.detach().clone().requires_grad_(needs[fqn]) for fqn, t in held.items()}


def _environment(
    graph: ModelGraph,
    parameters: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
) -> dict[str, Any]:
    env: dict[str, Any] = dict(batch)
    env.update({p.name: parameters[p.fqn] for p in graph.parameters})
    env.update({b.name: state[b.fqn].clone() for b in graph.buffers})
    for constant in graph.constants:
        value = graph.values[constant.name]
        elements = torch.tensor(constant.elements, dtype=getattr(torch, value.dtype))
        env[constant.name] = elements.reshape(value.shape)
    return env


def _run_in_lockstep(
    graphs: Sequence[ModelGraph],
    envs: Sequence[dict[str, Any]],
    libraries: Sequence[Mapping[str, Callable[..., Any]]],
) -> None:
    assert len({tuple(op.name for op in graph.ops) for graph in graphs}) == 1
    for ops in zip(*(graph.ops for graph in graphs), strict=True):
        calls = [_arguments(op, env) for op, env in zip(ops, envs, strict=True)]
        target = ops[0].target
        if target in TOGETHER:
            results = TOGETHER[target](calls)
        else:
            results = [
                (own[op.target] if op.target in own else resolve(op.target))(*args, **kwargs)
                for op, own, (args, kwargs) in zip(ops, libraries, calls, strict=True)
            ]
        for op, graph, env, result in zip(ops, graphs, envs, results, strict=True):
            for name, tensor in zip(op.outputs, result if op.returns_sequence else (result,), strict=True):
                if name is not None:
                    env[name] = tensor
                    assert tensor.shape == graph.values[name].shape, (op.name, name)


def _arguments(op: Any, env: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    def real(argument: Any) -> Any:
        if isinstance(argument, Ref):
            return env[argument.name]
        if isinstance(argument, tuple):
            items = [real(item) for item in argument]
            return items if not op.target.startswith("shardstage") else tuple(items)
        return literal(argument)

    return [real(a) for a in op.args], {key: real(item) for key, item in op.kwargs}


def _part(tensor: Tensor, placement: Placement, rank: int) -> Tensor:
    return take(tensor, placement.dim, placement.intervals(rank)) if isinstance(placement, Shard) else tensor


def _gradients(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        fqn: torch.zeros_like(p) if p.grad is None else p.grad
        for fqn, p in parameters.items()
        if p.requires_grad
    }


def _whole_gradient(parts: Sequence[Tensor], placement: Placement, fqn: str) -> Tensor:
    if isinstance(placement, Shard):
        shape = list(parts[0].shape)
        shape[placement.dim] = placement.length
        whole = parts[0].new_zeros(shape)
        for rank, part in enumerate(parts):
            held = 0
            for start, stop in placement.intervals(rank):
                piece = part.narrow(placement.dim, held, stop - start)
                whole.narrow(placement.dim, start, stop - start).copy_(piece)
                held += stop - start
        return whole
    if placement.has_partial_grad:  # type: ignore[union-attr]
        return torch.stack(list(parts)).sum(0)
    for part in parts:
        torch.testing.assert_close(part, parts[0], rtol=1e-9, atol=1e-9, msg=f"{fqn} differs between ranks")
    return parts[0]


class _Linked(torch.autograd.Function):
    """A function of all ranks' tensors whose backward is given too."""

    @staticmethod
    def forward(ctx: Any, forward: Lists, backward: Lists, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run = backward
        return tuple(t.clone() for t in forward(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return (None, None, *(g.clone() for g in ctx.run(gradients)))


def _linked(
    forward: Callable[..., Lists], backward: Callable[..., Lists]
) -> Callable[[list[Any]], list[Tensor]]:
    def call(calls: list[Any]) -> list[Tensor]:
        cut = calls[0][0][1:]
        tensors = [args[0] for args, _ in calls]
        return list(_Linked.apply(forward(*cut), backward(*cut), *tensors))

    return call


def _identity(*_cut: Any) -> Lists:
    return list


def _sum(*_cut: Any) -> Lists:
    return lambda tensors: [torch.stack(list(tensors)).sum(0)] * len(tensors)


def _gather(dim: int, sections: Any) -> Lists:
    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        pieces: list[Tensor] = []
        for k in range(len(sections)):
            for rank, tensor in enumerate(tensors):
                before = sum(section[rank] for section in sections[:k])
                pieces.append(tensor.narrow(dim, before, sections[k][rank]))
        return [torch.cat(pieces, dim)] * len(tensors)

    return run


def _take(dim: int, sections: Any) -> Lists:
    return lambda tensors: [take(t, dim, intervals_of(sections, rank)) for rank, t in enumerate(tensors)]


def _reduce_scatter(dim: int, sections: Any) -> Lists:
    return lambda tensors: _take(dim, sections)(_sum()(tensors))


def _cross_entropy(calls: list[Any]) -> list[Tensor]:
    logits = [args[0] for args, _ in calls]
    _, labels, _, ignored = calls[0][0]
    widths = [t.shape[1] for t in logits]

    def loss(tensors: Sequence[Tensor]) -> Tensor:
        return F.cross_entropy(torch.cat(list(tensors), 1), labels, reduction="sum", ignore_index=ignored)

    def forward(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [loss(tensors)] * len(tensors)

    def backward(gradients: Sequence[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            whole = torch.cat([t.detach() for t in logits], 1).requires_grad_()
            (gradient,) = torch.autograd.grad(loss([whole]), whole, gradients[0])
        return list(gradient.split(widths, 1))

    return list(_Linked.apply(forward, backward, *logits))


TOGETHER: Mapping[str, Callable[[list[Any]], list[Tensor]]] = {
    "shardstage.sum_gradient": _linked(_identity, _sum),
    "shardstage.all_reduce": _linked(_sum, _identity),
    "shardstage.all_gather": _linked(_gather, _reduce_scatter),
    "shardstage.gather_whole": _linked(_gather, _take),
    "shardstage.slice": _linked(_take, _gather),
    "shardstage.reduce_scatter": _linked(_reduce_scatter, _gather),
    "shardstage.cross_entropy": _cross_entropy,
}
