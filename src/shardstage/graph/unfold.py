"""``ShortGraph``: a deep model captured with few of its equal layers, and the graph of the whole model made from that.

    layers kept    0 | 1 | 2 | 94→3 | 95→4         lead 0, before 1, repeated 2, after 3, rest 4
    unfold         0 | 1 | 2 | 3 4 5 … 93 | 94 | 95

The repeated layer is written out ``copies`` times more, under the names that a capture of the whole model gives. That is only right where
layer 3 is to layer 2 what layer 2 is to layer 1: the same calls on the same sizes, every value read from the layer before or from what all
layers share, every parameter of its own. ``unfold`` proves this op by op and refuses what is otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from shardstage.errors import CaptureError
from shardstage.graph.model_graph import Constant, ModelGraph, Op, Parameter, Ref, Value, substitute

__all__ = ["Repeat", "ShortGraph", "unfold"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeat:
    """In the list of layers at ``path``, members ``first <= i < first + period`` stand for ``copies`` more periods after them."""

    path: str
    first: int
    period: int
    copies: int

    def member(self, path: str) -> int | None:
        """Which member of the list a module or parameter belongs to; None outside of it."""
        if not path.startswith(f"{self.path}."):
            return None
        number = path[len(self.path) + 1 :].partition(".")[0]
        return int(number) if number.isdigit() else None

    def moved(self, path: str, periods: int) -> str:
        """The same place that many periods further down the list."""
        member = self.member(path)
        if member is None:
            return path
        old = f"{self.path}.{member}"
        return f"{self.path}.{member + periods * self.period}{path[len(old) :]}"


@dataclass(frozen=True, kw_only=True)
class ShortGraph:
    """A graph of a model without the layers that ``repeats`` bring back, list by list."""

    graph: ModelGraph
    repeats: tuple[Repeat, ...] = ()

    def unfold(self) -> ModelGraph:
        """The whole model's graph. Raises CaptureError where its layers do not repeat."""
        graph = self.graph
        for repeat in self.repeats:
            graph = unfold(graph, repeat)
        return graph


def unfold(graph: ModelGraph, repeat: Repeat) -> ModelGraph:
    """The graph with the repeated layers of one list written out. Raises CaptureError where they cannot stand for others."""
    return _Unfolding(graph, repeat).graph()


