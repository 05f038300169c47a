"""What is cut, what stays whole and why, and what moves between."""

from __future__ import annotations

import pickle

import pytest
from tests.sharding.cases import FAMILIES, LanguageModel, case, llama
from torch import Tensor, nn

from shardstage.graph import Op
from shardstage.graph.capture import capture
from shardstage.graph.tasks import causal_task
from shardstage.layout import Partial, Replicate, Shard
from shardstage.sharding import Sharding, describe, localize, shard

WHOLE, SUMMED = Replicate(), Replicate(has_partial_grad=True)


def sharded(name: str, num_ranks: int = 2, **options: object) -> Sharding:
    return shard(case(name).graph, num_ranks=num_ranks, **options)


def inserted(sharding: Sharding, kind: str) -> list[Op]:
    return [op for op in localize(sharding, 0).ops if op.target == f"shardstage.{kind}"]


@pytest.mark.parametrize("is_sequence_parallel", [False, True])
def test_parameters_lie_alike_whatever_the_microbatch(is_sequence_parallel: bool) -> None:
    graph = capture(lambda: llama(4, 2), sequence=16)
    found = {
        microbatch: shard(
            graph.at(microbatch=microbatch, sequence=16),
            num_ranks=3,
            is_sequence_parallel=is_sequence_parallel,
        ).parameters
        for microbatch in (1, 2, 5)
    }
    assert found[1] == found[2] == found[5]


def test_tied_embedding_and_head_are_one_cut_of_the_vocabulary() -> None:
    sharding = sharded("gpt2", 3)
    assert sharding.parameters["transformer.wte.weight"] == Shard(dim=0, sections=((21, 20, 20),))


def test_a_fused_projection_is_cut_in_three_sections_of_whole_heads() -> None:
    sharding = sharded("gpt2", 3)
    weight = sharding.parameters["transformer.h.0.attn.c_attn.weight"]
    assert weight == Shard(dim=1, sections=((8, 4, 4),) * 3)
    assert sharding.parameters["transformer.h.0.attn.c_attn.bias"] == weight.with_dim(0)
    assert sharding.parameters["transformer.h.0.attn.c_proj.weight"] == Shard(dim=0, sections=((8, 4, 4),))


def test_whole_key_heads_get_their_gradient_through_their_weight() -> None:
    """Two key-value heads on three ranks: no activation is reduced for them, their weights are, once a step."""
    sharding = sharded("llama", 3)
    assert sharding.parameters["model.layers.0.self_attn.q_proj.weight"] == Shard(
        dim=0, sections=((8, 4, 4),)
    )
    assert sharding.parameters["model.layers.0.self_attn.k_proj.weight"] == SUMMED
    assert len(inserted(sharding, "sum_gradient")) == len(inserted(sharded("llama", 2), "sum_gradient"))
    assert {item.reason for item in sharding.unsharded} == {
        "2 key-value heads do not line up with 4 query heads on 3 ranks"
    }


def test_experts_are_added_up_before_they_are_reduced() -> None:
    sharding = sharded("mixtral")
    tokens, width = 3 * 7, 16
    partial = [value for name, value in localize(sharding, 0).values.items() if name.endswith("@partial")]
    assert {value.numel for value in partial} == {tokens * width}
    assert any(isinstance(placement, Partial) for placement in sharding.placements.values())


def test_norms_on_cut_tokens_have_their_weights_summed_over_ranks() -> None:
    name = "model.layers.0.input_layernorm.weight"
    assert sharded("llama").parameters[name] == WHOLE
    assert sharded("llama", is_sequence_parallel=True).parameters[name] == SUMMED


