"""What a plan is refused for, before any rank starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.cost.toy import toy_graph
from transformers import GPT2Config, GPT2LMHeadModel

from shardstage.cluster import load
from shardstage.errors import PlanError
from shardstage.graph.capture import capture
from shardstage.graph.file import fingerprint
from shardstage.graph.recompute import PartialRecompute
from shardstage.layout import Mesh
from shardstage.plan import Plan, StageRange, check, complete, parse_request
from shardstage.plan.check import require_runnable
from shardstage.plan.modules import require_modules

GRAPH = toy_graph(num_layers=4)
FIXED = GRAPH.at(microbatch=4, sequence=64)
PLAN = complete(parse_request("dp=2,pp=2"), GRAPH, num_ranks=4, global_batch=16, sequence=64)


def stages(*names: str) -> tuple[StageRange, ...]:
    return tuple(StageRange(first=a, last=b) for a, b in zip(names[::2], names[1::2], strict=True))


def test_a_good_plan_passes_without_a_word() -> None:
    assert check(PLAN, GRAPH, num_ranks=4, cluster=load("h100:4"), max_sequence=64) == ()
    assert check(replace(PLAN, graph_fingerprint=fingerprint(GRAPH)), GRAPH) == ()


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"graph_fingerprint": "0123456789abcdef"}, "made for another model: its graph is 0123456789ab", "--plan auto"),
        ({"precision": "bfloat16"}, "computes in bfloat16, and the model was captured in float32", "dtype=float32"),
        ({"mesh": Mesh(dp=4, pp=2)}, r"for 8 ranks \(dp=4 × tp=1 × pp=2\), and there are 4", 'dp=2,tp=1,pp=2'),
        ({"mesh": Mesh(dp=1, tp=3, pp=2)}, "for 6 ranks", "--ranks 6"),
        ({"mesh": Mesh(dp=1, tp=2, pp=2)}, "shares for 2 data-parallel ranks, and dp is 1", "shares = [16]"),
        ({"stages": stages("embed", "loss")}, "lists 1 stages, and pp is 2", 'pp=1'),
        ({"stages": stages("embed", "x", "up_2", "loss")}, "stage 0 names op 'x', which the model", 'pp=2'),
        ({"stages": stages("embed", "add_1", "up_3", "loss")}, "stage 1 begins at op 'up_3' and leaves out", 'first = "up_2"'),
        ({"stages": stages("embed", "add_1", "up_1", "loss")}, "stage 1 begins at op 'up_1' and runs again", 'first = "up_2"'),
        ({"stages": stages("up_0", "add_1", "up_2", "loss")}, "stage 0 begins at op 'up_0' and leaves out", 'first = "embed"'),
        ({"stages": stages("embed", "add_1", "up_2", "add_3")}, "ends at op 'add_3', and the model at 'loss'", 'last = "loss"'),
        ({"stages": stages("embed", "loss", "embed", "loss")}, "runs again ops: the next op is 'none'", "first ="),
        ({"stages": stages("add_1", "embed", "up_2", "loss")}, "stage 0 ends at op 'embed', before its first", 'first = "embed"'),
        ({"global_batch": 1, "shares": (1, 0)}, "a batch of 1 samples leaves 1 of 2", "--batch 2"),
        ({"shares": (16,)}, "shares for 1 data-parallel ranks, and dp is 2", "shares = [8, 8]"),
        ({"shares": (8, 7)}, "add up to 15 samples, and the batch has 16", "shares = [8, 8]"),
        ({"shares": (16, 0)}, "data-parallel rank 1 gets no sample", "shares = [8, 8]"),
        ({"microbatch": 0}, "a microbatch of 0 samples is none", "microbatch = 1"),
        ({"shares": (14, 2), "microbatch": 2}, "rank 1 has 2 samples for 7 microbatches", "microbatch = 7"),
        ({"stage_recompute": ("full",)}, "what 1 stages recompute, and has 2 stages", "stage_recompute = ['full', 'full']"),
        (
            {"stage_recompute": ("none", PartialRecompute(full=2, selective=3))},
            r"stage 1 recomputes 5 layers \(full:2\+selective:3\), and it has 2",
            'stages=none/full"',
        ),
        ({"gradient_dtype": "bfloat16"}, "gradients are to be summed in bfloat16, and the model computes in float32", "grads=bf16"),
        ({"recompute_modules": ("*.up",)}, "the plan recomputes nothing selectively", 'recompute=selective,modules=*.up"'),
        (
            {"recompute_modules": ("*.up", "*.ups"), "recompute": "selective"},
            r"modules=\*.ups matches no module in a layer of this model, which are called layers.3.down and the like",
            'recompute=selective,modules=*.up"',
        ),
        ({"recompute_modules": ("embed",), "recompute": "selective"}, "modules=embed matches no module in a layer", 'modules=*"'),
        (
            {"recompute_modules": ("*.up",), "recompute": "selective", "is_compiled": True},
            "compile makes one kernel plan for each layer as a whole",
            "compile,recompute=full",
        ),
        ({"sequence": 65}, "samples of 65 tokens are longer than the 64 positions", "--seq 64"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_run_is_refused(changes: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        check(replace(PLAN, **changes), GRAPH, num_ranks=4, max_sequence=64)
    assert caught.value.hint is not None and hint in caught.value.hint


def test_a_plan_for_more_devices_than_the_cluster_has_is_refused() -> None:
    with pytest.raises(PlanError, match=r"for 4 ranks .* cluster 'h100' has 2 devices") as caught:
        check(PLAN, GRAPH, cluster=load("h100:2"))
    assert caught.value.hint == "--cluster h100:4"


def test_a_graph_of_one_size_takes_plans_of_that_size_only() -> None:
    whole = replace(PLAN, microbatch=4)
    assert check(whole, FIXED) == ()
    with pytest.raises(
        PlanError, match="microbatches of exactly 4 samples, and the plan has some of"
    ) as caught:
        check(replace(whole, microbatch=3), FIXED)
    assert caught.value.hint is not None and "mb=4" in caught.value.hint
    with pytest.raises(PlanError, match="samples of 64 tokens only, not 32"):
        check(replace(whole, sequence=32), FIXED)


def notes(text: str, *, ranks: int = 4, batch: int = 16, cluster: str = "") -> str:
    plan: Plan = complete(parse_request(text), GRAPH, num_ranks=ranks, global_batch=batch, sequence=64)
    return "\n".join(check(plan, GRAPH, cluster=load(cluster) if cluster else None))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pp=4,mb=8", "2 microbatches keep 4 stages busy 40 % of the time: mb=2 makes 8"),
        ("tp=4,zero=1", "zero=1 changes nothing with dp=1"),
        ("dp=4,mb=64", "mb=64 is more than the 4 samples of a data-parallel rank"),
        ("dp=4,schedule=zb-h1", "schedule=zb-h1 changes nothing with pp=1"),
        ("dp=4,sp", "sp changes nothing with tp=1"),
        ("dp=4,zero=2,mb=2", "zero=2 reduces gradients 2 times a step, once for each microbatch"),
        ("dp=4,zero=3,mb=2", "zero=3 gathers parameters and reduces gradients 2 times a step"),
    ],
)
def test_what_is_allowed_but_hardly_meant_is_said(text: str, said: str) -> None:
    assert said in notes(text)


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        (
            "v100-32:4",
            "take float16 and no bfloat16: dtype=fp16, 6 times the rate of float32, is planned and priced, but not run",
        ),
        ("rtx-3090:4", ""),
        ("cpu:4", ""),
    ],
)
def test_where_tensor_cores_take_only_float16_it_is_said_what_that_would_gain(
    cluster: str, said: str
) -> None:
    found = notes("dp=4,dtype=fp32", cluster=cluster)
    assert said in found if said else "tensor cores" not in found


def test_bfloat16_without_tensor_cores_for_it_is_slower_than_float32() -> None:
    """Torch computes it on a V100 nonetheless: at 10.65 TFLOP/s, where float32 reaches 14.5."""
    values = {
        name: replace(value, dtype="bfloat16") if value.dtype == "float32" else value
        for name, value in GRAPH.values.items()
    }
    graph, cluster = replace(GRAPH, values=values), load("v100-16:4")
    plan = replace(PLAN, precision="bfloat16", graph_fingerprint="")
    said = "\n".join(check(plan, graph, cluster=cluster))
    assert (
        "dtype=fp16, 9 times the rate of bfloat16" in said
        and "dtype=fp32, 1.4 times that rate, is run" in said
    )
    rates = {"float32": 1.0, "bfloat16": 1.0}
    measured = replace(cluster, device=replace(cluster.device, flops_per_s=rates, kernels=None))
    assert check(plan, graph, cluster=measured) == ()


def test_float16_is_priced_and_not_run() -> None:
    plan = replace(PLAN, precision="float16")
    with pytest.raises(
        PlanError, match=r"losses want scaling .* priced, but not run by this release"
    ) as caught:
        require_runnable(plan)
    assert "--dtype float32" in str(caught.value.hint)
    require_runnable(PLAN)


def test_zero_over_ranks_that_share_sequences_is_no_mistake() -> None:
    assert "zero" not in notes("cp=4,zero=1")


def test_experts_are_dealt_out_where_there_are_some() -> None:
    with pytest.raises(PlanError, match="ep=2 deals experts out to ranks, and this model has no layer"):
        notes("dp=4,ep=2")


def test_modules_of_any_stage_may_be_named() -> None:
    some = PartialRecompute(full=1, selective=None)
    plan = replace(PLAN, stage_recompute=("full", some), recompute_modules=("layers.[23]",))
    assert check(plan, GRAPH) == ()


@pytest.mark.parametrize("asked", ["*.dwon", "*.up.1", "embedd", "nothing.alike"])
def test_the_hint_for_a_module_that_is_not_there_names_one_that_is(asked: str) -> None:
    flat = replace(GRAPH, ops=tuple(replace(op, module=op.module.rpartition(".")[2]) for op in GRAPH.ops))
    for graph in (GRAPH, flat):
        with pytest.raises(PlanError, match="matches no module in a layer") as caught:
            require_modules((asked,), graph)
        hint = (caught.value.hint or "").rpartition("modules=")[2].strip('"')
        require_modules(hint.split("/"), graph)


def test_modules_that_keep_nothing_are_said() -> None:
    plan = replace(PLAN, recompute="selective", recompute_modules=("*.up",))
    assert check(plan, GRAPH) == (
        "modules=*.up recomputes nothing: these modules keep nothing that could be computed again",
    )


def test_a_batch_too_small_for_the_pipeline_is_said() -> None:
    assert "2 microbatches keep 4 stages busy 40 % of the time: a larger batch" in notes("pp=4", batch=2)


def test_a_plan_that_a_search_has_found_gets_no_advice_against_it() -> None:
    """The best of all plans had one microbatch in two stages, and a note beside its proof told how to make more of them."""
    plan = complete(parse_request("pp=4,mb=16"), GRAPH, num_ranks=4, global_batch=16, sequence=64)
    assert check(plan, GRAPH) == ("1 microbatch keeps 4 stages busy 25 % of the time: mb=2 makes 8",)
    assert check(plan, GRAPH, is_searched=True) == ()


def test_tensor_parallelism_across_nodes_is_said() -> None:
    said = notes("tp=16", ranks=16, cluster="h100:16")
    assert "tp=16 talks over the network (8 devices share a node)" in said


def test_tensor_parallelism_that_shares_nothing_is_said() -> None:
    assert "tp=4 shares no weight of this model" in notes("tp=4,replicate=*")


def test_ranks_without_a_part_of_a_weight_are_said() -> None:
    narrow = toy_graph(num_layers=4, hidden=2)
    plan = complete(parse_request("tp=4"), narrow, num_ranks=4, global_batch=16, sequence=64)
    assert check(plan, narrow) == (
        "2 of 4 tensor-parallel ranks get nothing of layers.0.up.weight, which has too few units to share",
    )


def test_small_buckets_are_said() -> None:
    plan = replace(PLAN, bucket_bytes=4096)
    assert check(plan, GRAPH) == ("buckets of 4.00 KiB make many small reductions",)


def test_gradients_are_not_narrower_than_what_computes() -> None:
    values = {
        name: replace(value, dtype="float64") if value.dtype == "float32" else value
        for name, value in GRAPH.values.items()
    }
    wide = replace(GRAPH, values=values)
    plan = replace(PLAN, precision="float64", gradient_dtype="float32")
    with pytest.raises(PlanError, match="summed in float32, and the model computes in float64") as caught:
        check(plan, wide)
    assert caught.value.hint == "leave out grads=fp32"
    check(replace(plan, gradient_dtype=None), wide)


def test_an_offloaded_optimizer_must_fit_the_hosts_memory() -> None:
    cluster = load("a100-40:4")
    assert cluster.device.host is not None
    tight = replace(
        cluster, device=replace(cluster.device, host=replace(cluster.device.host, memory_bytes=10**4))
    )
    plan = replace(PLAN, offload="optimizer")
    assert check(plan, GRAPH, num_ranks=4, cluster=cluster) == ()
    with pytest.raises(PlanError, match=r"takes at least .* a rank of the host's memory") as caught:
        check(plan, GRAPH, num_ranks=4, cluster=tight)
    assert "zero=1" in str(caught.value.hint)


def test_offloading_on_cpus_is_odd_and_said_so() -> None:
    notes = check(replace(PLAN, offload="optimizer"), GRAPH, num_ranks=4, cluster=load("cpu:4"))
    assert any("offload=optimizer saves nothing on CPUs" in note for note in notes)


@pytest.mark.parametrize(
    ("sequence", "dropout", "is_noted"), [(512, 0.1, True), (256, 0.1, False), (512, 0.0, False)]
)
def test_attention_that_drops_probabilities_of_long_samples_is_said_to_be_written_out(
    sequence: int, dropout: float, is_noted: bool
) -> None:
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=512, attn_pdrop=dropout)
    graph = capture(lambda: GPT2LMHeadModel(config), sequence=sequence)
    plan = complete(parse_request("mb=1"), graph, num_ranks=1, global_batch=2, sequence=sequence)
    notes = check(plan, graph)
    assert is_noted == any("attention drops probabilities, and is written out" in note for note in notes)


def test_sequences_are_shared_only_where_a_kernel_computes_attention_part_by_part() -> None:
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=64)
    graphs = {
        dropout: capture(lambda: GPT2LMHeadModel(config), sequence=64)
        for dropout in (0.0, 0.1)
        if config.update({"attn_pdrop": dropout}) is None
    }
    for dropout, graph in graphs.items():
        plan = complete(parse_request("cp=2,mb=1"), graph, num_ranks=2, global_batch=2, sequence=64)
        if dropout:
            with pytest.raises(
                PlanError, match="cp=2 shares sequences, and this model's attention is written out"
            ) as caught:
                check(plan, graph)
            assert "attention dropout to 0" in (caught.value.hint or "")
        else:
            check(plan, graph)
