"""``Answer``: what ``shardstage plan`` found, and what there is to tell of it, as facts and tables: printed, or drawn on a page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shardstage.cli.choosing import Chosen
from shardstage.cli.comparison import Comparison
from shardstage.cli.saving import less_with_facts, saving_facts
from shardstage.cli.short_list import Simulated, short_list_choice, short_list_rows
from shardstage.cli.told import PLAN, Fact, Rows
from shardstage.plan import Plan, shorthand
from shardstage.units import format_bytes, format_dollars, format_ratio, format_s

if TYPE_CHECKING:
    from shardstage.cluster import Cluster
    from shardstage.cost import Prediction
    from shardstage.graph import ModelGraph
    from shardstage.planner import Alternative, MixedResult, Point

__all__ = ["Answer", "held", "held_text", "share_text"]

MOST_SHOWN: Final = 6
MOST_UNFIT_SHOWN: Final = 3


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A plan with what it is compared with.

    ``notes`` say what is odd about it, ``explained`` who does what, where that was asked for. A rank may hold ``limit_bytes``, None where
    that differs from class to class.
    """

    model: str
    graph: ModelGraph
    machine: Cluster
    num_ranks: int
    chosen: Chosen
    comparison: Comparison
    limit_bytes: int | None = None
    notes: tuple[str, ...] = ()
    simulated: tuple[Simulated, ...] = ()
    explained: str = ""

    def plan_facts(self) -> Iterator[Fact]:
        """The plan and its price."""
        plan, prediction = self.chosen.plan, self.chosen.prediction
        yield Fact(PLAN, shorthand(plan))
        several, samples = (
            "" if plan.num_microbatches == 1 else "es",
            "sample" if plan.global_batch == 1 else "samples",
        )
        each = min(plan.microbatch, max(plan.shares))
        yield Fact(
            "batch",
            f"{plan.global_batch:,} {samples} in {plan.num_microbatches} microbatch{several} of {each} a data-parallel rank",
        )
        yield from _price_facts(plan, prediction)
        yield from self._memory_facts()

    def search_facts(self) -> Iterator[Fact]:
        """What a step costs, what each class of devices takes, and the proof."""
        fastest = self.comparison.fastest
        if fastest is not None:
            figures = f"{format_s(fastest.step_time_s)} with {format_bytes(fastest.peak_bytes)} a rank"
            longer = format_ratio(self.chosen.prediction.step_time_s / fastest.step_time_s - 1)
            text = (
                f"{figures}: a plan of less memory may take a quarter longer, this one takes {longer} longer"
            )
            yield Fact("fastest", text)
        if self.comparison.dollars is not None:
            dollars = format_dollars(self.comparison.dollars)
            yield Fact("cost", f"{dollars} a step at its devices' hourly price")
        if self.chosen.mixed is not None:
            yield from _share_facts(self.chosen.mixed)
        found = self.chosen.found or self.chosen.mixed
        if found is None:
            return
        proof = found.certificate
        counts = ", ".join(f"{number:,} {how}" for number, how, _ in proof.counted() if number)
        is_less = self.limit_bytes is not None and proof.limit_bytes < self.limit_bytes
        within = f" within {format_bytes(proof.limit_bytes)} a rank" if is_less else ""
        yield Fact(
            "proof", f"best of {proof.enumerated:,} plans{within}, gap {format_ratio(proof.gap)}: {counts}"
        )
        if proof.needs:
            yield Fact("needed", proof.necessity())

    def what_ifs(self) -> Iterator[Fact]:
        """What would be faster and is not searched by itself."""
        named = self.comparison.modules
        if named is not None:
            gain, peak = format_ratio(named.gain), format_bytes(named.prediction.peak_bytes)
            yield Fact("what if", f"{named}: {gain} faster, fits with {peak}: {named.asked}", is_pasted=True)
        if self.comparison.fastest is None:
            yield from saving_facts(self.comparison.savings)
        else:
            yield from less_with_facts(self.comparison.savings)

    def counted(self) -> Rows:
        """How the proof deals with all plans; no row where nothing was searched."""
        found = self.chosen.found or self.chosen.mixed
        counts = found.certificate.counted() if found is not None else ()
        rows = tuple((how, f"{number:,}", why) for number, how, why in counts)
        return Rows("proof", ("dealt with", "plans", "why"), rows)

    def runners_up(self) -> Rows:
        rows = (
            (text, *_figures(found), self._slower(found))
            for text, found in self.comparison.runners_up[:MOST_SHOWN]
        )
        return Rows("runners-up", (PLAN, "step time", "memory", "slower"), tuple(rows))

    def why_not(self, *, is_whole: bool = False) -> Rows:
        """One decision changed: the cheapest change of each, some that do not fit and some others; all that are known if ``is_whole``."""
        told = self.comparison.alternatives
        rows = ((a.change, *_figures(a.prediction), a.reason) for a in (told if is_whole else _shown(told)))
        return Rows("why not", ("change", "step time", "memory", "why not"), tuple(rows))

    def less_memory(self) -> Rows:
        """The front, where it has more than the plan."""
        points, title = self.comparison.front, "less memory"
        if len(points) < 2:
            points = ()
        elif len(points[0].class_peaks) > 1:
            title += ": of what the fullest device can hold, and the fullest of each class"
        rows = (
            (p.text, format_s(p.prediction.step_time_s), held_text(p), self._slower(p.prediction))
            for p in points
        )
        return Rows(title, (PLAN, "step time", "memory", "slower"), tuple(rows))

    def simulations(self) -> Rows:
        return short_list_rows(self.simulated)

    def simulated_choice(self) -> Iterator[Fact]:
        """Where the simulation chose another plan than the formula."""
        yield from short_list_choice(self.simulated)

    def _memory_facts(self) -> Iterator[Fact]:
        """What the fullest rank holds of what it may, and what lies in the host's memory."""
        prediction, num_ranks = self.chosen.prediction, self.chosen.plan.mesh.pp
        fullest = max(range(num_ranks), key=prediction.rank_peak_bytes)
        parts = ", ".join(
            f"{name} {format_bytes(num_bytes)}" for name, num_bytes in prediction.ranks[fullest].categories()
        )
        where = f" (pp={fullest})" if num_ranks > 1 else ""
        of = "" if self.limit_bytes is None else f" of {format_bytes(self.limit_bytes)}"
        yield Fact("memory", f"{format_bytes(prediction.peak_bytes)} a rank{where}{of}: {parts}")
        if prediction.host_bytes:
            host = None if self.machine.is_mixed else self.machine.device.host
            there = "" if host is None else f", of {format_bytes(host.memory_bytes)} that it has for each"
            num_bytes = format_bytes(prediction.host_bytes)
            yield Fact("host", f"{num_bytes} a rank of the host's memory{there}: master, optimizer")

    def _slower(self, other: Prediction) -> str:
        return format_ratio(other.step_time_s / self.chosen.prediction.step_time_s - 1)


