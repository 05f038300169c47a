"""``check``: refuses a plan that cannot run, before any rank starts, and says what is odd about one that can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import gcd
from typing import Final

from shardstage.cluster import Cluster, more_devices
from shardstage.cost import fold
from shardstage.cost.memory import MOMENTS
from shardstage.cost.offload import has_host_room
from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.graph.attention import ATTENTION
from shardstage.graph.blocks import within
from shardstage.graph.positions import num_positions
from shardstage.graph.recompute import num_counted
from shardstage.graph.saved import recomputed_ops
from shardstage.layout import AXES, Shard, balanced_sizes
from shardstage.plan.experts import require_dealt
from shardstage.plan.modules import require_modules
from shardstage.plan.plan import Plan
from shardstage.plan.schedule import schedule_of
from shardstage.plan.sequences import require_shared
from shardstage.sharding import shard
from shardstage.sharding.rules import is_random
from shardstage.units import dtype_bytes, format_bytes

__all__ = ["check", "require_runnable"]

LONG_ATTENTION: Final = 512
"""Tokens of a sample from which on scores are what a layer keeps most of: 7 B each in 16 bits (probabilities, dropped ones, the mask) for
34 B a feature of all else (Korthikanti et al. 2022), so that heads of 64 to 128 features are even at 311 to 622."""


def check(
    plan: Plan,
    graph: ModelGraph,
    *,
    num_ranks: int | None = None,
    cluster: Cluster | None = None,
    max_sequence: int | None = None,
    is_searched: bool = False,
) -> tuple[str, ...]:
    """Raises ``PlanError`` if ``plan`` cannot run ``graph``; returns sentences about what is allowed but hardly meant.

    ``max_sequence`` is the longest sample that the model says it was made for, ``num_ranks`` and ``cluster`` what there is to run on. Of a
    plan that ``is_searched`` nothing is said that advises what the search has found to be slower.
    """
    _check_model(plan, graph)
    _check_ranks(plan, num_ranks, cluster)
    _check_stages(plan, graph)
    _check_recompute(plan, graph)
    _check_batch(plan, graph)
    _check_gradients(plan)
    require_shared(plan.mesh.cp, graph)
    _check_experts(plan, graph, cluster)
    _check_host(plan, graph, cluster)
    schedule_of(plan)
    _check_sequence(plan, graph, max_sequence)
    noting = (noted for noted in _NOTES if not (is_searched and noted is _note_bubble))
    return tuple(note for noted in noting if (note := noted(plan, graph, cluster)))


def require_runnable(plan: Plan) -> None:
    """Raises ``PlanError`` for what has a price but is not run by this release."""
    mesh = plan.mesh
    reasons = {
        f"context parallelism (cp={mesh.cp})": mesh.cp > 1,
        f"expert parallelism (ep={plan.ep})": plan.ep > 1,
        "experts that tensor parallelism leaves whole (etp=1)": plan.etp == 1,
        f"ZeRO over a part of the replicas (zr={plan.zero_ranks})": plan.zero_ranks is not None,
        "data parallelism outside the pipeline (outer)": mesh.order != AXES,
    }
    for what, is_asked in reasons.items():
        if is_asked:
            raise PlanError(
                f"{what} is planned and priced, but not run by this release",
                hint="--plan auto chooses among what runs; shardstage plan --fix runnable does, too",
            )
    if plan.precision == "float16":
        raise PlanError(
            "float16, whose losses want scaling (dtype=fp16), is planned and priced, but not run by this release",
            hint='"dtype=fp32" in the plan, or --dtype float32, or precision = "float32" in the run file',
        )


def check_samples(plan: Plan, file: str, *, global_batch: int, sequence: int | None) -> None:
    """Refuses a plan file for other samples than are asked for: nobody would know which of the two was meant."""
    if (plan.global_batch, plan.sequence) == (global_batch, sequence):
        return
    asked, planned = (
        f"{batch} samples" + ("" if tokens is None else f" of {tokens} tokens")
        for batch, tokens in ((global_batch, sequence), (plan.global_batch, plan.sequence))
    )
    raise PlanError(
        f"the plan in {file} is for {planned} a step, and not for {asked}",
        hint=f"--batch {plan.global_batch}" + ("" if plan.sequence is None else f" --seq {plan.sequence}"),
    )


def _check_model(plan: Plan, graph: ModelGraph) -> None:
    if plan.graph_fingerprint and plan.graph_fingerprint != graph.fingerprint:
        raise PlanError(
            f"the plan was made for another model: its graph is {plan.graph_fingerprint[:12]}, "
            f"this one's {graph.fingerprint[:12]}",
            hint="--plan auto, or the model that the plan was made for",
        )
    dtypes = {graph.values[p.name].dtype for p in graph.parameters}
    floating = sorted(dtype for dtype in dtypes if "float" in dtype)
    if floating and plan.precision not in floating:
        raise PlanError(
            f"the plan computes in {plan.precision}, and the model was captured in {' and '.join(floating)}",
            hint=f'precision = "{plan.precision}" in the run file, or --plan "...,dtype={floating[0]}"',
        )


def _check_ranks(plan: Plan, num_ranks: int | None, cluster: Cluster | None) -> None:
    mesh = plan.mesh
    axes = f"dp={mesh.dp} × tp={mesh.tp} × pp={mesh.pp}" + (f" × cp={mesh.cp}" if mesh.cp > 1 else "")
    if num_ranks is not None and mesh.world_size != num_ranks:
        model_ranks, cp = mesh.tp * mesh.pp * mesh.cp, f",cp={mesh.cp}" if mesh.cp > 1 else ""
        raise PlanError(
            f"the plan is for {mesh.world_size} ranks ({axes}), and there are {num_ranks}",
            hint=f'--plan "dp={num_ranks // model_ranks},tp={mesh.tp},pp={mesh.pp}{cp}"'
            if num_ranks % model_ranks == 0
            else f"--ranks {mesh.world_size}",
        )
    if cluster is not None and mesh.world_size > cluster.num_devices:
        raise PlanError(
            f"the plan is for {mesh.world_size} ranks ({axes}), and cluster {cluster.name!r} has {cluster.num_devices} devices",
            hint=more_devices(cluster, mesh.world_size),
        )


def _check_stages(plan: Plan, graph: ModelGraph) -> None:
    """Stages suit the schedule and cover the ops in order: no gap, no overlap."""
    anew = f'--plan "pp={plan.mesh.pp}" cuts this model anew'
    if not plan.stages or len(plan.stages) % plan.mesh.pp:
        raise PlanError(
            f"the plan lists {len(plan.stages)} stages, and pp is {plan.mesh.pp}: every rank runs equally many",
            hint=f'--plan "pp={max(1, len(plan.stages))}", or one [[pipeline.stage]] for each stage',
        )
    index = {op.name: i for i, op in enumerate(graph.ops)}
    expected = 0
    for number, stage in enumerate(plan.stages):
        for name in (stage.first, stage.last):
            if name not in index:
                raise PlanError(f"stage {number} names op {name!r}, which the model does not have", hint=anew)
        first, last = index[stage.first], index[stage.last]
        if last < first:
            raise PlanError(
                f"stage {number} ends at op {stage.last!r}, before its first op {stage.first!r}",
                hint=f'first = "{stage.last}"\nlast = "{stage.first}"',
            )
        if first != expected:
            what = "leaves out" if first > expected else "runs again"
            wanted = graph.ops[expected].name if expected < len(graph.ops) else "none"
            raise PlanError(
                f"stage {number} begins at op {stage.first!r} and {what} ops: the next op is {wanted!r}",
                hint=f'first = "{wanted}"',
            )
        expected = last + 1
    if expected != len(graph.ops):
        raise PlanError(
            f"the last stage ends at op {plan.stages[-1].last!r}, and the model at {graph.ops[-1].name!r}",
            hint=f'last = "{graph.ops[-1].name}"',
        )


def _check_recompute(plan: Plan, graph: ModelGraph) -> None:
    """Where it is said stage by stage, no stage recomputes more layers than it has; modules are named for what is selective."""
    require_modules(plan.recompute_modules, graph, is_compiled=plan.is_compiled)
    if plan.recompute_modules and not plan.is_selective:
        named = "/".join(plan.recompute_modules)
        raise PlanError(
            f"modules={named} says what selective recomputation means, and the plan recomputes nothing selectively",
            hint=f'--plan "...,recompute=selective,modules={named}"',
        )
    if not plan.stage_recompute:
        return
    if len(plan.stage_recompute) != len(plan.stages):
        raise PlanError(
            f"the plan says what {len(plan.stage_recompute)} stages recompute, and has {len(plan.stages)} stages",
            hint=f"stage_recompute = {['full'] * len(plan.stages)}",
        )
    for stage, num_layers in enumerate(_layers_of_stages(plan, graph)):
        asked = plan.stage_recompute[stage]
        if num_counted(asked) > num_layers:
            modes = [str(mode) for mode in plan.stage_recompute]
            modes[stage] = "full" if num_layers else "none"
            raise PlanError(
                f"stage {stage} recomputes {num_counted(asked)} layers ({asked}), and it has {num_layers}",
                hint=f'--plan "...,stages={"/".join(modes)}"',
            )


def _layers_of_stages(plan: Plan, graph: ModelGraph) -> list[int]:
    """How many layers each stage has, parts of them counted; none are looked for where no number of them is said."""
    if not any(num_counted(plan.recompute_of(stage)) for stage in range(len(plan.stages))):
        return [0] * len(plan.stages)
    blocks, index = graph.blocks, {op.name: i for i, op in enumerate(graph.ops)}
    return [
        sum(block.is_layer for block in within(graph, blocks, index[stage.first], index[stage.last] + 1))
        for stage in plan.stages
    ]


def _check_batch(plan: Plan, graph: ModelGraph) -> None:
    shares, dp = plan.shares, plan.mesh.dp
    written = f"shares = {list(balanced_sizes(plan.global_batch, dp))}"
    if plan.global_batch < dp:
        raise PlanError(
            f"a batch of {plan.global_batch} samples leaves {dp - plan.global_batch} of {dp} data-parallel ranks without any",
            hint=f"--batch {dp}",
        )
    if len(shares) != dp:
        raise PlanError(
            f"the plan has shares for {len(shares)} data-parallel ranks, and dp is {dp}", hint=written
        )
    if sum(shares) != plan.global_batch:
        raise PlanError(
            f"the shares add up to {sum(shares)} samples, and the batch has {plan.global_batch}", hint=written
        )
    if min(shares) < 1:
        raise PlanError(f"data-parallel rank {shares.index(0)} gets no sample of the batch", hint=written)
    if not 1 <= plan.microbatch:
        raise PlanError(f"a microbatch of {plan.microbatch} samples is none", hint="microbatch = 1")
    if min(shares) < plan.num_microbatches:
        least = -(-max(shares) // min(shares))
        raise PlanError(
            f"data-parallel rank {shares.index(min(shares))} has {min(shares)} samples for {plan.num_microbatches} microbatches: "
            "every rank runs equally many, and none may be empty",
            hint=f"microbatch = {least}",
        )
    if not graph.is_scalable and {graph.microbatch} != {s for d in range(dp) for s in plan.microbatches(d)}:
        raise PlanError(
            f"this model's graph holds for microbatches of exactly {graph.microbatch} samples, "
            f"and the plan has some of {sorted({s for d in range(dp) for s in plan.microbatches(d)})}",
            hint=f'--plan "...,mb={graph.microbatch}" with a batch that it divides',
        )


def _check_gradients(plan: Plan) -> None:
    """Gradients may be as narrow as computation, not narrower, and no wider than master weights are."""
    if plan.gradient_dtype == "bfloat16" and plan.precision != "bfloat16":
        raise PlanError(
            f"gradients are to be summed in bfloat16, and the model computes in {plan.precision}: that would lose digits that it has",
            hint='--plan "...,dtype=bf16,grads=bf16", or leave out grads=bf16',
        )
    if plan.gradient_dtype == "float32" and plan.precision == "float64":
        raise PlanError(
            "gradients are to be summed in float32, and the model computes in float64: that would lose digits that it has",
            hint="leave out grads=fp32",
        )


def _check_experts(plan: Plan, graph: ModelGraph, cluster: Cluster | None) -> None:
    """Experts that replicas deal out among them, or that tensor-parallel ranks leave whole, and deal out among neighbours."""
    mesh = plan.mesh
    require_dealt(plan.ep, graph)
    if plan.etp is None:
        if mesh.num_replicas % plan.ep:
            may_be_whole = mesh.tp > 1 and mesh.tp * mesh.num_replicas % plan.ep == 0
            alone = f"ep={gcd(plan.ep, mesh.num_replicas)}"
            raise PlanError(
                f"ep={plan.ep} does not divide the {mesh.num_replicas} replicas that experts are dealt out to",
                hint=f'--plan "...,ep={plan.ep},etp=1", or {alone}' if may_be_whole else alone,
            )
        return
    if mesh.tp == 1:
        raise PlanError(
            "etp=1 leaves experts whole on tensor-parallel ranks, and tp is 1", hint="leave out etp=1"
        )
    if not fold(graph).can_have_whole_experts:
        raise PlanError(
            "etp=1 leaves experts whole, and this model has no layer of experts whose tokens can be dealt out to ranks",
            hint="leave out etp=1",
        )
    if mesh.order != AXES and min(mesh.pp, mesh.dp) > 1:
        raise PlanError(
            "etp=1 deals experts out among neighbouring ranks, and outside the pipeline replicas are no neighbours",
            hint="leave out outer, or etp=1",
        )
    holders = mesh.tp * mesh.num_replicas
    if holders % plan.ep:
        raise PlanError(
            f"ep={plan.ep} does not divide the {holders} ranks (tp={mesh.tp} × {mesh.num_replicas} replicas) that hold whole experts",
            hint=f'--plan "...,ep={gcd(plan.ep, holders)},etp=1"',
        )


def _check_host(plan: Plan, graph: ModelGraph, cluster: Cluster | None) -> None:
    """The least that an offloaded optimizer takes of the host's memory, were all ranks to share it evenly."""
    if plan.offload == "none" or cluster is None or cluster.is_mixed:
        return
    device, mesh = cluster.device, plan.mesh
    element_bytes = max(4, dtype_bytes(plan.precision))
    shards = (plan.zero_ranks or mesh.num_replicas) if plan.zero else 1
    least_bytes = (1 + MOMENTS) * element_bytes * graph.num_parameters // (mesh.tp * mesh.pp * shards)
    if device.host is not None and not has_host_room(least_bytes, device):
        raise PlanError(
            f"an offloaded optimizer takes at least {format_bytes(least_bytes)} a rank of the host's memory, "
            f"and a {device.name} has {format_bytes(device.host.memory_bytes)} of it",
            hint='--plan "...,zero=1,offload=optimizer" cuts it over the data-parallel ranks'
            if not plan.zero
            else "--ranks with more devices",
        )


