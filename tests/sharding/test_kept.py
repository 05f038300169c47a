"""What autograd keeps of an op is cut as its inputs are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shardstage.graph.capture import capture
from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import causal_task
from shardstage.sharding import localize, shard

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
