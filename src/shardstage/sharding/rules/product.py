"""Matrix products, with weights or between activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardstage.graph import Op
from shardstage.layout import Placement, Shard
from shardstage.sharding.call import Call, LocalCall, with_arguments
from shardstage.sharding.state import PARTIAL, SUMMED, WHOLE, Blocked, Origin, Placing, Refine, State

__all__ = ["place_addmm", "place_grouped", "place_linear", "place_matmul", "rewrite_addmm", "rewrite_linear"]


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product with a letter for each dim, as einsum has them: ``letters[operand][dim]``.

    A dim of one element that is broadcast has the letter "". ``summed`` is the letter that the output lacks. ``bias`` is added to
    the output; its dims are the last ones of the output.
    """

    call: Call
    letters: Mapping[str, tuple[str, ...]]
    output: tuple[str, ...]
    summed: str
    bias: str | None = None


def place_linear(call: Call) -> Placing:
    """``linear(x [.., k], w [n, k], bias [n])``."""
    x, weight = call.name(0, "input"), call.name(1, "weight")
    assert x is not None and weight is not None
    rows = tuple(f"m{i}" for i in range(len(call.shape(x)) - 1))
    letters = {x: (*rows, "k"), weight: ("n", "k")}
    return _place(
        Product(
            call=call,
            letters=letters,
            output=(*rows, "n"),
            summed="k",
            bias=call.name(2, "bias"),
        )
    )


def place_addmm(call: Call) -> Placing:
    """``addmm(bias, x [m, k], w [k, n])``."""
    bias, x, weight = call.name(0, "self"), call.name(1, "mat1"), call.name(2, "mat2")
    assert x is not None and weight is not None
    if call.sharded and any(call.argument(i, key, 1) != 1 for i, key in ((3, "beta"), (4, "alpha"))):
        raise Blocked(call.sharded, "addmm with factors")
    letters = {x: ("m", "k"), weight: ("k", "n")}
    return _place(Product(call=call, letters=letters, output=("m", "n"), summed="k", bias=bias))


def place_matmul(call: Call) -> Placing:
    """``matmul``, ``mm`` and ``bmm`` of two tensors of at least two dims each: ``[.., m, k] @ [.., k, n]``."""
    a, b = call.name(0, "self"), call.name(1, "other") or call.name(1, "mat2")
    assert a is not None and b is not None
    if min(len(call.shape(a)), len(call.shape(b))) < 2 or a == b:
        if call.sharded:
            raise Blocked(call.sharded, f"{call.op.target} with a vector or with itself")
        return call.all_whole()
    ndim = len(call.output_shape)
    batch = tuple(f"b{i}" for i in range(ndim - 2))
    letters = {
        name: (*_batch_letters(call.shape(name), batch, call.output_shape), *last)
        for name, last in ((a, ("m", "k")), (b, ("k", "n")))
    }
    return _place(Product(call=call, letters=letters, output=(*batch, "m", "n"), summed="k"))


def place_grouped(call: Call) -> Placing:
    """``grouped_mm(x [m, k], w [e, k, n], ends [e])``: the rows of x between two ends meet one of the matrices."""
    x, weight, ends = call.tensors[:3]
    letters = {x: ("m", "k"), weight: ("e", "k", "n"), ends: ("e",)}
    if len(call.tensors) != 3 or [len(call.shape(name)) for name in call.tensors] != [2, 3, 1]:
        if call.sharded:
            raise Blocked(call.sharded, f"{call.op.target} in a form without rule")
        return call.all_whole()
    return _place(Product(call=call, letters=letters, output=("m", "n"), summed="k"))


def rewrite_linear(call: LocalCall) -> tuple[Op, ...]:
    """Partial sums leave the bias to whoever adds them up."""
    if call.output_placement != PARTIAL:
        return (call.op,)
    return (with_arguments(call.op, *call.op.args[:2]),)


def rewrite_addmm(call: LocalCall) -> tuple[Op, ...]:
    """As for linear."""
    if call.output_placement != PARTIAL:
        return (call.op,)
    return (with_arguments(call.op, *call.op.args[1:3], target="aten.mm.default"),)


def _batch_letters(
    shape: tuple[int, ...], batch: tuple[str, ...], output: tuple[int, ...]
) -> tuple[str, ...]:
    own = shape[:-2]
    skipped = len(batch) - len(own)
    return tuple(
        letter if size == whole else ""
        for letter, size, whole in zip(batch[skipped:], own, output[skipped:], strict=False)
    )


def _place(product: Product) -> Placing:
    call = product.call
    found = {name: product.letters[name][shard.dim] for name in call.sharded if (shard := _of(product, name))}
    if any(letter == "" for letter in found.values()):
        raise Blocked(tuple(found), "a sharded dim of one element is broadcast")
    is_forced = any(call.state(name).origins for name in found)
    if not is_forced:
        column = _column(product)
        if column is not None:
            return column
    if not found:
        return call.all_whole()
    letter = _agreed_letter(product, found, is_forced=is_forced)
    if letter == product.summed and not any(name in call.free for name in product.letters):
        raise Blocked(tuple(found), f"{call.op.target} of activations sums over the sharded dim")
    return _along(product, letter, next(n for n in found if found[n] == letter))