def _price_facts(plan: Plan, prediction: Prediction) -> Iterator[Fact]:
    has_tokens, is_alone = plan.sequence is not None, plan.mesh.num_replicas == 1
    low, expected, high = map(
        format_s, (prediction.step_time_low_s, prediction.step_time_s, prediction.step_time_high_s)
    )
    yield Fact("step time", f"{expected}   low {low}, high {high}")
    rate = f"{prediction.tokens_per_s if has_tokens else prediction.samples_per_s:,.0f}"
    per = "tokens/s" if has_tokens else "samples/s"
    yield Fact("speed", f"{rate} {per}, MFU {format_ratio(prediction.mfu)}")
    waits = ", ".join(
        f"{axis} {format_s(seconds)}"
        for axis, seconds in (
            ("tp", prediction.exposed_tp_s),
            (
                "parameters that stages share" if is_alone and prediction.exposed_dp_s else "dp",
                prediction.exposed_dp_s,
            ),
            ("pp", prediction.exposed_pp_s),
        )
    )
    yield Fact("waits", f"bubble {format_ratio(prediction.bubble_ratio)}, exposed communication: {waits}")


def _share_facts(found: MixedResult) -> Iterator[Fact]:
    """Which layers, or how many samples, each class of devices takes, and what it holds; which devices are idle."""
    by_layers = found.priced.choice.arrangement.by == "stages"
    of = sum(share.num_layers if by_layers else share.num_samples for share in found.shares)
    for share in found.shares:
        takes = (
            f"{share.num_layers} of {of} layers" if by_layers else f"{share.num_samples:,} of {of:,} samples"
        )
        holds = f"{format_bytes(share.peak_bytes)} of {format_bytes(share.limit_bytes)}"
        yield Fact("share", f"{share.num_used:,} × {share.name}: {takes}, {holds}")
    idle = [f"{s.num_devices - s.num_used:,} × {s.name}" for s in found.shares if s.num_used < s.num_devices]
    if idle:
        yield Fact("idle", f"{', '.join(idle)}: ranks are those of --cluster {found.cluster.name}")


def _shown(alternatives: Sequence[Alternative]) -> list[Alternative]:
    """The cheapest change of each decision, some that do not fit, and of the others the cheapest."""
    firsts: dict[str, Alternative] = {}
    for each in alternatives:
        firsts.setdefault(re.split("[ =]", each.change)[0], each)
    large = [each for each in alternatives if each.prediction is None][:MOST_UNFIT_SHOWN]
    chosen = list(dict.fromkeys((*firsts.values(), *large, *alternatives)))[: 2 * MOST_SHOWN]
    return [each for each in alternatives if each in chosen]


def _figures(prediction: Prediction | None) -> tuple[str, str]:
    """Step time and memory, nothing of what does not fit."""
    if prediction is None:
        return "", ""
    return format_s(prediction.step_time_s), format_bytes(prediction.peak_bytes)


def held(point: Point) -> float:
    """What counts as its memory: bytes, or of several classes the share of what the fullest device can hold."""
    return point.prediction.peak_bytes if len(point.class_peaks) == 1 else point.fill_ratio


def held_text(point: Point) -> str:
    peaks = [format_bytes(peak) for peak in point.class_peaks]
    return peaks[0] if len(peaks) == 1 else f"{share_text(point)}: {_in_one_unit(peaks)}"


def share_text(point: Point) -> str:
    """Rounded up, so that a search within it finds the plan."""
    return format_ratio(math.ceil(1000 * point.fill_ratio) / 1000)


def _in_one_unit(amounts: Sequence[str]) -> str:
    """The unit once where all have the same."""
    last = amounts[-1].split()[-1]
    each = [amount.removesuffix(f" {last}") for amount in amounts[:-1]]
    return ", ".join((*each, amounts[-1]) if not any(" " in one for one in each) else amounts)
