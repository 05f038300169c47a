"""What blocks keep where they are compiled: the least of what ops ask for and of what that can be made of again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tests.graph.small_graphs import call, graph, value
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from shardstage.cluster import load
from shardstage.cost import fold, profile
from shardstage.graph import ModelGraph
from shardstage.graph.blocks import Block
from shardstage.graph.capture import capture
from shardstage.graph.saved import saved_bytes, saved_values
from shardstage.graph.saved_compiled import saved_compiled
from shardstage.graph.scale import at

SAMPLES, TOKENS, WIDTH = 2, 128, 64


def llama() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        n_embd=WIDTH,
        n_layer=3,
        n_head=4,
        vocab_size=97,
        n_positions=TOKENS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config)


def layer_of(model: nn.Module, x: Tensor) -> tuple[nn.Module, dict[str, Any]]:
    """The second layer, and what it is called with besides its input."""
    if isinstance(model, transformers.GPT2LMHeadModel):
        return model.transformer.h[1], {}
    assert isinstance(model, transformers.LlamaForCausalLM)
    angles = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    return model.model.layers[1], {"position_embeddings": angles, "attention_mask": None}


def kept_by_torch(made: Any, *, is_compiled: bool) -> int:
    """Bytes of the storages that autograd keeps of one layer, cut in two as torch.compile does; weights left out."""
    torch._dynamo.reset()
    model = made().bfloat16().train()
    x = torch.randn(SAMPLES, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    layer, given = layer_of(model, x)
    stored = {tensor.untyped_storage().data_ptr() for tensor in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in stored:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    run = torch.compile(layer, backend="aot_eager_decomp_partition") if is_compiled else layer
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x, **given)
    return sum(kept.values())


def captured(made: Any) -> ModelGraph:
    return at(capture(made, sequence=TOKENS, dtype="bfloat16"), microbatch=SAMPLES, sequence=TOKENS)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("made", [llama, gpt2])
def test_a_compiled_layer_keeps_what_torch_cuts_it_to(made: Any) -> None:
    graph = captured(made)
    layer = next(block for block in graph.blocks if block.is_layer)
    for is_compiled, kept in ((False, graph), (True, saved_compiled(graph, graph.blocks))):
        found = saved_bytes(kept, layer.start, layer.stop, "none")
        # Norms keep a number a row, in float32 or in bfloat16 as they are written: 8 bytes a token at most.
        assert abs(found - kept_by_torch(made, is_compiled=is_compiled)) <= 8 * SAMPLES * TOKENS


def chain(*targets: str, sizes: tuple[int, ...]) -> ModelGraph:
    """x → op → op → … in one block; each keeps its operand."""
    values = [
        value("v0", (sizes[0],), kind="input", requires_grad=True),
        *(value(f"v{n + 1}", (size,), requires_grad=True) for n, size in enumerate(sizes[1:])),
    ]
    ops = [call(f"v{n + 1}", target, f"v{n}", saved=(f"v{n}",)) for n, target in enumerate(targets)]
    return graph(ops, values, output=ops[-1].name)


def kept_of(made: ModelGraph) -> tuple[str, ...]:
    block = Block(start=0, stop=len(made.ops), module="", kind="", is_layer=True)
    return saved_values(saved_compiled(made, (block,)), 0, len(made.ops), "none", blocks=())


def test_what_is_made_of_what_is_kept_anyway_is_not_kept() -> None:
    made = chain("aten.exp.default", "aten.tanh.default", "aten.sin.default", sizes=(8, 8, 8, 8))
    assert saved_values(made, 0, 3, "none", blocks=()) == ("v0", "v1", "v2")
    # A sine is in no list: its operand stays, and what the two before it need is made of what the block was given.
    assert set(kept_of(made)) == {"v0", "v2"}


def test_a_small_result_is_kept_rather_than_the_large_one_that_it_is_made_of() -> None:
    made = chain("aten.linear.default", "aten.mean.dim", "aten.exp.default", sizes=(4, 64, 2, 2))
    made = replace(made, ops=(*made.ops[:1], replace(made.ops[1], saved=()), *made.ops[2:]))
    assert set(kept_of(made)) == {"v0", "v2"}


def test_a_block_does_not_reach_into_the_one_before() -> None:
    made = chain("aten.exp.default", "aten.tanh.default", sizes=(8, 8, 8))
    blocks = tuple(Block(start=n, stop=n + 1, module="", kind="", is_layer=True) for n in range(2))
    assert set(saved_values(saved_compiled(made, blocks), 0, 2, "none", blocks=())) == {"v0", "v1"}


def test_a_compiled_plan_is_priced_with_less_memory() -> None:
    made = capture(llama, sequence=TOKENS, dtype="bfloat16")
    eager, compiled = (
        profile(
            fold(made), load("h100:1"), tp=1, microbatch=SAMPLES, sequence=TOKENS, is_compiled=is_compiled
        )
        for is_compiled in (False, True)
    )
    layers = slice(
        1, -1
    )  # the embedding looks up; the head is never recomputed, and keeps less whatever a plan recomputes
    for a, b in zip(eager.units[layers], compiled.units[layers], strict=True):
        assert b.kept["none"].saved_bytes < 0.75 * a.kept["none"].saved_bytes
        for mode in ("selective", "full"):
            assert b.kept[mode].saved_bytes == a.kept[mode].saved_bytes
            assert b.kept[mode].extra_bytes < a.kept[mode].extra_bytes
    assert compiled.units[-1].kept["full"].saved_bytes < eager.units[-1].kept["full"].saved_bytes