def _of(product: Product, name: str) -> Shard | None:
    shard = product.call.shard(name)
    if shard is not None and name not in product.letters:
        raise Blocked((name,), "the bias of a product is sharded")
    return shard


def _column(product: Product) -> Placing | None:
    """The weight's output dim cut among the ranks: every rank needs the whole input."""
    call = product.call
    for weight, letters in product.letters.items():
        others = {letter for name in product.letters if name != weight for letter in product.letters[name]}
        own = [i for i, letter in enumerate(letters) if letter and letter not in others]
        if weight not in call.free or len(own) != 1 or len(letters) != len(call.shape(weight)):
            continue
        parameter, dims = call.free[weight]
        length = call.shape(weight)[own[0]]
        cut = call.cuts.shard(parameter, dims[own[0]], length)
        if cut is not None:
            origin = call.cuts.origin(parameter)
            return _split_along(product, letters[own[0]], cut, (origin,))
    return None


def _agreed_letter(product: Product, found: dict[str, str], *, is_forced: bool) -> str:
    """The one letter whose dim is cut; where two are, those that follow no parameter give way."""
    call = product.call
    if is_forced:
        loose = tuple(name for name in found if not call.state(name).origins)
        if loose and len(loose) < len(found):
            firm = next(name for name in found if name not in loose)
            if any(_differs(product, found, firm, name) for name in loose):
                raise Blocked(loose, "a product of values that are cut differently")
    names = list(found)
    if any(_differs(product, found, names[0], name) for name in names[1:]):
        if found[names[0]] == found[names[-1]]:
            raise _coarser(call, names[0], names[-1])
        raise Blocked(tuple(names), f"{call.op.target} of values that are cut along different dims")
    return found[names[0]]


def _differs(product: Product, found: dict[str, str], a: str, b: str) -> bool:
    shard_a, shard_b = product.call.shard(a), product.call.shard(b)
    assert shard_a is not None and shard_b is not None
    return found[a] != found[b] or shard_a.sections != shard_b.sections


def _coarser(call: Call, a: str, b: str) -> Exception:
    units = {name: max((call.cuts.unit(o) for o in call.state(name).origins), default=1) for name in (a, b)}
    reason = f"{call.op.target} needs both operands cut at the same places"
    if units[a] == units[b]:
        return Blocked((a, b), reason)
    fine, coarse = sorted((a, b), key=lambda name: units[name])
    return Refine(fine, reason, unit=units[coarse])


def _along(product: Product, letter: str, name: str) -> Placing:
    shard = product.call.shard(name)
    assert shard is not None
    origins = dict.fromkeys(o for n in product.call.sharded for o in product.call.state(n).origins)
    return _split_along(product, letter, shard, tuple(origins))


def _split_along(product: Product, letter: str, shard: Shard, origins: tuple[Origin, ...]) -> Placing:
    """Every operand with the letter is cut along it, the others are needed whole."""
    call = product.call
    inputs: dict[str, Placement] = {
        name: shard.with_dim(letters.index(letter)) if letter in letters else SUMMED
        for name, letters in product.letters.items()
    }
    _require_divisible(call, inputs)
    if letter in product.output:
        dim = product.output.index(letter)
        placing = Placing(inputs=inputs, outputs=(State(shard.with_dim(dim), origins),))
        reduced: Placement = shard.with_dim(dim)
    else:
        reduced = call.reduced(call.output_shape)
        placing = Placing(inputs=inputs, outputs=(State(PARTIAL),), reduced=reduced)
    return placing if product.bias is None else _with_bias(product, placing, reduced)


def _require_divisible(call: Call, inputs: dict[str, Placement]) -> None:
    """A weight that must stay whole cannot meet a cut input."""
    for name, placement in inputs.items():
        if not isinstance(placement, Shard) or name not in call.free:
            continue
        parameter = call.free[name][0]
        if parameter in call.cuts.whole and call.sharded:
            raise Blocked(call.sharded, f"{parameter} stays whole: {call.cuts.whole[parameter]}")


def _with_bias(product: Product, placing: Placing, output: Placement) -> Placing:
    """The bias as the output is cut; after the reduction where the product is a partial sum."""
    call, bias = product.call, product.bias
    assert bias is not None
    placement: Placement = WHOLE
    if isinstance(output, Shard):
        dim = output.dim - (len(product.output) - len(call.shape(bias)))
        is_cut = dim >= 0 and call.shape(bias)[dim] == output.length
        placement = output.with_dim(dim) if is_cut else SUMMED
    added_later = bias if placing.outputs[0].placement == PARTIAL else ""
    return replace(placing, inputs={**placing.inputs, bias: placement}, bias=added_later)
