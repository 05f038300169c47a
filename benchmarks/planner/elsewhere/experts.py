"""Holds predicted step times and memory against published runs of mixtures of experts, by the models and plans that a user would name.

Usage: python benchmarks/planner/elsewhere/experts.py
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from published import SLOWER_ATTENTION, measured_s, rows
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from shardstage.cluster import Cluster, load
from shardstage.cost import Links, Prediction, Profile, Profiler, StepSetup, fold, predict_step
from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture_short
from shardstage.plan import complete, parse_request
from shardstage.plan.order import setup_of

GIB = 2**30
RUNS = (
    *("moezoo-qwen3-235b-h100-0", "moezoo-qwen3-235b-h100-2"),
    *("moezoo-qwen3-235b-h100-3", "moezoo-qwen3-235b-h100-4"),
    *("moezoo-qwen3-235b-h100-long16384", "moezoo-qwen3-235b-h100-long32768"),
    "mbskill-moonlight-none",
)
"""All in 16 bits on H100s of models that ``transformers`` has, but those that overlap experts' talk with another microbatch (1), recompute
named modules of Moonlight, or have more positions than the model (long65536, long131072)."""


def main() -> None:
    found = {row["id"]: row for group in ("megatron-moe-modelzoo", "mbridge-skills-memory") for row in rows(group)}
    print("| run | tokens sent by | measured | sent once for each expert | sent once for each node or rank | activations |")
    print("|---|---|---|---|---|---|")
    for row in (found[name] for name in RUNS):
        plain = predicted(row, 1.0)
        dispatcher = row["plan"].get("dispatcher") or "not stated"
        once = predicted(row, sent_once(row)) if dispatcher != "A2A" else plain
        seconds = measured_s(row)
        print(
            f"| {row['id']} | {dispatcher} | {seconds:.2f} s | {against(plain, seconds)} | {against(once, seconds)} "
            f"| {plain.ranks[0].activations / GIB:.1f} GiB |"
        )


def against(prediction: Prediction, seconds: float) -> str:
    return f"{prediction.step_time_s:.2f} s, {100 * (prediction.step_time_s / seconds - 1):+.0f} %"


def sent_once(row: dict[str, Any]) -> float:
    """DeepEP sends a token once to each node that has one of its experts, in a node once to each such rank (github.com/deepseek-ai/DeepEP,
    README): of n nodes or ranks and k experts a token n (1 - (1 - 1 / n)^k) / k of what all experts would be sent."""
    nodes = row["plan"]["ep"] // row["hardware"]["gpus_per_node"]
    places, per_token = nodes if nodes > 1 else row["plan"]["ep"], row["model"]["moe"]["topk"]
    return float(places * (1 - (1 - 1 / places) ** per_token) / per_token)


def predicted(row: dict[str, Any], sent: float) -> Prediction:
    """As ``planner.predict``, where a layer's tokens take ``sent`` of their way to experts and back."""
    profile, setup, links = priced(row)
    units = tuple(
        replace(unit, ep_forward_s=sent * unit.ep_forward_s, ep_backward_s=sent * unit.ep_backward_s)
        for unit in profile.units
    )
    return predict_step(replace(profile, units=units), setup, links)


def priced(row: dict[str, Any]) -> tuple[Profile, StepSetup, Links]:
    """What a row's prediction is made of."""
    graph, plan = graph_of(row), row["plan"]
    is_cut = plan["pp"] * (plan["vpp"] or 1) > plan["pp"]
    text = {
        **{name: plan[name] for name in ("dp", "tp", "pp", "cp", "ep")},
        "etp": 1,
        "mb": plan["microbatch"] or 1,
        "zero": 3 if plan["zero"] == "fsdp" else 1,
        **({"v": plan["vpp"], "schedule": "interleaved-1f1b"} if is_cut else {}),
        **({"recompute": "full"} if plan["recompute"] == "full" else {}),
    }
    found = complete(
        parse_request(",".join(f"{k}={v}" for k, v in text.items()) + ",sp,compile,dtype=bf16"),
        graph,
        num_ranks=row["hardware"]["gpus"],
        global_batch=plan["global_batch"],
        sequence=row["model"]["seq_len"],
        precision="bfloat16",
    )
    cluster = _by_cudnn(load(f"h100:{row['hardware']['gpus']}"))
    positions = {op.name: index for index, op in enumerate(graph.ops)}
    starts = tuple(positions[stage.first] for stage in found.stages)
    folded = fold(graph, boundaries=starts)
    setup = setup_of(found, folded, tuple(folded.unit_at(start) for start in starts), None)
    links = Links(cluster, found.mesh, ep=found.ep, has_whole_experts=setup.has_whole_experts)
    profiler = Profiler(
        folded, cluster, tp=found.mesh.tp, sequence=found.sequence, is_sequence_parallel=True, is_compiled=True
    )
    return profiler.with_whole_experts().at(setup.microbatch, links), setup, links


def _by_cudnn(cluster: Cluster) -> Cluster:
    """With the attention that Transformer Engine takes on Hopper where nothing else is asked for (github.com/NVIDIA/TransformerEngine
    transformer_engine/pytorch/attention/dot_product_attention/utils.py, get_attention_backend)."""
    kernels, factor = cluster.device.kernels, SLOWER_ATTENTION["cudnn"]
    assert kernels is not None
    quicker = replace(
        kernels,
        attention_forward_ratio=kernels.attention_forward_ratio / factor,
        attention_backward_ratio=kernels.attention_backward_ratio / factor,
    )
    return replace(cluster, device=replace(cluster.device, kernels=quicker))


def graph_of(row: dict[str, Any]) -> ModelGraph:
    model = row["model"]
    return _captured(model["family"], model["seq_len"], tuple(sorted(_sizes(model).items())))


def _sizes(model: dict[str, Any]) -> dict[str, Any]:
    """What the two configurations call alike."""
    experts = model["moe"]
    sizes = {
        "hidden_size": model["hidden"],
        "num_hidden_layers": model["layers"],
        "num_attention_heads": model["heads"],
        "num_key_value_heads": model["kv_heads"],
        "moe_intermediate_size": experts["moe_ffn_hidden"],
        "num_experts_per_tok": experts["topk"],
        "vocab_size": model["vocab"],
        "max_position_embeddings": model["seq_len"],
    }
    latent = model.get("mla")
    if latent is None:
        return {**sizes, "head_dim": model["head_dim"], "num_experts": experts["experts"]}
    return {
        **sizes,
        "intermediate_size": model["ffn_hidden"],
        "n_routed_experts": experts["experts"],
        "n_shared_experts": experts["shared_experts"],
        "first_k_dense_replace": experts["dense_layers"],
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": latent["q_lora"],
        "kv_lora_rank": latent["kv_lora"],
        "qk_nope_head_dim": latent["qk_nope"],
        "qk_rope_head_dim": latent["qk_rope"],
        "v_head_dim": latent["v_dim"],
    }


@cache
def _captured(family: str, sequence: int, sizes: tuple[tuple[str, Any], ...]) -> ModelGraph:
    def made() -> PreTrainedModel:
        if family.startswith("Qwen3"):
            return Qwen3MoeForCausalLM(Qwen3MoeConfig(**dict(sizes), use_cache=False))
        return DeepseekV3ForCausalLM(DeepseekV3Config(**dict(sizes), use_cache=False))

    return capture_short(made, sequence=sequence, dtype="bfloat16").unfold()


if __name__ == "__main__":
    main()
