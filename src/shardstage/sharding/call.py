"""``Call``: an op as a rule sees it, and ``LocalCall``: the same op when it is written for one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from shardstage.graph import ModelGraph, Op, Ref, refs_in, substitute
from shardstage.layout import Placement, Shard, balanced_sizes
from shardstage.sharding.cuts import Cuts
from shardstage.sharding.state import WHOLE, Placing, State

__all__ = ["Call", "LocalCall", "Place", "Rewrite", "Rule", "with_arguments"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """An op with the states of what it reads.

    ``free`` values are parameters and their transposes, which have no placement yet: they take the one that is asked of them.
    They map to (parameter, the parameter's dim for each of the value's dims).
    ``of_batch`` are the values that depend on the batch.
    """

    op: Op
    graph: ModelGraph
    states: Mapping[str, State]
    free: Mapping[str, tuple[str, tuple[int, ...]]]
    cuts: Cuts
    is_sequence_parallel: bool
    of_batch: frozenset[str]

    @property
    def num_ranks(self) -> int:
        return self.cuts.num_ranks

    def state(self, name: str) -> State:
        return self.states.get(name, State())

    def shard(self, name: str) -> Shard | None:
        return self.state(name).shard

    def shape(self, name: str) -> tuple[int, ...]:
        return self.graph.values[name].shape

    def argument(self, index: int, keyword: str, default: Any = None) -> Any:
        return argument_of(self.op, index, keyword, default)

    def name(self, index: int, keyword: str) -> str | None:
        """The value given as an argument; None where it is a literal or left out."""
        given = self.argument(index, keyword)
        return given.name if isinstance(given, Ref) else None

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.shape(next(name for name in self.op.outputs if name is not None))

    @property
    def tensors(self) -> tuple[str, ...]:
        """The values that the op reads."""
        return self.op.inputs

    @property
    def sharded(self) -> tuple[str, ...]:
        return tuple(name for name in self.op.inputs if self.shard(name) is not None)

    def whole(self, names: Sequence[str]) -> Call:
        """The same call as it is once some of its inputs are gathered."""
        return replace(self, states={k: v for k, v in self.states.items() if k not in names})

    def all_whole(self) -> Placing:
        """Every rank does the same."""
        return Placing(inputs=dict.fromkeys(self.op.inputs, WHOLE), outputs=(State(),) * len(self.op.outputs))

    def reduced(self, shape: tuple[int, ...]) -> Placement:
        """What a sum over the ranks becomes: whole, or with sequence parallelism cut along the tokens.

        Those are dim -2 of ``[batch, tokens, features]``, and dim 0 of ``[batch * tokens, features]``: one section a sample.
        """
        samples = self.graph.microbatch
        if not self.is_sequence_parallel or len(shape) not in (2, 3):
            return WHOLE
        num_tokens, num_sections = (shape[1], 1) if len(shape) == 3 else (shape[0] // samples, samples)
        if num_tokens < self.num_ranks or (len(shape) == 2 and shape[0] % samples):
            return WHOLE
        return Shard(
            dim=len(shape) - 2, sections=(balanced_sizes(num_tokens, self.num_ranks),) * num_sections
        )


@dataclass(frozen=True, kw_only=True)
class LocalCall:
    """An op to be written for ``rank``: its arguments refer to local values already.

    ``given`` are the placements of its inputs as they arrive, by the name in the whole graph; ``placing`` is the rule's decision.
    """

    op: Op
    whole_op: Op
    graph: ModelGraph
    placing: Placing
    rank: int
    num_ranks: int
    random_ordinal: int

    def given(self, name: str) -> Placement:
        return self.placing.inputs.get(name, WHOLE)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value of the whole graph."""
        return self.graph.values[name].shape

    def local_shape(self, name: str, placement: Placement) -> tuple[int, ...]:
        return local_shape(self.shape(name), placement, self.rank)

    def argument(self, index: int, keyword: str, default: Any = None) -> Any:
        """An argument in its local form."""
        return argument_of(self.op, index, keyword, default)

    def whole_name(self, index: int, keyword: str) -> str | None:
        """The value of the whole graph that is given as an argument."""
        given = argument_of(self.whole_op, index, keyword, None)
        return given.name if isinstance(given, Ref) else None

    @property
    def output_placement(self) -> Placement:
        return self.placing.outputs[0].placement

    @property
    def output_name(self) -> str:
        return next(name for name in self.whole_op.outputs if name is not None)

    @property
    def output_local_shape(self) -> tuple[int, ...]:
        return self.local_shape(self.output_name, self.output_placement)


class Place(Protocol):
    """Decides how an op runs; raises ``Reconsider`` where its inputs must be cut otherwise."""

    def __call__(self, call: Call) -> Placing: ...


Rewrite = Callable[[LocalCall], tuple[Op, ...]]
"""The ops that one rank runs in place of one op; the last one has its outputs."""


def _unchanged(call: LocalCall) -> tuple[Op, ...]:
    return (call.op,)


@dataclass(frozen=True, slots=True)
class Rule:
    """What sharding knows of a family of ops."""

    place: Place
    rewrite: Rewrite = _unchanged


def argument_of(op: Op, index: int, keyword: str, default: Any) -> Any:
    if index < len(op.args):
        return op.args[index]
    return dict(op.kwargs).get(keyword, default)


def with_arguments(op: Op, *arguments: Any, target: str | None = None) -> Op:
    """The op with other positional arguments and no keywords."""
    return replace(op, target=target or op.target, args=arguments, kwargs=())


def local_shape(shape: tuple[int, ...], placement: Placement, rank: int) -> tuple[int, ...]:
    """Shape of the part that ``rank`` holds."""
    if not isinstance(placement, Shard):
        return shape
    return (*shape[: placement.dim], placement.size(rank), *shape[placement.dim + 1 :])


def renamed(op: Op, names: Mapping[str, str]) -> Op:
    """The op with references replaced by name."""
    if not any(ref.name in names for ref in refs_in((op.args, tuple(v for _, v in op.kwargs)))):
        return op

    def swap(ref: Ref) -> Ref:
        return Ref(names.get(ref.name, ref.name))

    return replace(
        op,
        args=tuple(substitute(a, swap) for a in op.args),
        kwargs=tuple((k, substitute(v, swap)) for k, v in op.kwargs),
    )
