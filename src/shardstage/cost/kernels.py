"""``kernels_of``: what a device runs for one op, forward and backward, as eager PyTorch runs it.

    op                          forward                     backward
    product                     one product                 one for each operand that requires a gradient (+ the bias's sum)
    fused attention             one                         one, 2.5 times the FLOPs
    attention written out       two products, and what      four, and what goes over scores: where it drops probabilities, or the device has
                                goes over scores            no kernel for it
    view                        nothing                     nothing; a slice's gradient is written into zeros of the whole, those of
                                                            a split are put together
    add, sub                    reads both, writes one      nothing, but a sum where an operand was broadcast
    mul                         reads both, writes one      one for each operand that requires a gradient
    embedding                   reads and writes the rows   zeros of the whole table, and the rows
    anything else               reads inputs, writes        reads the output's gradient and what was saved, writes the inputs' gradients
                                outputs and what it saves
    a value read by c ops                                   c - 1 sums of gradients

Sizes are taken from one local graph and scale with the microbatch (``Kernel.at``), so that a graph is sharded once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, Literal, NamedTuple

from shardstage.graph import ModelGraph, Op, Ref, Value
from shardstage.graph.attention import (
    DROPPING_ATTENTION,
    attention_operands,
    is_attention,
    is_causal,
    kept_scores,
)
from shardstage.graph.flops import backward_flops, forward_flops
from shardstage.units import dtype_bytes

__all__ = ["SPLIT_TARGETS", "Kernel", "KernelReader", "is_expert", "num_experts"]

SPLIT_TARGETS: Final = frozenset(
    {"aten.linear.default", "aten.matmul.default", "aten.mm.default", "aten.addmm.default"}
)
"""Products whose weight gradient the engine can put off (``operators.weight_gradients``)."""

NORM_KERNELS: Final = 2
"""Layer norm's backward runs one kernel for its input's gradient and one for its weight's and bias's."""

Scaled = Literal["m", "n", "k", "count", ""]


class Kernel(NamedTuple):
    """One launch. ``fixed_bytes`` and ``sample_bytes`` are moved, the latter for each sample of the microbatch.

    A product is [m, k] · [k, n], ``num_products`` times; ``scaled`` is the one of its sizes that is given for one sample, as attention's
    ``flops`` are. ``is_weight`` marks the product that yields a weight's gradient and can be put off, ``is_expert`` one that is run for
    each of ``num_products`` experts on the tokens that it is given.
    """

    kind: Literal["product", "attention", "moved"]
    is_backward: bool
    fixed_bytes: float
    sample_bytes: float
    dtype: str = ""
    m: int = 0
    n: int = 0
    k: int = 0
    num_products: int = 1
    scaled: Scaled = ""
    flops: float = 0.0
    is_weight: bool = False
    is_expert: bool = False

    @property
    def cause(self) -> Literal["products", "memory"]:
        """What its seconds, without the host's, are booked under (``cluster.CAUSES``)."""
        return "memory" if self.kind == "moved" else "products"

    def moved_bytes(self, microbatch: float) -> float:
        return self.fixed_bytes + microbatch * self.sample_bytes

    def sizes(self, microbatch: float) -> tuple[int, int, int, int]:
        """(m, n, k, count) of a product at a microbatch."""
        sizes = {"m": self.m, "n": self.n, "k": self.k, "count": self.num_products}
        if self.scaled:
            sizes[self.scaled] = max(1, round(sizes[self.scaled] * microbatch))
        return sizes["m"], sizes["n"], sizes["k"], sizes["count"]


