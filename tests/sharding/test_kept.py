"""What autograd keeps of an op is cut as its inputs are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from shardstage.graph import Op, Ref, Value
from shardstage.graph.capture import capture
from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import causal_task
from shardstage.operators import OperatorContext, RandomState, library
from shardstage.sharding import localize, shard
from shardstage.sharding.kept import kept_of

HEADS, HEAD_DIM, VOCAB = 4, 8, 64


class _Written(nn.Module):
    """Attention in products of four dims, of which torch keeps copies with batch and heads in one."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.embed = nn.Embedding(VOCAB, width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        b, s, _ = x.shape
        q, k, v = (each(x).view(b, s, HEADS, HEAD_DIM).transpose(1, 2) for each in (self.q, self.k, self.v))
        y = torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
        return self.head(self.out(y.transpose(1, 2).reshape(b, s, -1)))


def test_products_of_heads_keep_a_rank_s_heads_only() -> None:
    """Once they kept all heads on every rank: batch and heads in one dim were no dim of an input."""
    source = ModelSource(name="written", factory=_Written, task=causal_task(VOCAB), vocab_size=VOCAB)
    graph = capture(source, sequence=16, dtype="float32").at(microbatch=2, sequence=16)
    local = localize(shard(graph, num_ranks=2), 0)
    whole, part = (
        sum(g.values[name].num_bytes for op in g.ops if "matmul" in op.target for name in op.saved)
        for g in (graph, local)
    )
    assert whole > 0
    assert part == whole // 2


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_attention_with_dropout_keeps_what_the_operator_keeps(dtype: str) -> None:
    """Probabilities beside scores in 16 bits are in float32: half of their bytes were counted."""
    number = getattr(torch, dtype)
    q, k, v = (torch.randn(2, HEADS, 5, HEAD_DIM, dtype=number, requires_grad=True) for _ in range(3))
    context = OperatorContext(tp_group=None, tp_rank=0, tp_size=1, random=RandomState(positions=(0, 1)))
    call = library(context)["shardstage.attention"]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        call(q, k, v, None, 0.1, False, None, False, 0, HEADS, ((0, HEADS),))
    given = sum(kept.pop(each.data_ptr(), 0) for each in (k, v))
    values = {
        name: Value(name=name, shape=tuple(q.shape), dtype=dtype, kind="input") for name in ("q", "k", "v")
    }
    op = Op(
        name="y",
        target="shardstage.attention",
        args=(Ref("q"), Ref("k"), Ref("v"), None, 0.1, False, None, False, 0, HEADS, ((0, HEADS),)),
        outputs=("y",),
    )
    found = kept_of(op, values)
    assert found is not None
    assert found[0] == ("k", "v") and given == 2 * k.untyped_storage().nbytes()
    assert sum(each.num_bytes for each in found[1]) == sum(kept.values())