class _Unfolding:
    """Ops ``[start, stop)`` are the repeated period; the period after it, as long, proves what a step down the list changes."""

    def __init__(self, graph: ModelGraph, repeat: Repeat) -> None:
        self._graph = graph
        self._repeat = repeat
        starts: dict[int, int] = {}
        for index, op in enumerate(graph.ops):
            member = repeat.member(op.module)
            if member is not None:
                starts.setdefault(member, index)
        if not {repeat.first, repeat.first + repeat.period} <= starts.keys():
            raise self._unlike("a layer has no operators")
        self._start, self._stop = starts[repeat.first], starts[repeat.first + repeat.period]
        self._length = self._stop - self._start
        self._listed_from = min(starts.values())
        self._fqns = {p.name: p.fqn for p in (*graph.parameters, *graph.buffers)}
        self._elements = {c.name: c.elements for c in graph.constants}
        self._made_at = graph.producer
        self._after = self._names_after()
        self._steps: dict[str, int] = {}  # by how much a step down the list raises the number in a name
        self._twins: dict[
            str, str
        ] = {}  # of what a layer reads as its own, or of the layer before: what the next reads
        self._fixed: set[str] = set()  # what all layers read alike
        self._compare()
        self._check_readers()

    def graph(self) -> ModelGraph:
        graph, last = self._graph, self._repeat.copies
        period = graph.ops[self._start : self._stop]
        ops = list(graph.ops[: self._stop])
        tables = [self._names_in(periods) for periods in range(1, last + 1)]
        for periods, names in enumerate(tables, start=1):
            ops.extend(self._copied(period, periods, names))
        ops.extend(self._shifted(op) for op in graph.ops[self._stop :])
        unfolded = replace(
            graph,
            ops=tuple(ops),
            values={value.name: value for value in self._values(tables)},
            parameters=tuple(self._listed(graph.parameters)),
            buffers=tuple(self._listed(graph.buffers)),
            constants=tuple(self._constants()),
            output=self._read_after(graph.output),
        )
        if len(unfolded.producer) != sum(name is not None for op in ops for name in op.outputs):
            raise self._unlike("two values would have one name")
        return unfolded

    def _names_after(self) -> set[str]:
        """Values that belong to ops and layers beyond the repeated period."""
        ops, values = self._graph.ops, self._graph.values
        before = {name for op in ops[: self._stop] for name in (*op.inputs, *op.saved)}
        names = {name for op in ops[self._stop :] for name in op.outputs if name is not None}
        for op in ops[self._stop :]:
            names.update(
                name
                for name in (*op.inputs, *op.saved)
                if values[name].kind in ("constant", "saved") and name not in before
            )
        end = self._repeat.first + self._repeat.period
        return names | {name for name, fqn in self._fqns.items() if (self._repeat.member(fqn) or 0) >= end}

    def _compare(self) -> None:
        """Every op of the repeated period with the op as far into the period after it."""
        ops = self._graph.ops[self._start : self._stop]
        after = self._graph.ops[self._stop : self._stop + self._length]
        if len(after) < len(ops):
            raise self._unlike("a layer has fewer operators than the one before")
        for op, other in zip(ops, after, strict=True):
            is_same_call = (op.target, op.module_type, op.source) == (
                other.target,
                other.module_type,
                other.source,
            )
            if not is_same_call or self._repeat.moved(op.module, 1) != other.module:
                raise self._unlike(f"{op.name} and {other.name} differ")
            self._learn_step(op.name, other.name)
            self._pair(_content(op), _content(other))

    def _pair(self, argument: Any, other: Any) -> None:
        if isinstance(argument, Ref) and isinstance(other, Ref):
            self._pair_values(argument.name, other.name)
        elif isinstance(argument, tuple) and isinstance(other, tuple) and len(argument) == len(other):
            for a, b in zip(argument, other, strict=True):
                self._pair(a, b)
        elif type(argument) is not type(other) or repr(argument) != repr(other):
            raise self._unlike(f"{argument!r} and {other!r} differ")

    def _pair_values(self, name: str, other: str) -> None:
        if name == other:
            self._fixed.add(name)
            return
        if name in self._twins:
            if self._twins[name] != other:
                raise self._unlike(f"{name} is {self._twins[name]} and {other} to the next layer")
            return
        a, b = self._graph.values[name], self._graph.values[other]
        alike = (a.shape, a.dtype, a.kind, a.requires_grad) == (b.shape, b.dtype, b.kind, b.requires_grad)
        if not alike or not self._is_next(a, other):
            raise self._unlike(f"what {name} is to one layer, {other} is not to the next")
        self._twins[name] = other
        if a.alias_of != b.alias_of:
            self._pair(*(Ref(v.alias_of) if v.alias_of else None for v in (a, b)))

    def _is_next(self, value: Value, other: str) -> bool:
        """Whether ``other`` is to the next layer what the value is to the repeated one: its own, or of the layer before."""
        name = value.name
        if name in self._fqns:
            return other in self._fqns and self._repeat.moved(self._fqns[name], 1) == self._fqns[other]
        if value.kind in ("constant", "saved"):
            self._learn_step(name, other)
            return self._elements.get(name) == self._elements.get(other)
        at = self._made_at.get(name, -1)
        if at >= self._start:
            self._learn_step(name, other)
        return at >= self._start - self._length and self._made_at.get(other) == at + self._length

    def _learn_step(self, name: str, other: str) -> None:
        (base, number, rest), (other_base, other_number, other_rest) = _split(name), _split(other)
        step = self._steps.setdefault(base, other_number - number)
        if (base, rest) != (other_base, other_rest) or other_number - number != step:
            raise self._unlike(f"{name} and {other} are not called alike")

    def _check_readers(self) -> None:
        """Nothing but the next layer reads what a layer has made, and no one outside what the layers share."""
        for index, op in enumerate(self._graph.ops[self._stop :], start=self._stop):
            reach = self._start if index < self._stop + self._length else self._stop
            is_layer = self._repeat.member(op.module) is not None
            for name in (*op.inputs, *op.saved):
                at = self._made_at.get(name, -1)
                is_shared = is_layer and name in self._fixed
                if self._listed_from <= at < reach and not is_shared:
                    raise self._unlike(f"{op.name} reads {name} of a layer far before it")

    def _names_in(self, periods: int) -> dict[str, str]:
        """What the repeated period reads and makes, as it is called in the one that many periods further down."""
        return {
            name: self._renamed(name, periods)
            if self._is_own(name)
            else self._renamed(twin, periods - 1)  # in this period, as the value is in the one before
            for name, twin in self._twins.items()
        }

    def _is_own(self, name: str) -> bool:
        return self._made_at.get(name, self._start) >= self._start

    def _copied(self, period: Sequence[Op], periods: int, names: Mapping[str, str]) -> Iterator[Op]:
        """The ops of the repeated period, that many periods further down."""
        refs = {name: Ref(renamed) for name, renamed in names.items()}
        modules = {module: self._repeat.moved(module, periods) for module in {op.module for op in period}}
        for op in period:
            name = self._renamed(op.name, periods)
            yield _rewritten(op, names, refs, name=name, module=modules[op.module])

    def _shifted(self, op: Op) -> Op:
        """An op beyond the repeated period, as the whole model has it."""
        module = op.module
        if (self._repeat.member(module) or 0) >= self._repeat.first:
            module = self._repeat.moved(module, self._repeat.copies)
        names = {name: self._read_after(name) for name in (*op.inputs, *op.outputs, *op.saved) if name}
        refs = {name: Ref(names[name]) for name in op.inputs}
        return _rewritten(op, names, refs, name=self._renamed(op.name, self._repeat.copies), module=module)

    def _read_after(self, name: str) -> str:
        is_last = name in self._twins and self._made_at.get(name, -1) >= self._start
        return self._renamed(name, self._repeat.copies) if is_last or name in self._after else name

    def _renamed(self, name: str, periods: int) -> str:
        if name in self._fqns:
            return _stored_name(name, self._fqns[name], self._repeat.moved(self._fqns[name], periods))
        base, number, rest = _split(name)
        step = self._steps.get(base, 0)
        return f"{base}_{number + periods * step}{rest}" if step else name

    def _values(self, tables: Sequence[Mapping[str, str]]) -> Iterator[Value]:
        values = self._graph.values
        own = [values[name] for name in self._twins if self._is_own(name)]
        yield from (value for name, value in values.items() if name not in self._after)
        for names in tables:
            for value in own:
                yield _called(value, names[value.name], names.get(value.alias_of, value.alias_of))
        for name in filter(self._after.__contains__, values):
            alias = values[name].alias_of
            yield _called(
                values[name],
                self._renamed(name, self._repeat.copies),
                self._read_after(alias) if alias else "",
            )

    def _listed(self, stored: Sequence[Parameter]) -> Iterator[Parameter]:
        """Parameters in the order of the whole model, where a list's members lie one after the other."""
        repeat, is_written = self._repeat, False
        own: list[Parameter] = []
        for item in stored:
            member = repeat.member(item.fqn)
            is_own = member is not None and repeat.first <= member < repeat.first + repeat.period
            if is_own and item.ties:
                raise self._unlike(f"{item.fqn} is tied to {', '.join(item.ties)}")
            if own and not is_own and not is_written:
                yield from (self._stored(p, n) for n in range(1, repeat.copies + 1) for p in own)
                is_written = True
            if is_own:
                own.append(item)
            yield self._stored(item, repeat.copies) if item.name in self._after else item

    def _stored(self, item: Parameter, periods: int) -> Parameter:
        ties = tuple(self._repeat.moved(tie, periods) for tie in item.ties)
        return Parameter(
            name=self._renamed(item.name, periods), fqn=self._repeat.moved(item.fqn, periods), ties=ties
        )

    def _constants(self) -> Iterator[Constant]:
        own = [c for c in self._graph.constants if c.name in self._twins]
        yield from (c for c in self._graph.constants if c.name not in self._after)
        for periods in range(1, self._repeat.copies + 1):
            yield from (replace(c, name=self._renamed(c.name, periods)) for c in own)
        for c in self._graph.constants:
            if c.name in self._after:
                yield replace(c, name=self._renamed(c.name, self._repeat.copies))

    def _unlike(self, reason: str) -> CaptureError:
        return CaptureError(
            f"the layers of {self._repeat.path} cannot stand for each other: {reason}",
            hint="capture the whole model",
        )


