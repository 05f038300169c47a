"""What ``plan`` and ``rehearse`` do first: capture the model, settle the precision, choose or read the plan."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rich.markup import escape

from shardstage.cli.fixing import Fixed
from shardstage.cost.readings import Readings
from shardstage.graph.cache import Captured, cached, readings_path
from shardstage.plan import Plan, Precision, check, check_samples, complete, load_plan, parse_request
from shardstage.units import format_count

if TYPE_CHECKING:  # what imports torch is imported when it is needed: help comes at once
    from shardstage.cluster import Cluster
    from shardstage.cost import Prediction
    from shardstage.graph import ModelGraph
    from shardstage.graph.source import ModelSource
    from shardstage.planner import MixedResult, MixedSearcher, Searcher, SearchResult

__all__ = [
    "Chosen",
    "KnownModel",
    "Question",
    "asked_samples",
    "capture_model",
    "choose_plan",
    "chosen_mixed",
    "headline",
    "known_model",
    "load_source",
    "precision_of",
    "setting",
]


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """What planning needs of a model: its graph, the longest sequence it has positions for, and notes on how it was had; ``readings`` of
    earlier searches."""

    graph: ModelGraph
    readings: Readings = field(default_factory=Readings)
    max_sequence: int | None = None
    notes: tuple[str, ...] = ()


def load_source(model: str) -> ModelSource:
    """Where a model comes from."""
    from shardstage.graph.source import load_model

    return load_model(model)


def capture_model(source: ModelSource, sequence: int, precision: Precision) -> ModelGraph:
    """The model's graph."""
    from shardstage.graph.capture import capture

    return capture(source, sequence=sequence, dtype=precision)


def known_model(model: str, sequence: int, precision: Precision) -> KnownModel:
    """The graph of the model of that name, from the cache where it is there: then neither torch nor the model is loaded."""

    def capture() -> Captured:
        from shardstage.graph.capture import capture_short

        source = load_source(model)
        short = capture_short(source, sequence=sequence, dtype=precision)
        return Captured(short=short, max_sequence=source.max_sequence)

    captured, notes = cached(model, sequence=sequence, dtype=precision, capture=capture)
    return KnownModel(
        graph=captured.unfold(),
        readings=Readings(readings_path(model, sequence=sequence, dtype=precision)),
        max_sequence=captured.max_sequence,
        notes=notes,
    )


def precision_of(plan: str, dtype: str | None, machine: Cluster) -> Precision:
    """The flag's, else the shorthand's or the plan file's, else what suits the device."""
    if dtype is not None:
        asked = parse_request(f"dtype={dtype}").precision
    elif plan.endswith(".toml"):
        asked = load_plan(plan).precision
    else:
        asked = None if plan == "auto" else parse_request(plan).precision
    parts = map(machine.part, range(len(machine.parts)))
    gpus = [part.device for part in parts if part.device.kind == "cuda"]
    is_on_gpus = machine.device.kind == "cuda"
    return asked or ("bfloat16" if is_on_gpus and all(gpu.has_bfloat16 for gpu in gpus) else "float32")


def asked_samples(plan: str, *, batch: int | None, sequence: int | None) -> tuple[int | None, int | None]:
    """Samples of a step and tokens of one: what was typed, which is refused beside a plan file for others; else the file's, if any."""
    if not plan.endswith(".toml"):
        return batch, sequence
    planned = load_plan(plan)
    if planned.sequence is None:  # of samples that are no text
        tokens = None
    else:
        tokens = sequence = sequence or planned.sequence
    check_samples(planned, plan, global_batch=batch or planned.global_batch, sequence=tokens)
    return planned.global_batch, sequence


