"""What a Program means, by running it on symbols: an oracle that shares nothing with ``verify``.

Every rank is run on its own. A value is the number of an expression: what it was made of, by whom. Two programs mean the same if they leave
the same expressions in every rank's parameters and losses, and nothing in the air.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from shardstage.program import Collective, Instruction, Program

__all__ = ["Broken", "meaning"]

Wait = Callable[[], bool]


class Broken(Exception):
    """A rank cannot go on, or reads what is not there."""


class _World:
    """What ranks share: the names of expressions, messages in the air, collectives under way."""

    def __init__(self, program: Program, *, is_fully_sharded: bool) -> None:
        self.program = program
        self.is_fully_sharded = is_fully_sharded
        self.names: dict[Any, int]
        self.air: dict[tuple[Any, ...], tuple[Any, int]] = {}
        self.rounds: dict[tuple[Any, ...], dict[int, tuple[Collective, tuple[int, ...]]]] = {}
        self.turns: Counter[tuple[int, str]] = Counter()

    def group(self, rank: int, axis: str) -> tuple[int, ...]:
        mesh = self.program.mesh
        if axis == "world":
            return tuple(range(mesh.world_size))
        if axis in ("dp", "tp"):
            return mesh.group(rank, axis)  # type: ignore[arg-type]
        dp, tp = mesh.coordinate(rank, "dp"), mesh.coordinate(rank, "tp")
        ranks = tuple(mesh.rank(pp=int(pp), dp=dp, tp=tp) for pp in axis.removeprefix("tie").split("+"))
        if rank not in ranks:
            raise Broken("not in the group")
        return ranks


class _Rank:
    def __init__(self, world: _World, rank: int, names: dict[Any, int]) -> None:
        self.world, self.rank, self.names = world, rank, names
        self.program = program = world.program
        mesh = program.mesh
        self.pp, self.dp, self.tp = (mesh.coordinate(rank, axis) for axis in ("pp", "dp", "tp"))
        self.stages = program.stages_of(self.pp)
        self.parameters = [p for p in program.parameters if set(p.stages) & set(self.stages)]
        self.count = -1
        self.losses: Counter[int] = Counter()
        self.received: dict[tuple[int, int], dict[tuple[str, int], int]] = {}
        self.outputs: dict[tuple[int, int], int] = {}
        self.arrived: dict[tuple[int, int], Counter[Any]] = {}
        self.input_gradients: dict[tuple[int, int], dict[tuple[str, int], int]] = {}
        self.products: dict[tuple[int, int], int] = {}
        self.gradients: dict[str, Counter[int]] = {p.fqn: Counter() for p in self.parameters}
        self.pending: dict[str, Counter[int]] = {p.fqn: Counter() for p in self.parameters}
        self.scattered: set[str] = set()
        self.whole: dict[int, Counter[str]] = {}
        self.values = {p.fqn: self.name("initial", p.fqn, self.tp) for p in self.parameters}
        self.has_stepped = 0

    def name(self, *expression: Any) -> int:
        return self.names.setdefault(expression, len(self.names))

    def run(self) -> Iterator[Wait]:
        for instruction in self.program.row_of(self.rank).instructions:
            yield from self._act(instruction)

    def left(self) -> Any:
        """The rank's part of the program's meaning."""
        return (
            self.values,
            self.losses,
            self.has_stepped,
            {key: value for key, value in self.received.items() if value},
            {key: value for key, value in self.input_gradients.items() if value},
            {key: value for key, value in self.arrived.items() if value},
            self.outputs,
            self.products,
            {key: value for key, value in self.pending.items() if value},
            sorted(self.whole),
        )

    def _act(self, i: Instruction) -> Iterator[Wait]:
        match i.kind:
            case "COUNT":
                (summed,) = (yield from self._chain([self.name("targets", self.dp)], i)) or (0,)
                self.count = summed
            case "F":
                yield from self._forward(i)
            case "B" | "I":
                yield from self._backward(i)
            case "W":
                self._weights(i)
            case "SEND_F" | "SEND_B":
                self._send(i)
            case "RECV_F" | "RECV_B":
                yield from self._receive(i)
            case "UNSHARD":
                whole: Counter[str] = Counter()
                yield from self._computation(i, 0, whole)
                self.whole[_number(i.stage)] = whole
            case "RESHARD":
                self.whole.pop(_number(i.stage), None)
            case "REDUCE_GRAD":
                yield from self._reduce(i)
            case "STEP":
                yield from self._step(i)

    def _key(self, i: Instruction) -> tuple[int, int]:
        if i.stage not in self.stages or i.microbatch not in range(self.program.num_microbatches):
            raise Broken("another rank's")
        return _number(i.stage), _number(i.microbatch)

    def _forward(self, i: Instruction) -> Iterator[Wait]:
        stage, m = key = self._key(i)
        inputs = self.received.get(key, {})
        needed = {(e.value, e.source) for e in self.program.edges if e.target == stage}
        if set(inputs) != needed:
            raise Broken("an input is missing")
        size = self.program.samples[self.dp][m]
        start = self.name(
            "forward", stage, self.dp, m, size, self.tp, self.has_stepped, tuple(sorted(inputs.items()))
        )
        made = yield from self._computation(i, start, Counter())
        self.outputs[key] = made
        if stage == self.program.num_stages - 1:
            self.losses[made] += 1
        for edge in self._local(stage, forwards=True):
            self.received.setdefault((edge.target, m), {})[edge.value, stage] = self.name(
                "out", made, edge.value
            )

    def _local(self, stage: int, *, forwards: bool) -> list[Any]:
        ranks = self.program.stage_ranks
        return [
            e
            for e in self.program.edges
            if (e.source if forwards else e.target) == stage and ranks[e.source] == ranks[e.target]
            if forwards or e.requires_grad
        ]

    def _backward(self, i: Instruction) -> Iterator[Wait]:
        stage, m = key = self._key(i)
        if key not in self.outputs:
            raise Broken("no forward")
        arrived = self.arrived.pop(key, Counter())
        start = self.name("backward", self.outputs.pop(key), self.count, tuple(sorted(arrived.items())))
        made = yield from self._computation(i, start, Counter(), owner=start)
        inputs = self.received.pop(key, {})
        with_gradient = {
            (e.value, e.source) for e in self.program.edges if e.target == stage and e.requires_grad
        }
        self.input_gradients[key] = {
            at: self.name("gradient", made, at) for at in inputs if at in with_gradient
        }
        for edge in self._local(stage, forwards=False):
            gradient = self.input_gradients[key].pop((edge.value, edge.source))
            self.arrived.setdefault((edge.source, m), Counter())[edge.value, stage, gradient] += 1
        if not self.world.is_fully_sharded:
            if i.kind == "I":
                self.products[key] = made
            else:
                self._accumulate(stage, made)
        elif i.kind == "I":
            self.products[key] = -1

    def _weights(self, i: Instruction) -> None:
        key = self._key(i)
        if key not in self.products:
            raise Broken("no products")
        made = self.products.pop(key)
        if not self.world.is_fully_sharded:
            self._accumulate(key[0], made)

    def _accumulate(self, stage: int, made: int) -> None:
        for parameter in self.parameters:
            if stage in parameter.stages:
                self.gradients[parameter.fqn][self.name("summand", made, parameter.fqn)] += 1

    def _send(self, i: Instruction) -> None:
        stage, m = key = self._key(i)
        peer = _number(i.peer)
        to = self._peer(peer)
        for tensor in self.program.tensors(i):
            source, target = (stage, peer) if i.kind == "SEND_F" else (peer, stage)
            self._require_edge(tensor.value, source, target)
            if i.kind == "SEND_F":
                if key not in self.outputs:
                    raise Broken("nothing to send")
                value = self.name("out", self.outputs[key], tensor.value)
            else:
                held = self.input_gradients.get(key, {})
                if (tensor.value, peer) not in held:
                    raise Broken("no gradient to send")
                value = held.pop((tensor.value, peer))
            route = (self.rank, to, i.kind[-1], tensor.value, source, target, m)
            if route in self.world.air:
                raise Broken("sent twice")
            self.world.air[route] = ((tensor.dtype, tensor.shape), value)

    def _receive(self, i: Instruction) -> Iterator[Wait]:
        stage, m = key = self._key(i)
        peer = _number(i.peer)
        sender = self._peer(peer)
        for tensor in self.program.tensors(i):
            source, target = (peer, stage) if i.kind == "RECV_F" else (stage, peer)
            self._require_edge(tensor.value, source, target)
            route = (sender, self.rank, i.kind[-1], tensor.value, source, target, m)
            yield lambda route=route: route in self.world.air  # type: ignore[misc]
            found, value = self.world.air.pop(route)
            if found != (tensor.dtype, tensor.shape):
                raise Broken("another type")
            if i.kind == "RECV_F":
                self.received.setdefault(key, {})[tensor.value, source] = value
            else:
                self.arrived.setdefault(key, Counter())[tensor.value, target, value] += 1

    def _peer(self, stage: int) -> int:
        if stage not in range(self.program.num_stages):
            raise Broken("no such stage")
        return self.program.mesh.rank(pp=self.program.stage_ranks[stage], dp=self.dp, tp=self.tp)

    def _require_edge(self, value: str, source: int, target: int) -> None:
        if not any((e.value, e.source, e.target) == (value, source, target) for e in self.program.edges):
            raise Broken("no such edge")

    def _computation(
        self, i: Instruction, made: int, whole: Counter[str], owner: int | None = None
    ) -> Iterator[Wait]:
        """The value after the act's collectives, each of which mixes in what the others brought to it."""
        stage = _number(i.stage)
        used = [p.fqn for p in self.parameters if stage in p.stages]
        whole.update(self.whole.get(stage, Counter()))
        for call in self.program.collectives(i):
            names = self._carried(call)
            if call.axis == "dp" and call.kind == "all_gather":
                yield from self._meet(call, tuple(self.values[name] for name in names))
                whole.update(names)
            elif call.axis == "dp" and call.kind == "reduce_scatter" and owner is not None:
                mine = tuple(self.name("summand", owner, name) for name in names)
                met = yield from self._meet(call, mine)
                for name, *parts in zip(names, *met, strict=True):
                    self.gradients[name][self.name("mean", tuple(parts))] += 1
                    self.pending[name][owner] += 1
            else:
                met = yield from self._meet(call, (made,))
                made = self.name("mixed", call.axis, call.kind, made, tuple(met))
        if i.kind != "UNSHARD" and self.world.is_fully_sharded:
            if any(whole[name] != 1 for name in used):
                raise Broken("a parameter is not whole, or gathered twice")
            if owner is not None and any(self.pending[name] != Counter([owner]) for name in used):
                raise Broken("a gradient is not reduced once")
            for name in used:
                self.pending[name].clear()
        return made

    def _carried(self, call: Collective) -> tuple[str, ...]:
        names = self.program.buckets.get(call.bucket, ())
        if not set(names) <= set(self.values):
            raise Broken("another rank's parameters")
        return names

    def _chain(self, values: Sequence[int], i: Instruction) -> Iterator[Wait]:
        for call in self.program.collectives(i):
            met = yield from self._meet(call, tuple(values))
            values = [self.name("mixed", call.axis, call.kind, tuple(met))]
        return values

    def _meet(self, call: Collective, mine: tuple[int, ...]) -> Iterator[Wait]:
        """What every rank of the group brought, in order of the ranks."""
        group = self.world.group(self.rank, call.axis)
        self.world.turns[self.rank, call.axis] += 1
        key = (call.axis, group, self.world.turns[self.rank, call.axis])
        brought = self.world.rounds.setdefault(key, {})
        brought[self.rank] = (call, mine)
        yield lambda: len(brought) == len(group)
        kinds = {(c.kind, c.dtype, c.numel, len(values)) for c, values in brought.values()}
        if len(kinds) > 1:
            raise Broken("different collectives meet")
        return [brought[rank][1] for rank in group]

    def _reduce(self, i: Instruction) -> Iterator[Wait]:
        sizes: dict[tuple[str, ...], int] = {}
        for call in self.program.collectives(i):
            names = self._carried(call)
            size = sizes.setdefault(names, call.numel)
            if size != call.numel:
                raise Broken("another size")
            met = yield from self._meet(call, tuple(self._gradient(name) for name in names))
            for name, *parts in zip(names, *met, strict=True):
                self.gradients[name] = Counter([self.name("summed", call.axis, tuple(parts))])
            if call.kind == "reduce_scatter":
                self.scattered |= set(names)
                sizes[names] = call.numel // self.program.mesh.dp

    def _gradient(self, name: str) -> int:
        return self.name("total", tuple(sorted(self.gradients[name].items())))

    def _step(self, i: Instruction) -> Iterator[Wait]:
        """The new parameters; of those that are scattered only a part, until they are gathered."""
        self.has_stepped += 1
        mine = tuple(self._gradient(name) for name in sorted(self.gradients))
        norm = self.name("norm", mine, tuple(sorted(self.losses.items())))
        calls = self.program.collectives(i)
        for call in calls:
            if not call.bucket:
                met = yield from self._meet(call, (norm,))
                norm = self.name("norm", call.axis, tuple(met))
                continue
            names = self._carried(call)
            met = yield from self._meet(call, tuple(self._gradient(name) for name in names))
            for name, *parts in zip(names, *met, strict=True):
                if name not in self.scattered:
                    raise Broken("gathers what is whole")
                self.scattered.discard(name)
                self.gradients[name] = Counter([self.name("gathered", tuple(parts))])
        for name in self.gradients:
            part = self.dp if name in self.scattered else -1
            self.values[name] = self.name("stepped", self.values[name], self._gradient(name), norm, part)