def test_what_is_replicated_by_name_stays_whole() -> None:
    sharding = sharded("llama", replicate=("*.self_attn.*", "lm_head.weight"))
    attention = {p for fqn, p in sharding.parameters.items() if "self_attn" in fqn}
    assert attention == {WHOLE} == {sharding.parameters["lm_head.weight"]}
    assert "replicate = '*.self_attn.*'" in {item.reason for item in sharding.unsharded}
    assert sharding.parameters["model.layers.0.mlp.up_proj.weight"] == Shard(dim=0, sections=((6, 6),))


def test_a_whole_weight_between_cut_ones_has_its_gradient_summed() -> None:
    sharding = sharded("llama", replicate=("*.up_proj.*",))
    assert sharding.parameters["model.layers.0.mlp.up_proj.weight"] == SUMMED
    assert sharding.parameters["model.layers.0.mlp.down_proj.weight"] == Shard(dim=1, sections=((6, 6),))


def test_a_tie_is_replicated_under_either_name() -> None:
    for name in ("transformer.wte.weight", "lm_head.weight"):
        assert sharded("gpt2", replicate=(name,)).parameters["transformer.wte.weight"] == WHOLE


class SharedWeight(nn.Module):
    """One square weight whose rows are cut in its first use and whose columns in its second."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(Tensor(8, 8).zero_()))

    def forward(self, x: Tensor) -> Tensor:
        return x + (x @ self.weight).relu() @ self.weight


def test_a_parameter_with_two_different_uses_stays_whole_and_is_cut_for_each() -> None:
    graph = capture(lambda: LanguageModel(8, SharedWeight()), microbatch=2, sequence=3, task=causal_task(61))
    sharding = shard(graph, num_ranks=2)
    assert sharding.parameters["blocks.0.weight"] == WHOLE
    cut = [c.target for c in sharding.conversions if c.value == "p_blocks_0_weight"]
    assert {placement.dim for placement in cut if isinstance(placement, Shard)} == {0, 1}


def test_an_op_without_rule_is_listed_with_its_line() -> None:
    items = [item for item in sharded("resnet").unsharded if "conv2d" in item.reason]
    assert items and all(item.reason == "no rule for aten.conv2d.default" for item in items)
    assert all("families.py:" in item.source for item in items)


def test_one_input_is_summed_once_for_query_key_and_value() -> None:
    graph = localize(sharded("llama"), 0)
    first = next(op for op in graph.ops if op.target == "shardstage.sum_gradient")
    readers = [graph.ops[index] for index in graph.consumers[first.outputs[0]]]
    assert [op.target for op in readers] == ["aten.linear.default"] * 3
    assert first.args[1] is True


@pytest.mark.parametrize("is_sequence_parallel", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_local_graphs_are_graphs(family: str, is_sequence_parallel: bool) -> None:
    """Every value is made before it is read, original ops keep their names, inserted ones are named after them."""
    sharding = sharded(family, 3, is_sequence_parallel=is_sequence_parallel)
    whole = {op.name for op in sharding.graph.ops}
    for rank in range(3):
        graph = pickle.loads(pickle.dumps(localize(sharding, rank)))
        known = {name for name, value in graph.values.items() if value.kind not in ("activation", "saved")}
        for op in graph.ops:
            assert known.issuperset(op.inputs), op.name
            assert graph.values.keys() >= {*op.saved, *filter(None, op.outputs)}, op.name
            known.update(filter(None, op.outputs))
        names = [op.name for op in graph.ops]
        assert len(set(names)) == len(names)
        assert {name.split("@")[0] for name in names} == whole == whole & set(names)


def test_a_sharding_is_explained_in_a_table() -> None:
    text = describe(sharded("llama", 3))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "tensor parallel over 3 ranks"
    assert "model.layers.*.mlp.down_proj.weight × 2 16 × 12 S(1: 4/4/4) 64 64 64" in lines
    assert (
        "model.layers.*.self_attn.k_proj.weight × 2 8 × 16 whole, gradient summed over tp once a step 128 128 128"
        in lines
    )
    assert any("2 key-value heads do not line up" in line and "× 2" in line for line in lines)
