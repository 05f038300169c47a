"""DistributedDataParallel: gradients are views of its buckets, which saves a copy of each."""

from __future__ import annotations

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from workload import Step, Workload, load_weights, make_optimizer, mean_loss

__all__ = ["build"]


def build(workload: Workload, rank: int, size: int) -> Step:
    model = DistributedDataParallel(load_weights(workload), gradient_as_bucket_view=True)
    optimizer = make_optimizer(model.parameters())

    def step(number: int) -> float:
        inputs, labels = (tensor.chunk(size)[rank] for tensor in workload.batch(number))
        loss = mean_loss(model(input_ids=inputs).logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        return total.item() / size

    return step