def meaning(program: Program, names: dict[Any, int], *, is_fully_sharded: bool) -> Mapping[int, Any] | str:
    """What the program leaves on every rank, or why it leaves nothing; ``names`` are shared by programs that are compared."""
    try:
        world = _World(program, is_fully_sharded=is_fully_sharded)
        ranks = [_Rank(world, rank, names) for rank in range(program.mesh.world_size)]
        _run([rank.run() for rank in ranks])
    except (Broken, KeyError, IndexError, ValueError) as error:
        return f"broken: {error!r}"
    if world.air:
        return "broken: messages in the air"
    return {rank.rank: rank.left() for rank in ranks}


def _run(ranks: Sequence[Iterator[Wait]]) -> None:
    """Lets every rank run until it waits, again and again, until all have ended or none can go on."""
    waiting: deque[tuple[Iterator[Wait], Wait]] = deque((rank, lambda: True) for rank in ranks)
    idle = 0
    while waiting:
        rank, is_ready = waiting.popleft()
        if not is_ready():
            waiting.append((rank, is_ready))
            idle += 1
            if idle > len(waiting):
                raise Broken("no rank can go on")
            continue
        idle = 0
        following = next(rank, None)
        while following is not None and following():
            following = next(rank, None)
        if following is not None:
            waiting.append((rank, following))


def _number(value: int | None) -> int:
    if value is None:
        raise Broken("no number")
    return value