class KernelReader:
    """Reads the kernels of a local graph's ops; ``is_fixed`` tells of a value's name whether it stays as the microbatch grows.

    ``bounds`` are runs of ops that may lie on different stages, all ops together where nothing is said: gradients that come from
    several readers in one run are summed there, and one comes from each other run.
    """

    def __init__(
        self,
        graph: ModelGraph,
        is_fixed: Callable[[str], bool],
        *,
        bounds: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._graph = graph
        self._is_fixed = is_fixed
        self._bounds = tuple(bounds) or ((0, len(graph.ops)),)
        self._readers = [_gradient_readers(graph, start, stop) for start, stop in self._bounds]
        self._made_in = {
            name: number
            for number, (start, stop) in enumerate(self._bounds)
            for op in graph.ops[start:stop]
            for name in op.outputs
            if name is not None
        }

    def kernels(self, op: Op) -> tuple[Kernel, ...]:
        """Forward kernels, then backward ones."""
        return (*self._forward(op), *self._backward(op), *self.gradient_sums(op.outputs))

    def moved(self, names: Iterable[str]) -> tuple[float, float]:
        """Fixed bytes and bytes a sample of the values named, each as often as it is named."""
        fixed = sample = 0.0
        for name in names:
            num_bytes = self._graph.values[name].num_bytes
            if self._is_fixed(name):
                fixed += num_bytes
            else:
                sample += num_bytes / self._graph.microbatch
        return fixed, sample

    def _forward(self, op: Op) -> Iterator[Kernel]:
        if _is_view(self._graph, op):
            return
        if self._is_written_out(op):
            yield from self._written_out(op, is_backward=False)
            return
        outputs = [name for name in op.outputs if name is not None]
        saved = [name for name in op.saved if self._graph.values[name].kind == "saved"]
        read = op.inputs[1:] if _family(op) in _LOOK_UPS else op.inputs
        written = [*outputs, *outputs] if _family(op) in _LOOK_UPS else outputs  # the rows are read, too
        moved = self.moved((*read, *written, *saved))
        if flops := forward_flops(self._graph, op):
            yield self._product(op, flops, moved, is_backward=False)
        elif any(moved):
            yield Kernel("moved", False, *moved)

    def _backward(self, op: Op) -> Iterator[Kernel]:
        values = self._graph.values
        outputs = [name for name in op.outputs if name is not None and values[name].requires_grad]
        inputs = [name for name in op.inputs if values[name].requires_grad]
        if not outputs or not inputs:
            return
        family = _family(op)
        if backward_flops(self._graph, op):
            yield from self._product_backward(op, outputs, inputs)
        elif _is_view(self._graph, op):
            if family in _PARTS:
                yield self._moves([*inputs, *outputs])
            elif family in _CUTS and values[outputs[0]].numel < values[inputs[0]].numel:
                yield self._moves([*inputs, *outputs, *outputs])
        elif family in _SUMS:
            size = values[outputs[0]].numel
            yield from (self._moves([*outputs, name]) for name in inputs if values[name].numel < size)
        elif family in ("aten.mul", "aten.div"):
            for name in inputs:
                others = [other for other in op.inputs if other != name] or [name]
                yield self._moves([*outputs, *others, name])
        elif family in _LOOK_UPS:
            yield self._moves([*inputs, *outputs, *outputs])
        else:
            yield self._moves([*outputs, *dict.fromkeys(op.saved), *_activations(values, inputs)])
            if family in _NORMS:
                yield self._moves([*outputs, *_activations(values, list(op.inputs))])

    def _product_backward(self, op: Op, outputs: list[str], inputs: list[str]) -> Iterator[Kernel]:
        values = self._graph.values
        forward = forward_flops(self._graph, op)
        if self._is_written_out(op):
            yield from self._written_out(op, is_backward=True)
            return
        if is_attention(op):
            moved = self.moved((*outputs, *op.saved, *inputs))
            yield self._product(op, backward_flops(self._graph, op), moved, is_backward=True)
            return
        product = self._product(op, forward, (0.0, 0.0), is_backward=True)
        operands = _operands(op)
        for place, name in enumerate(operands):
            if not values[name].requires_grad:
                continue
            others = [other for other in operands if other != name] or [name]
            fixed, sample = self.moved((*outputs, *others, name))
            is_weight = op.target in SPLIT_TARGETS and values[name].kind == "parameter"
            yield _turned(product, place)._replace(
                fixed_bytes=fixed, sample_bytes=sample, is_weight=is_weight
            )
        for name in op.inputs:
            if name not in operands and values[name].requires_grad:
                yield self._moves([*outputs, name])  # the bias's sum

    def _product(self, op: Op, flops: int, moved: tuple[float, float], *, is_backward: bool) -> Kernel:
        values = self._graph.values
        dtype = next(values[name].dtype for name in op.inputs if "float" in values[name].dtype)
        if is_attention(op):
            causal = 0.5 if is_causal(op) else 1.0
            a_sample = causal * flops / self._graph.microbatch
            return Kernel("attention", is_backward, *moved, dtype=dtype, flops=a_sample)
        m, n, k, count = _shape(values, op, flops)
        first = _operands(op)[0]
        if is_expert(op):
            num_experts = values[op.inputs[1]].shape[0]
            rows = max(1, m // (num_experts * self._graph.microbatch))
            return Kernel(
                *("product", is_backward, *moved),
                dtype=dtype,
                m=rows,
                n=n,
                k=k,
                num_products=num_experts,
                scaled="m",
                is_expert=True,
            )
        if self._is_fixed(first):
            return Kernel("product", is_backward, *moved, dtype=dtype, m=m, n=n, k=k, num_products=count)
        b = self._graph.microbatch
        if count > 1 and count % b == 0:
            return Kernel(
                "product",
                is_backward,
                *moved,
                dtype=dtype,
                m=m,
                n=n,
                k=k,
                num_products=count // b,
                scaled="count",
            )
        return Kernel(
            "product", is_backward, *moved, dtype=dtype, m=m // b, n=n, k=k, num_products=count, scaled="m"
        )

    def _is_written_out(self, op: Op) -> bool:
        """Whether attention is several kernels here: with dropout, or where the device has none for it (``graph.saved_on``)."""
        return is_attention(op) and (op.target == DROPPING_ATTENTION or bool(kept_scores(self._graph, op)))

    def _written_out(self, op: Op, *, is_backward: bool) -> Iterator[Kernel]:
        """Products [s, d] · [d, t] and [s, t] · [t, e] of each head, all positions, and what goes over scores [.., s, t] between them."""
        values, drops = self._graph.values, op.target == DROPPING_ATTENTION
        query, key, value, mask = attention_operands(op)
        q, k, v = (values[name] for name in (query, key, value))
        s, t, d, e = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
        wide = q.dtype if q.dtype == "float64" else "float32"
        dtype = q.dtype if drops else wide
        num_heads = q.numel // (s * d * self._graph.microbatch)
        width, wide_width = dtype_bytes(dtype), dtype_bytes(wide)
        is_masked = mask is not None or is_causal(op)
        passes = _score_passes(width, wide_width, is_backward=is_backward, drops=drops, is_masked=is_masked)
        result = next(name for name in op.outputs if name is not None)
        scores, weighted = ((s, t, d), (query, key)), ((s, e, t), (value, result))
        factors = [scores, weighted]
        if is_backward:
            factors = [
                ((s, t, e), (value, result)),
                ((t, e, s), (value, result)),
                ((s, d, t), (query, key)),
                scores,
            ]
        for (m, n, inner), names in factors:
            fixed, sample = self.moved(names)
            moved = (fixed, sample + num_heads * s * t * width)
            product = Kernel("product", is_backward, *moved, dtype=dtype, m=m, n=n, k=inner)
            yield product._replace(num_products=num_heads, scaled="count")
        yield from (Kernel("moved", is_backward, 0.0, num_heads * s * t * each) for each in passes)

    def gradient_sums(self, names: Iterable[str | None]) -> Iterator[Kernel]:
        """A value that several ops read gets as many gradients, which are added pair by pair; another run sends one."""
        for name in names:
            if name is not None and self._graph.values[name].requires_grad:
                own = self._made_in[name]
                inside = self._readers[own].get(name, 0)
                outside = sum(name in readers for n, readers in enumerate(self._readers) if n != own)
                for _ in range(inside + outside - 1):
                    yield self._moves([name, name, name])

    def received_sums(self, number: int = 0) -> Iterator[Kernel]:
        """Sums of the gradients of what a run reads from others."""
        for name, count in self._readers[number].items():
            if self._made_in.get(name) != number:
                for _ in range(count - 1):
                    yield self._moves([name, name, name])

    def _moves(self, names: list[str]) -> Kernel:
        return Kernel("moved", True, *self.moved(names))


def _score_passes(
    width: int, wide: int, *, is_backward: bool, drops: bool, is_masked: bool
) -> tuple[float, ...]:
    """Bytes that each kernel between the products moves for a score of ``width`` bytes, whose softmax has ``wide`` bytes.

    With dropout as ``operators.dropout.attention`` runs it: mask, softmax, its cast, numbers drawn and compared, and two to drop by; else
    as torch's own form: mask and softmax. A mask itself is small: it has no heads.
    """
    casts = (width + wide,) if drops and wide != width else ()
    masks = (2.0 * width,) if is_masked else ()
    dropping = (2.0 * width + 1, 2.0 * width)
    if is_backward:
        return (*(dropping if drops else ()), *casts, 2.0 * wide + width, *(masks if drops else ()))
    return (*masks, width + wide, *casts, *((4.0, 5.0, *dropping) if drops else ()))


def _turned(product: Kernel, place: int) -> Kernel:
    """The product [m, k] · [k, n] whose operand at ``place`` is wanted: [m, n] · [n, k] or [k, m] · [m, n]."""
    m, n, k = product.m, product.n, product.k
    if place == 0:
        return product._replace(m=m, n=k, k=n)
    swapped: dict[Scaled, Scaled] = {"m": "k", "k": "m"}
    return product._replace(m=k, n=n, k=m, scaled=swapped.get(product.scaled, product.scaled))


def _shape(values: Mapping[str, Value], op: Op, flops: int) -> tuple[int, int, int, int]:
    """(m, n, k, count) of a product from its operands; of any other op with FLOPs, what gives as many with the weight's rows as n."""
    family = _family(op)
    operands = _operands(op)
    a, b = values[operands[0]], values[operands[1]]
    if is_expert(op):
        return a.numel // a.shape[-1], b.shape[-1], a.shape[-1], 1
    if family == "aten.linear":
        k = b.shape[-1]
        return a.numel // k, b.numel // k, k, 1
    if family in ("aten.mm", "aten.addmm") or (family == "aten.matmul" and len(b.shape) == 2):
        k = b.shape[0]
        return a.numel // k, b.shape[1], k, 1
    if family in ("aten.bmm", "aten.baddbmm", "aten.matmul"):
        m, k, n = (a.shape[-2] if len(a.shape) > 1 else 1), a.shape[-1], b.shape[-1]
        return m, n, k, max(1, flops // (2 * m * k * n))
    n = max(1, b.shape[0] if b.shape else 1)
    k = max(1, b.numel // n)
    return max(1, flops // (2 * n * k)), n, k, 1


def _operands(op: Op) -> tuple[str, ...]:
    """The two factors, without a summand or bias."""
    tensors = [argument.name for argument in op.args if isinstance(argument, Ref)]
    if _family(op) in ("aten.addmm", "aten.baddbmm"):
        return tuple(tensors[1:3])
    return tuple(tensors[:2]) if len(tensors) > 1 else tuple(op.inputs[:2])


def _gradient_readers(graph: ModelGraph, start: int, stop: int) -> dict[str, int]:
    """For each value how many of ops[start:stop] send a gradient back to it."""
    readers: dict[str, int] = {}
    for op in graph.ops[start:stop]:
        if any(name is not None and graph.values[name].requires_grad for name in op.outputs):
            for name in op.inputs:
                value = graph.values[name]
                if value.kind in ("activation", "input") and value.requires_grad:
                    readers[name] = readers.get(name, 0) + 1
    return readers


def _activations(values: Mapping[str, Value], names: list[str]) -> list[str]:
    return [name for name in names if values[name].kind != "parameter"]


def _is_view(graph: ModelGraph, op: Op) -> bool:
    outputs = [graph.values[name] for name in op.outputs if name is not None]
    return bool(outputs) and all(value.alias_of for value in outputs) and not _family(op).endswith("_")


def is_expert(op: Op) -> bool:
    """Whether the op is a product of tokens with an expert's matrix each: rows sorted by expert, [E, k, n]."""
    return "grouped_mm" in op.target


def num_experts(graph: ModelGraph) -> int:
    """The number of experts of the layers that have some; 0 without any."""
    return next((graph.values[op.inputs[1]].shape[0] for op in graph.ops if is_expert(op)), 0)


def _family(op: Op) -> str:
    """``aten.linear.default`` → ``aten.linear``."""
    return ".".join(op.target.split(".")[:2])


_LOOK_UPS: Final = frozenset({"aten.embedding", "aten.index_select", "aten.gather", "shardstage.embedding"})
_SUMS: Final = frozenset({"aten.add", "aten.sub"})
_CUTS: Final = frozenset({"aten.slice", "aten.select", "aten.narrow"})
_PARTS: Final = frozenset({"aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind"})
_NORMS: Final = frozenset({"aten.layer_norm", "aten.rms_norm", "aten.group_norm", "aten.batch_norm"})
