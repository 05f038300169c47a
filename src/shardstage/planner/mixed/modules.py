"""``mixed_named_modules``: whether naming modules for selective recomputation would be faster, over several classes of devices."""

from __future__ import annotations

from contextlib import suppress

from shardstage.plan import shorthand
from shardstage.planner.mixed.priced import MixedPriced, TooLong
from shardstage.planner.mixed.search import MixedResult, MixedSearcher
from shardstage.planner.modules import NamedModules, module_sets, quickest

__all__ = ["mixed_named_modules"]


def mixed_named_modules(searcher: MixedSearcher, found: MixedResult) -> NamedModules | None:
    """The best plan's choice with modules named, cut anew, as fast as the sets allow that ``named_modules`` tries.

    None where none is faster and fits, where the search was told what to recompute, and where its best plan recomputes nothing.
    """
    best = found.priced
    recomputes = {*(best.setup.recompute_of_stages or (best.setup.recompute,))} != {"none"}
    pricing = searcher.pricing
    if pricing.asked is not None or not recomputes or pricing.modules or pricing.is_compiled:
        return None
    searcher.use(found.savers)

    def priced(modules: tuple[str, ...], below_s: float) -> MixedPriced | None:
        named = pricing.naming(modules, best.choice.arrangement.sharding)
        with suppress(TooLong):
            return named.price(best.choice, found.limits, below_s)
        return None

    told = quickest(module_sets(pricing.folded.graph), best.seconds, priced)
    if told is None or not told[1].plan.is_selective:
        return None
    plan = told[1].plan
    return NamedModules(
        plan=plan,
        text=shorthand(plan, default_precision=plan.precision),
        asked=f'--fix "modules={"/".join(told[0])}"',
        prediction=told[1].prediction,
        gain=1 - told[1].seconds / best.seconds,
    )