def _content(op: Op) -> tuple[Any, ...]:
    names = tuple(None if name is None else Ref(name) for name in (*op.outputs, *op.saved))
    return op.args, op.kwargs, names, len(op.outputs)


def _called(value: Value, name: str, alias_of: str) -> Value:
    return Value(
        name=name,
        shape=value.shape,
        dtype=value.dtype,
        kind=value.kind,
        requires_grad=value.requires_grad,
        alias_of=alias_of,
    )


def _rewritten(op: Op, names: Mapping[str, str], refs: Mapping[str, Ref], *, name: str, module: str) -> Op:
    """The op with other values; those that are not in ``names`` and ``refs`` stay."""

    def fix(ref: Ref) -> Ref:
        return refs.get(ref.name, ref)

    return Op(
        name=name,
        target=op.target,
        args=substitute(op.args, fix),
        kwargs=substitute(op.kwargs, fix) if op.kwargs else (),
        outputs=tuple([output and names.get(output, output) for output in op.outputs]),
        returns_sequence=op.returns_sequence,
        module=module,
        module_type=op.module_type,
        source=op.source,
        saved=tuple([names.get(saved, saved) for saved in op.saved]),
    )


@cache
def _split(name: str) -> tuple[str, int, str]:
    """``split_with_sizes_13.0`` → ("split_with_sizes", 13, ".0"): the tracer numbers the calls of an operator."""
    found = _NUMBERED.match(name)
    return (name, 0, "") if found is None else (found[1], int(found[2]), found[3])


_NUMBERED = re.compile(r"(.*?)_(\d+)((?:_\d+)*(?:[.#].*)?)$")


def _stored_name(name: str, fqn: str, moved: str) -> str:
    """The name of a parameter or buffer after its ``fqn`` became ``moved``."""
    if not name.endswith(fqn.replace(".", "_")):
        raise CaptureError(f"{name} is not named after {fqn}", hint="capture the whole model")
    return f"{name.removesuffix(fqn.replace('.', '_'))}{moved.replace('.', '_')}"