@dataclass(frozen=True, kw_only=True)
class Question:
    """What somebody asks of a plan, which is ``auto``, a shorthand or a plan file.

    A rank may hold ``memory_bytes``, or a share of what its device can. Where a search answers, ``fixed`` is what it may not change.
    """

    plan: str
    num_ranks: int
    batch: int
    sequence: int
    precision: Precision
    memory_bytes: int | None = None
    memory_ratio: float = 1.0
    fixed: Fixed = field(default_factory=Fixed)

    @property
    def is_open(self) -> bool:
        """Whether a search is to answer it."""
        return self.plan == "auto"

    @property
    def is_file(self) -> bool:
        return self.plan.endswith(".toml")

    def sequence_of(self, graph: ModelGraph) -> int | None:
        """Tokens of a sample; None where samples are no text, an image's patches, say."""
        return None if graph.sequence is None and not graph.is_sequence_scalable else self.sequence

    def limit_bytes(self, machine: Cluster) -> int:
        """What a rank may hold of a device: never more than that has."""
        from shardstage.planner import usable_bytes

        if self.memory_bytes is not None:
            return min(self.memory_bytes, machine.device.memory_bytes)
        return int(self.memory_ratio * usable_bytes(machine))

    def limits(self, machine: Cluster) -> tuple[int, ...]:
        """What a rank may hold of each class of a machine."""
        return tuple(self.limit_bytes(machine.part(number)) for number in range(len(machine.parts)))


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A plan with its price, and the search that found it where there was one.

    ``alone`` are the devices of the one class that it is for, where others of the machine are left out.
    """

    plan: Plan
    prediction: Prediction
    found: SearchResult | None = None
    searcher: Searcher | None = None
    mixed: MixedResult | None = None
    mixed_searcher: MixedSearcher | None = None
    alone: Cluster | None = None


def choose_plan(
    question: Question, graph: ModelGraph, machine: Cluster, readings: Readings | None = None
) -> Chosen:
    """The plan that was asked for, with its price. ``PlanError`` where there is none."""
    if not question.is_open:
        return _given(question, graph, machine)
    if machine.is_mixed:
        return _search_mixed(question, graph, machine, readings)
    return _search(question, graph, machine, readings)


def _search(question: Question, graph: ModelGraph, machine: Cluster, readings: Readings | None) -> Chosen:
    from shardstage.planner import Searcher, best_in_whole_blocks

    searcher = Searcher(
        graph,
        machine,
        num_ranks=question.num_ranks,
        global_batch=question.batch,
        sequence=question.sequence_of(graph),
        precision=question.precision,
        fix=question.fixed.request,
        fixed=question.fixed.names,
        is_runnable=question.fixed.is_runnable,
        readings=readings,
    )
    found = best_in_whole_blocks(searcher, question.limit_bytes(machine))
    best = replace(found.best, graph_fingerprint=found.certificate.graph)
    return Chosen(plan=best, prediction=found.prediction, found=found, searcher=searcher)


def _search_mixed(
    question: Question, graph: ModelGraph, machine: Cluster, readings: Readings | None
) -> Chosen:
    from shardstage.planner import MixedSearcher, nothing_fits

    searcher = MixedSearcher(
        graph,
        machine,
        global_batch=question.batch,
        sequence=question.sequence_of(graph),
        precision=question.precision,
        fix=question.fixed.request,
        fixed=question.fixed.names,
        is_runnable=question.fixed.is_runnable,
        readings=readings,
    )
    limits = question.limits(machine)
    found = searcher.find(limits)
    if found is None:
        raise nothing_fits(searcher, limits)
    return chosen_mixed(found, searcher)


def chosen_mixed(found: MixedResult, searcher: MixedSearcher) -> Chosen:
    """The plan of a search over several classes of devices."""
    best = replace(found.best, graph_fingerprint=found.certificate.graph)
    return Chosen(plan=best, prediction=found.prediction, mixed=found, mixed_searcher=searcher)


def _given(question: Question, graph: ModelGraph, machine: Cluster) -> Chosen:
    """A plan file, or the plan that a shorthand stands for."""
    from shardstage.planner import predict

    if question.is_file:
        plan = load_plan(question.plan)
    else:
        plan = complete(
            parse_request(question.plan),
            graph,
            num_ranks=question.num_ranks,
            global_batch=question.batch,
            sequence=question.sequence_of(graph),
            precision=question.precision,
            cluster=machine,
        )
    plan = replace(plan, graph_fingerprint=plan.graph_fingerprint or graph.fingerprint)
    check(plan, graph, num_ranks=question.num_ranks, cluster=machine)
    return Chosen(plan=plan, prediction=predict(graph, plan, machine))


def headline(model: str, graph: ModelGraph, machine: Cluster, num_ranks: int) -> str:
    return f"[bold]{escape(model)}[/]  {setting(graph, machine, num_ranks)}"


def setting(graph: ModelGraph, machine: Cluster, num_ranks: int) -> str:
    """How large the model is, and what it is planned for."""
    devices = f"{num_ranks:,} × {machine.device.name}"
    if machine.is_mixed:
        devices = " + ".join(f"{part.num_devices:,} × {part.device.name}" for part in machine.parts)
    return f"{format_count(graph.num_parameters)} parameters, on {devices}"