def _check_sequence(plan: Plan, graph: ModelGraph, max_sequence: int | None) -> None:
    max_sequence = min(filter(None, (max_sequence, num_positions(graph))), default=None)
    if max_sequence is not None and plan.sequence is not None and plan.sequence > max_sequence:
        raise PlanError(
            f"samples of {plan.sequence} tokens are longer than the {max_sequence} positions that the model has",
            hint=f"--seq {max_sequence}",
        )
    if not graph.is_sequence_scalable and plan.sequence not in (None, graph.sequence):
        raise PlanError(
            f"this model's graph holds for samples of {graph.sequence} tokens only, not {plan.sequence}",
            hint=f"--seq {graph.sequence}",
        )


def _note_bubble(plan: Plan, _graph: ModelGraph, _cluster: Cluster | None) -> str:
    p, m = plan.mesh.pp, plan.num_microbatches
    if p == 1 or m >= p:
        return ""
    more = replace(plan, microbatch=max(1, max(plan.shares) // (2 * p))).num_microbatches
    advice = (
        f": mb={max(1, max(plan.shares) // (2 * p))} makes {more}"
        if more > m
        else ": a larger batch gives more"
    )
    who = f"{m} microbatches keep" if m > 1 else "1 microbatch keeps"
    return f"{who} {p} stages busy {100 * m / (m + p - 1):.0f} % of the time{advice}"


def _note_recompute(plan: Plan, graph: ModelGraph, _cluster: Cluster | None) -> str:
    count, most = num_counted(plan.recompute), max(_layers_of_stages(plan, graph))
    if plan.stage_recompute or count <= most:
        return ""
    return f"recompute={plan.recompute} counts {count} layers, and a stage has {most} at most: all of them are recomputed"


def _note_modules(plan: Plan, graph: ModelGraph, _cluster: Cluster | None) -> str:
    """Modules that keep nothing for backward, or only what is changed in place."""
    modules = plan.recompute_modules
    if not modules or any(recomputed_ops(graph, 0, len(graph.ops), "selective", modules=modules)):
        return ""
    return f"modules={'/'.join(modules)} recomputes nothing: these modules keep nothing that could be computed again"


def _note_zero(plan: Plan, _graph: ModelGraph, _cluster: Cluster | None) -> str:
    if plan.zero and plan.mesh.num_replicas == 1:
        return f"zero={plan.zero} changes nothing with dp=1: it shards over data-parallel ranks"
    return ""


def _note_microbatch(plan: Plan, _graph: ModelGraph, _cluster: Cluster | None) -> str:
    most = max(plan.shares)
    if plan.microbatch <= most:
        return ""
    return f"mb={plan.microbatch} is more than the {most} samples of a data-parallel rank: one microbatch has them all"


def _note_schedule(plan: Plan, _graph: ModelGraph, _cluster: Cluster | None) -> str:
    if plan.mesh.pp > 1 or plan.schedule == "1f1b":
        return ""
    return f"schedule={plan.schedule} changes nothing with pp=1"


def _note_zero_pipeline(plan: Plan, _graph: ModelGraph, _cluster: Cluster | None) -> str:
    if plan.zero >= 2 and plan.mesh.dp > 1 and plan.num_microbatches > 1:
        what = "gathers parameters and reduces gradients" if plan.zero == 3 else "reduces gradients"
        return f"zero={plan.zero} {what} {plan.num_microbatches} times a step, once for each microbatch"
    return ""


def _note_dropped_attention(plan: Plan, graph: ModelGraph, _cluster: Cluster | None) -> str:
    is_long = (plan.sequence or 0) >= LONG_ATTENTION
    if not is_long or not any(op.target == ATTENTION and is_random(op) for op in graph.ops):
        return ""
    return (
        "attention drops probabilities, and is written out for that, with scores of all tokens to all: "
        "without that dropout (attention_dropout or attn_pdrop 0 in its config) one kernel does it"
    )


def _note_sequence_parallel(plan: Plan, _graph: ModelGraph, _cluster: Cluster | None) -> str:
    return "sp changes nothing with tp=1" if plan.is_sequence_parallel and plan.mesh.tp == 1 else ""


def _note_shares_of_tp(plan: Plan, graph: ModelGraph, _cluster: Cluster | None) -> str:
    """Weights of which a rank gets nothing, because they have fewer units (heads, say) than there are ranks."""
    if plan.mesh.tp == 1:
        return ""
    sharding = shard(
        fold(graph).graph,
        num_ranks=plan.mesh.tp,
        is_sequence_parallel=plan.is_sequence_parallel,
        replicate=plan.replicate,
    )
    cut = {fqn: p for fqn, p in sharding.parameters.items() if isinstance(p, Shard)}
    if not cut:
        return f"tp={plan.mesh.tp} shares no weight of this model: every rank computes everything"
    for fqn, placement in cut.items():
        num_empty = placement.sizes().count(0)
        if num_empty:
            return f"{num_empty} of {plan.mesh.tp} tensor-parallel ranks get nothing of {fqn}, which has too few units to share"
    return ""


def _note_links(plan: Plan, _graph: ModelGraph, cluster: Cluster | None) -> str:
    if cluster is None or plan.mesh.tp == 1:
        return ""
    innermost, level = cluster.levels[0], cluster.level_for(range(plan.mesh.tp))
    if level == innermost:
        return ""
    num_near = cluster.devices_per(innermost)
    return f"tp={plan.mesh.tp} talks over the {level.name} ({num_near} devices share a {innermost.name})"


def _note_offload(plan: Plan, _graph: ModelGraph, cluster: Cluster | None) -> str:
    if plan.offload != "none" and cluster is not None and cluster.device.kind == "cpu":
        return f"offload={plan.offload} saves nothing on CPUs: the host's memory is the device's"
    return ""


def _note_bucket(plan: Plan, _graph: ModelGraph, _cluster: Cluster | None) -> str:
    if plan.mesh.dp > 1 and plan.zero < 2 and plan.bucket_bytes < 2**20:
        return f"buckets of {format_bytes(plan.bucket_bytes)} make many small reductions"
    return ""


def _note_dtype(plan: Plan, _graph: ModelGraph, cluster: Cluster | None) -> str:
    """Of CUDA devices without bfloat16 in their tensor cores, on which torch computes it nonetheless."""
    device = None if cluster is None else cluster.device
    if device is None or device.kind != "cuda" or device.has_bfloat16 or plan.precision == "float16":
        return ""
    rates = device.flops_per_s
    if not {"float16", plan.precision} <= set(rates):
        return ""
    times = rates["float16"] / rates[plan.precision]
    gain = rates.get("float32", 0) / rates[plan.precision]
    what_runs = f"; dtype=fp32, {gain:.1f} times that rate, is run" if gain > 1 else ""
    return (
        f"the tensor cores of {device.name} take float16 and no bfloat16: dtype=fp16, {times:.0f} times the rate of {plan.precision}, "
        f"is planned and priced, but not run by this release{what_runs}"
    )


_NOTES: Final[tuple[Callable[[Plan, ModelGraph, Cluster | None], str], ...]] = (
    _note_bubble,
    _note_microbatch,
    _note_schedule,
    _note_recompute,
    _note_modules,
    _note_zero,
    _note_zero_pipeline,
    _note_dropped_attention,
    _note_sequence_parallel,
    _note_shares_of_tp,
    _note_links,
    _note_offload,
    _note_bucket,
    _note_dtype,
)
