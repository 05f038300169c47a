"""``named_modules``: whether the best plan were faster if selective recomputation meant some modules of its layers, and which.

Tried are each module of a layer that holds products, the others (its norms), these with each of the former, and with the modules inside
those that hold no product either (activations, dropout): a handful of sets, of which only what is kept is read anew. No proof says that
no other set is better; the search itself knows the three modes only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeAlias, TypeVar

from shardstage.cost import Prediction
from shardstage.graph import ModelGraph
from shardstage.graph.flops import forward_flops
from shardstage.graph.named_modules import modules_of_layers
from shardstage.plan import Plan, shorthand
from shardstage.planner.pricing import Priced, TooSlow
from shardstage.planner.search import Searcher, SearchResult
from shardstage.planner.space import Choice

__all__ = ["NamedModules", "module_sets", "named_modules", "quickest"]

LEAST_GAIN: Final = 0.001
"""What is told spares at least so much of a step, beyond what was told before it."""


@dataclass(frozen=True, kw_only=True)
class NamedModules:
    """The best plan with modules named; ``text`` is its shorthand, ``gain`` the share of a step that it spares, ``asked`` what one
    types for it."""

    plan: Plan
    text: str
    asked: str
    prediction: Prediction
    gain: float

    def __str__(self) -> str:
        return f"recompute=selective,modules={'/'.join(self.plan.recompute_modules)}"


def named_modules(searcher: Searcher, found: SearchResult) -> NamedModules | None:
    """The best plan with modules named, on the same mesh and as fast as these sets allow; None where none is faster and fits.

    None, too, where the search was told what to recompute, or its best plan recomputes nothing.
    """
    best = found.priced
    is_open = set(searcher.pricing.modes) == {"none", "selective", "full"}
    recomputes = set(best.setup.recompute_of_stages or (best.setup.recompute,)) != {"none"}
    if not (is_open and recomputes) or searcher.recompute_modules or searcher.is_compiled:
        return None
    searcher.use(found.savers)
    sets = module_sets(searcher.pricing.folded.graph)

    def priced(modules: tuple[str, ...], below_s: float) -> Priced | None:
        return _priced(searcher, best.choice, modules, found.limit_bytes, below_s)

    told = quickest(sets, best.seconds, priced)
    return None if told is None else _told(searcher, best, *told)


Modules: TypeAlias = tuple[str, ...]


class _Timed(Protocol):
    @property
    def seconds(self) -> float: ...


AnyTimed = TypeVar("AnyTimed", bound=_Timed)


def quickest(
    sets: Iterable[Modules], best_s: float, priced: Callable[[Modules, float], AnyTimed | None]
) -> tuple[Modules, AnyTimed] | None:
    """The set under which a plan takes least, with its price, where that is less than ``best_s`` by what is worth telling. ``priced`` is
    told below what it need not look."""
    told: tuple[Modules, AnyTimed] | None = None
    for modules in sets:
        below_s = (1 - LEAST_GAIN) * (best_s if told is None else told[1].seconds)
        found = priced(modules, below_s)
        if found is not None and found.seconds < below_s:
            told = modules, found
    return told


def module_sets(graph: ModelGraph) -> tuple[tuple[str, ...], ...]:
    """Sets of globs over the modules of a graph's layers."""
    layers = {block.module for block in graph.blocks if block.is_layer}
    busy = {op.module for op in graph.ops if forward_flops(graph, op)}
    parts: dict[str, None] = {}
    norms: dict[str, None] = {}
    inner: dict[str, None] = {}
    for path in modules_of_layers(graph):
        around, _, name = path.rpartition(".")
        has_products = any(f"{each}.".startswith(f"{path}.") for each in busy)
        if around in layers:
            (parts if has_products else norms)[f"*.{name}"] = None
        elif not has_products and path not in layers:
            inner[f"*.{name}"] = None
    return tuple(dict.fromkeys(filter(None, _sets(tuple(parts), tuple(norms), tuple(inner)))))


def _sets(
    parts: tuple[str, ...], norms: tuple[str, ...], inner: tuple[str, ...]
) -> Iterator[tuple[str, ...]]:
    yield from ((part,) for part in parts)
    yield norms
    yield (*norms, *inner)
    yield from ((*norms, part) for part in parts)


def _priced(
    searcher: Searcher, choice: Choice, modules: tuple[str, ...], limit_bytes: int, below_s: float
) -> Priced | None:
    named = searcher.pricing.naming(modules, choice.group)
    try:
        return named.price(choice, limit_bytes, below_s)
    except TooSlow:
        return None


def _told(searcher: Searcher, best: Priced, modules: tuple[str, ...], priced: Priced) -> NamedModules | None:
    plan = replace(searcher.as_plan(priced), recompute_modules=modules)
    if not plan.is_selective:
        return None
    text = shorthand(plan, default_precision=searcher.precision)
    return NamedModules(
        plan=plan,
        text=text,
        asked=f'--plan "{text}"',
        prediction=priced.prediction,
        gain=1 - priced.seconds / best.seconds,
    )
