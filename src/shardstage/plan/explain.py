"""``explain``: a plan in words and tables: who does what, what it holds, what it says to whom, and what could not be shared."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Final

from shardstage.cost import Folded, Prediction, fold, rank_memory, stage_memory
from shardstage.cost.memory import MOMENTS, MemoryUse, stage_elements
from shardstage.graph import ModelGraph
from shardstage.layout import Mesh
from shardstage.plan.order import any_cluster, profile_of, setup_of
from shardstage.plan.plan import Plan
from shardstage.plan.schedule import schedule_of
from shardstage.sharding import shard
from shardstage.units import format_bytes, format_count, format_ratio, format_s

__all__ = ["explain"]

MAX_RANKS_DRAWN: Final = 64


def explain(plan: Plan, graph: ModelGraph, *, prediction: Prediction | None = None) -> str:
    """The plan as text. Memory and shares of compute are those of ``prediction``, as are times; without it what the graph alone says."""
    priced = _Priced(plan, graph, prediction)
    sections = [
        _summary(plan, graph),
        _mesh(plan.mesh),
        _stages(priced),
        _memory(priced),
        _talk(priced),
        _unsharded(priced),
        () if prediction is None else _times(prediction),
    ]
    return "\n\n".join(filter(None, ("\n".join(lines) for lines in sections))) + "\n"


class _Priced:
    """A plan with its model's units, priced on a device where only balance counts, and with its price where that is known."""

    def __init__(self, plan: Plan, graph: ModelGraph, prediction: Prediction | None) -> None:
        positions = {op.name: index for index, op in enumerate(graph.ops)}
        boundaries = [positions[stage.first] for stage in plan.stages]
        self.plan = plan
        self.graph = graph
        self.starts = tuple(boundaries)
        self.folded: Folded = fold(graph, boundaries=boundaries, modules=plan.recompute_modules)
        custom = schedule_of(plan) if plan.schedule == "custom" else None
        starts = tuple(self.folded.unit_at(position) for position in boundaries)
        self.setup = setup_of(plan, self.folded, starts, custom)
        self.prediction = prediction
        cluster = any_cluster(plan.mesh.world_size)
        self.profile, _ = profile_of(plan, self.folded, self.setup, cluster)

    @property
    def stages(self) -> tuple[tuple[float, int, int], ...]:
        """Of each stage its seconds of a microbatch, the parameters and the bytes of a rank."""
        if self.prediction is not None:
            stages = self.prediction.stages
            return tuple((s.forward_s + s.backward_s, s.num_elements, s.memory.total_bytes) for s in stages)
        units, setup = self.profile.units, self.setup
        return tuple(
            (
                sum(units[i].forward_s + units[i].backward_s for i in setup.units_of(stage, self.profile)),
                stage_elements(self.profile, setup, stage),
                stage_memory(self.profile, setup, stage).total_bytes,
            )
            for stage in range(setup.num_stages)
        )

    @property
    def ranks(self) -> tuple[MemoryUse, ...]:
        """What the ranks at each pipeline coordinate hold."""
        if self.prediction is not None:
            return self.prediction.ranks
        return tuple(rank_memory(self.profile, self.setup, rank) for rank in range(self.plan.mesh.pp))


def _summary(plan: Plan, graph: ModelGraph) -> Iterator[str]:
    yield (
        f"model    {format_count(graph.num_parameters)} parameters in {len(graph.parameters)} tensors, "
        f"{len(graph.ops)} ops, {plan.precision}"
    )
    length = "" if plan.sequence is None else f" of {plan.sequence} tokens"
    shares = sorted(set(plan.shares), reverse=True)
    each = f"{shares[0]}" if len(shares) == 1 else f"{shares[-1]} to {shares[0]}"
    cut = (
        f"{plan.num_microbatches} microbatch{'' if plan.num_microbatches == 1 else 'es'} of {plan.microbatch}"
    )
    yield f"batch    {plan.global_batch} samples{length}: {each} a data-parallel rank, in {cut}"
    recompute = "by stage" if plan.stage_recompute else plan.recompute
    savers = [f"zero={plan.zero}", f"recompute={recompute}"]
    savers += [f"modules={'/'.join(plan.recompute_modules)}"] if plan.recompute_modules else []
    savers += [plan.schedule] if plan.mesh.pp > 1 else []
    savers += ["sequence parallel"] if plan.is_sequence_parallel else []
    savers += [f"experts dealt out to {plan.ep} ranks"] if plan.ep > 1 else []
    savers += ["whole experts on tensor-parallel ranks"] if plan.etp == 1 else []
    savers += [f"grads={plan.gradient_dtype}"] if plan.gradient_dtype else []
    savers += [f"offload={plan.offload}"] if plan.offload != "none" else []
    savers += ["compiled"] if plan.is_compiled else []
    yield f"with     {', '.join(savers)}"


