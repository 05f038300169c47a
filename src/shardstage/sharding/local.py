"""``localize``: the graph that one tensor-parallel rank runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from shardstage.graph import ModelGraph, Op, Ref, Value
from shardstage.layout import Partial, Placement, Replicate, Shard
from shardstage.sharding.call import LocalCall, local_shape, renamed
from shardstage.sharding.kept import kept_of
from shardstage.sharding.rules import is_random, rewrite_of
from shardstage.sharding.shard import needed_placement
from shardstage.sharding.sharding import Conversion, Sharding
from shardstage.sharding.state import SUMMED, WHOLE, Placing

__all__ = ["localize"]


def localize(sharding: Sharding, rank: int) -> ModelGraph:
    """The local graph of ``rank``: local shapes, the same op names, and between them the ops that ranks talk by.

    An inserted op is called after the op it serves: ``linear_3@all_reduce``. It has the output of that op where it follows it, so that
    every value of the whole graph keeps its name.
    """
    writer = _Writer(sharding=sharding, rank=rank, values=_local_values(sharding, rank))
    before: dict[str, list[Conversion]] = {}
    for conversion in sharding.conversions:
        before.setdefault(conversion.anchor, []).append(conversion)
    ordinal = 0
    for op in sharding.graph.ops:
        for conversion in before.get(op.name, ()):
            writer.convert(conversion)
        writer.write(op, ordinal)
        ordinal += is_random(op)
    return replace(sharding.graph, ops=tuple(writer.ops), values=writer.values)


def _local_values(sharding: Sharding, rank: int) -> dict[str, Value]:
    values = dict(sharding.graph.values)
    for name, value in sharding.graph.values.items():
        shape = local_shape(value.shape, sharding.placements[name], rank)
        if shape != value.shape:
            values[name] = replace(value, shape=shape)
    return values


@dataclass(kw_only=True)
class _Writer:
    """Ops and values of the local graph as they are written."""

    sharding: Sharding
    rank: int
    values: dict[str, Value]
    ops: list[Op] = field(default_factory=list)
    converted: dict[tuple[str, Placement], str] = field(default_factory=dict)

    def convert(self, conversion: Conversion) -> None:
        """Inserts what brings a value from one placement to another."""
        name, target = conversion.value, conversion.target
        source = self.converted.get((name, conversion.source), name)
        value = self.sharding.graph.values[name]
        kind, arguments = _conversion_call(conversion, self.rank, has_gradient=value.requires_grad)
        if kind == "sum_gradient":
            arguments = (self._is_gradient_fresh(name),)
        made = self._unique(f"{conversion.anchor}@{kind}")
        self.converted[name, target] = made
        is_view = kind in ("sum_gradient", "slice", "narrow")
        self.values[made] = replace(
            value,
            name=made,
            kind="activation",
            shape=local_shape(value.shape, target, self.rank),
            alias_of=(value.alias_of or source) if is_view else "",
        )
        anchor = self._anchor(conversion.anchor)
        self._insert(anchor, made, kind, (Ref(source), *arguments), made)

    def write(self, op: Op, ordinal: int) -> None:
        """The op in its local form, and after it the reduction of partial sums."""
        placing = self.sharding.placings[op.name]
        names = {n: self._arriving(n, placing) for n in op.inputs if n in placing.inputs}
        local = renamed(op, {a: b for a, b in names.items() if a != b})
        rewrite = rewrite_of(op)
        if rewrite is not None and (is_random(op) or self._is_cut(placing)):
            call = LocalCall(
                op=local,
                whole_op=op,
                graph=self.sharding.graph,
                placing=placing,
                rank=self.rank,
                num_ranks=self.sharding.num_ranks,
                random_ordinal=ordinal,
            )
            *before, local = rewrite(call)
            for extra in before:
                self._add_extra(extra, op)
        saved = self._saved(op, local, placing, names)
        local = local if saved == local.saved else replace(local, saved=saved)
        is_partial = any(isinstance(state.placement, Partial) for state in placing.outputs)
        if is_partial and not placing.is_deferred:
            self._reduce(op, local, placing)
        else:
            self.ops.append(local)

    def _reduce(self, op: Op, local: Op, placing: Placing) -> None:
        """``op → partial``, ``op@all_reduce → …``, and the bias last."""
        output = op.outputs[0]
        assert output is not None
        value = self.sharding.graph.values[output]
        partial = f"{op.name}@partial"
        self.values[partial] = replace(value, name=partial)
        self.ops.append(replace(local, outputs=(partial,)))
        is_last = not placing.bias
        reduced = output if is_last else f"{op.name}@reduced"
        kind, arguments = _reduction_call(placing.reduced)
        if not is_last:
            self.values[reduced] = replace(self.values[output], name=reduced)
        self._insert(op, f"{op.name}@{kind}", kind, (Ref(partial), *arguments), reduced)
        if not is_last:
            bias = self._arriving(placing.bias, placing)
            self.ops.append(
                replace(
                    op,
                    name=f"{op.name}@bias",
                    target="aten.add.Tensor",
                    args=(Ref(reduced), Ref(bias)),
                    kwargs=(),
                    saved=(),
                )
            )

    def _insert(self, anchor: Op, name: str, kind: str, args: tuple[object, ...], output: str) -> None:
        self.ops.append(
            replace(
                anchor,
                name=name,
                target=f"shardstage.{kind}",
                args=args,
                kwargs=(),
                outputs=(output,),
                returns_sequence=False,
                saved=(),
            )
        )

    def _add_extra(self, extra: Op, op: Op) -> None:
        """An op that a rule writes before its own: heads are picked from its first argument."""
        source = extra.args[0]
        assert isinstance(source, Ref)
        value = self.values[source.name]
        dim, picked = extra.args[1], extra.args[2]
        shape = (*value.shape[:dim], len(picked), *value.shape[dim + 1 :])
        self.values[extra.name] = replace(value, name=extra.name, shape=shape, alias_of="", kind="activation")
        self.ops.append(replace(extra, module=op.module, module_type=op.module_type, source=op.source))

    def _arriving(self, name: str, placing: Placing) -> str:
        """The value that an op reads in place of one of the whole graph."""
        needed = needed_placement(self.sharding.graph, name, placing.inputs[name])
        if needed == self.sharding.placements[name]:
            return name
        return self.converted[name, needed]

    def _is_cut(self, placing: Placing) -> bool:
        states = (*placing.inputs.values(), *(s.placement for s in placing.outputs))
        return any(not isinstance(placement, Replicate) for placement in states)

    def _saved(self, op: Op, local: Op, placing: Placing, names: Mapping[str, str]) -> tuple[str, ...]:
        """What autograd keeps of the local op."""
        kept = kept_of(local, self.values)
        own = [name for name in op.saved if self.sharding.graph.values[name].kind == "saved"]
        if kept is None:
            self._rescale(own, placing)
            return tuple(names.get(name, name) for name in op.saved)
        inputs, made = kept
        for name in own:
            del self.values[name]
        self.values.update({value.name: value for value in made})
        return (*inputs, *(value.name for value in made))

    def _rescale(self, names: Iterable[str], placing: Placing) -> None:
        """Gives what autograd keeps of an op the sizes of the op's output or inputs, dim by dim.

        A product of more than three dims keeps its inputs with all but the last two dims in one.
        """
        placements = (*(s.placement for s in placing.outputs), *placing.inputs.values())
        sizes = {(p.dim, p.length): p.size(self.rank) for p in placements if isinstance(p, Shard)}
        for name, placement in placing.inputs.items():
            batch = self.sharding.graph.values[name].shape[:-2]
            if isinstance(placement, Shard) and placement.dim < len(batch) and len(batch) > 1:
                folded = prod(batch)
                sizes.setdefault((0, folded), folded // placement.length * placement.size(self.rank))
        for name in names:
            value = self.values[name]
            shape = tuple(sizes.get((dim, size), size) for dim, size in enumerate(value.shape))
            self.values[name] = replace(value, shape=shape)

    def _is_gradient_fresh(self, name: str) -> bool:
        """Whether the gradient of the summed value is nobody else's: products make a new one."""
        graph = self.sharding.graph
        readers = [graph.ops[index] for index in graph.consumers[name]]
        asking = [op for op in readers if self.sharding.placings[op.name].inputs.get(name) == SUMMED]
        return all(op.target in _PRODUCTS for op in asking)

    def _anchor(self, name: str) -> Op:
        return self._ops_by_name[name]

    def _unique(self, name: str) -> str:
        taken = self.values
        if name not in taken:
            return name
        return next(f"{name}_{i}" for i in range(1, len(taken)) if f"{name}_{i}" not in taken)

    def __post_init__(self) -> None:
        self._ops_by_name: Mapping[str, Op] = {op.name: op for op in self.sharding.graph.ops}


_PRODUCTS = (
    "aten.linear.default", "aten.addmm.default", "aten.mm.default", "aten.matmul.default", "aten.bmm.default",
)  # fmt: skip


def _conversion_call(
    conversion: Conversion, rank: int, *, has_gradient: bool
) -> tuple[str, tuple[object, ...]]:
    """Name and further arguments of the operator that makes a conversion."""
    match conversion.source, conversion.target:
        case Replicate(has_partial_grad=False), Replicate(has_partial_grad=True):
            return "sum_gradient", ()
        case Shard() as source, Replicate(has_partial_grad=is_summed):
            kind = "all_gather" if is_summed or not has_gradient else "gather_whole"
            return kind, (source.dim, source.sections)
        case Replicate(has_partial_grad=is_summed), Shard() as target:
            if is_summed or not has_gradient:
                return "narrow", (target.dim, target.intervals(rank))
            return "slice", (target.dim, target.sections)
    raise AssertionError(f"no conversion from {conversion.source} to {conversion.target}")


def _reduction_call(reduced: Placement) -> tuple[str, tuple[object, ...]]:
    if isinstance(reduced, Shard):
        return "reduce_scatter", (reduced.dim, reduced.sections)
    assert reduced == WHOLE
    return "all_reduce", ()
