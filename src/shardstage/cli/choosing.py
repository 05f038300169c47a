"""What ``plan`` and ``rehearse`` do first: capture the model, settle the precision, choose or read the plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shardstage.graph.cache import Captured, cached
from shardstage.plan import Plan, Precision, check, complete, load_plan, named_decisions, parse_request
from shardstage.units import format_count, parse_bytes

if TYPE_CHECKING:  # what imports torch is imported when it is needed: help comes at once
    from shardstage.cluster import Cluster
    from shardstage.cost import Prediction
    from shardstage.graph import ModelGraph
    from shardstage.graph.source import ModelSource
    from shardstage.planner import MixedResult, Searcher, SearchResult

__all__ = [
    "Chosen",
    "KnownModel",
    "capture_model",
    "choose_plan",
    "headline",
    "known_model",
    "load_source",
    "precision_of",
]


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """What planning needs of a model: its graph, the longest sequence it has positions for, and notes on how it was had."""

    graph: ModelGraph
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
    return KnownModel(graph=captured.short.unfold(), max_sequence=captured.max_sequence, notes=notes)


def precision_of(plan: str, dtype: str | None, machine: Cluster) -> Precision:
    """The flag's, else the shorthand's or the plan file's, else what suits the device."""
    if dtype is not None:
        asked = parse_request(f"dtype={dtype}").precision
    elif plan.endswith(".toml"):
        asked = load_plan(plan).precision
    else:
        asked = None if plan == "auto" else parse_request(plan).precision
    default: Precision = "bfloat16" if machine.device.kind == "cuda" else "float32"
    return asked or default


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A plan with its price, and the search that found it where there was one."""

    plan: Plan
    prediction: Prediction
    found: SearchResult | None = None
    searcher: Searcher | None = None
    mixed: MixedResult | None = None


def choose_plan(
    text: str,
    graph: ModelGraph,
    machine: Cluster,
    num_ranks: int,
    batch: int,
    sequence: int,
    precision: Precision,
    memory: str | None,
    *,
    fix: str = "",
    is_runnable: bool = True,
) -> Chosen:
    """The plan that ``text`` asks for: ``auto`` within the decisions of ``fix``, a shorthand, or a file."""
    from shardstage.graph.file import fingerprint
    from shardstage.planner import Searcher, predict, search_mixed, usable_bytes

    if text == "auto" and machine.is_mixed:
        limits = [
            usable_bytes(machine.part(i)) if memory is None else parse_bytes(memory)
            for i in range(len(machine.parts))
        ]
        mixed = search_mixed(
            graph,
            machine,
            global_batch=batch,
            sequence=sequence,
            precision=precision,
            limits=limits,
            fix=parse_request(fix),
            fixed=named_decisions(fix),
        )
        best = replace(mixed.best, graph_fingerprint=fingerprint(graph))
        return Chosen(plan=best, prediction=mixed.prediction, mixed=mixed)
    if text == "auto":
        searcher = Searcher(
            graph,
            machine,
            num_ranks=num_ranks,
            global_batch=batch,
            sequence=sequence,
            precision=precision,
            fix=parse_request(fix),
            fixed=named_decisions(fix),
            is_runnable=is_runnable,
        )
        limit = usable_bytes(machine) if memory is None else parse_bytes(memory)
        found = searcher.best(limit)
        best = replace(found.best, graph_fingerprint=found.certificate.graph)
        return Chosen(plan=best, prediction=found.prediction, found=found, searcher=searcher)
    if text.endswith(".toml"):
        chosen = load_plan(text)
    else:
        request = parse_request(text)
        chosen = complete(
            request,
            graph,
            num_ranks=num_ranks,
            global_batch=batch,
            sequence=sequence,
            precision=precision,
            cluster=machine,
        )
    chosen = replace(chosen, graph_fingerprint=chosen.graph_fingerprint or fingerprint(graph))
    check(chosen, graph, num_ranks=num_ranks, cluster=machine)
    return Chosen(plan=chosen, prediction=predict(graph, chosen, machine))


def headline(model: str, graph: ModelGraph, machine: Cluster, num_ranks: int) -> str:
    devices = f"{num_ranks} × {machine.device.name}"
    if machine.is_mixed:
        devices = " + ".join(f"{part.num_devices} × {part.device.name}" for part in machine.parts)
    return f"[bold]{model}[/]  {format_count(graph.num_parameters)} parameters, on {devices}"