def _mesh(mesh: Mesh) -> Iterator[str]:
    """Ranks as a picture: a block of columns for each stage, a row for each data-parallel rank, neighbours along tp side by side; those
    that share sequences below each other."""
    shared = f" × cp={mesh.cp}" if mesh.cp > 1 else ""
    yield f"mesh     dp={mesh.dp} × tp={mesh.tp} × pp={mesh.pp}{shared} on {mesh.world_size} ranks"
    if not 1 < mesh.world_size <= MAX_RANKS_DRAWN:
        return
    width = len(str(mesh.world_size - 1))
    rows = []
    for d, c in product(range(mesh.dp), range(mesh.cp)):
        cells = (
            " ".join(f"{mesh.rank(pp=p, dp=d, cp=c, tp=t):{width}}" for t in range(mesh.tp))
            for p in range(mesh.pp)
        )
        rows.append([f"dp={d} cp={c}" if mesh.cp > 1 else f"dp={d}", *cells])
    yield from _table(["", *(f"pp={p}" for p in range(mesh.pp))], rows)


def _stages(priced: _Priced) -> Iterator[str]:
    plan, graph, mesh = priced.plan, priced.graph, priced.plan.mesh
    of_stages = priced.stages
    compute = [seconds for seconds, _, _ in of_stages]
    of_ranks = [sum(compute[s] for s in priced.setup.stages_of(rank)) for rank in range(mesh.pp)]
    rows = []
    for stage, (seconds, elements, num_bytes) in enumerate(of_stages):
        stop = priced.starts[stage + 1] if stage + 1 < priced.setup.num_stages else len(graph.ops)
        rows.append(
            [
                str(stage),
                _modules(op.module for op in graph.ops[priced.starts[stage] : stop]),
                str(stop - priced.starts[stage]),
                format_ratio(seconds / sum(compute)),
                str(plan.recompute_of(stage)),
                format_count(elements),
                format_bytes(num_bytes),
            ]
        )
    yield "stages"
    yield from _table(
        ["", "modules", "ops", "time", "recompute", "parameters a rank", "peak memory a rank"], rows
    )
    if plan.mesh.pp > 1:
        who = "stage" if len(compute) == mesh.pp else "rank"
        yield f"  balance: the slowest {who} has {max(of_ranks) * mesh.pp / sum(of_ranks):.2f} × the mean"


def _modules(paths: Iterable[str]) -> str:
    """``model.embed_tokens … model.layers.3``: the first and the last module of a stage, not deeper than a layer."""
    shown = list(dict.fromkeys(re.sub(r"(\.\d+)\..*", r"\1", path) for path in paths if path))
    if not shown:
        return "-"
    return shown[0] if len(shown) == 1 else f"{shown[0]} … {shown[-1]}"


def _memory(priced: _Priced) -> Iterator[str]:
    """What the ranks at each pipeline coordinate hold."""
    uses = priced.ranks
    names = list(dict.fromkeys(name for use in uses for name, _ in use.categories()))
    names += ["host"] if any(use.host for use in uses) else []
    rows = [[str(s), *(format_bytes(getattr(use, name)) for name in names)] for s, use in enumerate(uses)]
    yield "memory a rank, at its peak"
    yield from _table(["", *names], rows)


def _talk(priced: _Priced) -> Iterator[str]:
    """Collectives of a step by axis, on the rank that has most of them."""
    rows = [*_tp_rows(priced), *_dp_rows(priced), *_pp_rows(priced), *_host_rows(priced)]
    if rows:
        yield "talk a step, on the busiest rank"
        yield from _table(["axis", "what", "calls", "bytes"], rows)
    others = [axis for axis, size in (("cp", priced.plan.mesh.cp), ("ep", priced.plan.ep)) if size > 1]
    if others:
        yield f"and what is sent along {' and '.join(others)}, which is priced and not counted here"


def _tp_rows(priced: _Priced) -> Iterator[list[str]]:
    m = priced.plan.num_microbatches
    by_stage = []
    for stage in range(priced.setup.num_stages):
        calls: Counter[str] = Counter()
        volume: Counter[str] = Counter()
        for index in priced.setup.units_of(stage, priced.profile):
            for kind, count, num_bytes in priced.profile.units[index].tp_bytes:
                calls[kind] += m * count
                volume[kind] += m * num_bytes
        by_stage.append((sum(volume.values()), calls, volume))
    _, calls, volume = max(by_stage, key=lambda found: found[0])
    yield from (["tp", kind, str(calls[kind]), format_bytes(volume[kind])] for kind in calls)


def _dp_rows(priced: _Priced) -> Iterator[list[str]]:
    setup = priced.setup
    if setup.mesh.dp == 1:
        return
    elements, busiest = max((stage_elements(priced.profile, setup, s), -s) for s in range(setup.num_stages))
    gradients, parameters = elements * setup.gradient_bytes, elements * setup.compute_bytes
    buckets = max(1, -(-parameters // setup.bucket_bytes))
    m = setup.num_microbatches
    if setup.sharding_level == 0:
        yield ["dp", "all_reduce of gradients", str(buckets), format_bytes(gradients)]
    elif setup.sharding_level == 1:
        yield ["dp", "reduce_scatter of gradients", str(buckets), format_bytes(gradients)]
        yield ["dp", "all_gather of parameters", str(buckets), format_bytes(parameters)]
    else:
        units = len(setup.units_of(-busiest, priced.profile))
        gathers = 2 * m if setup.sharding_level == 3 else 1
        yield ["dp", "reduce_scatter of gradients", str(m * units), format_bytes(m * gradients)]
        yield ["dp", "all_gather of parameters", str(gathers * units), format_bytes(gathers * parameters)]


def _pp_rows(priced: _Priced) -> Iterator[list[str]]:
    setup = priced.setup
    if setup.mesh.pp > 1:
        sent = max(priced.profile.units[start].input_bytes for start in setup.starts[1:])
        m = setup.num_microbatches
        yield ["pp", "activations and their gradients", str(2 * m), format_bytes(2 * m * sent)]


def _host_rows(priced: _Priced) -> Iterator[list[str]]:
    setup = priced.setup
    if not setup.is_offloaded:
        return
    held = max(rank_memory(priced.profile, setup, rank).host for rank in range(setup.mesh.pp))
    owned = held // ((1 + MOMENTS) * setup.master_bytes)
    yield ["host", "gradients, down", "1", format_bytes(owned * setup.gradient_bytes)]
    yield ["host", "new parameters, up", "1", format_bytes(owned * setup.stored_bytes)]


def _unsharded(priced: _Priced) -> Iterator[str]:
    """Ops that every tensor-parallel rank runs whole, those of repeated layers as one line."""
    if priced.plan.mesh.tp == 1:
        return
    sharding = shard(
        priced.folded.graph,
        num_ranks=priced.plan.mesh.tp,
        is_sequence_parallel=priced.plan.is_sequence_parallel,
        replicate=priced.plan.replicate,
    )
    if not sharding.unsharded:
        yield "every op with weights or heavy work is shared over tp"
        return
    modules = {op.name: op.module for op in priced.folded.graph.ops}
    lines = dict.fromkeys(
        (re.sub(r"\.\d+(?=\.|$)", ".*", modules[whole.op]), whole.reason, whole.source)
        for whole in sharding.unsharded
    )
    yield "not shared over tp: every rank runs it whole"
    yield from _table(["module", "why", "line"], [list(line) for line in lines])


def _times(prediction: Prediction) -> Iterator[str]:
    low, expected, high = (
        prediction.step_time_low_s,
        prediction.step_time_s,
        prediction.step_time_high_s,
    )
    yield f"step     {format_s(expected)} predicted ({format_s(low)} to {format_s(high)})"
    yield f"speed    {prediction.tokens_per_s:,.0f} tokens/s, MFU {format_ratio(prediction.mfu)}"
    waits = (
        ("tp", prediction.exposed_tp_s),
        ("dp", prediction.exposed_dp_s),
        ("pp", prediction.exposed_pp_s),
    )
    shown = ", ".join(f"{axis} {format_s(seconds)}" for axis, seconds in waits)
    bubble, optimizer = format_ratio(prediction.bubble_ratio), format_s(prediction.optimizer_s)
    yield f"waits    bubble {bubble} of the pipeline; exposed {shown}; optimizer {optimizer}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as their widest cell, indented by two."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for row in (heads, *rows):
        yield "  " + "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
