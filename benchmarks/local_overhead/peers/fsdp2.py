"""FSDP2: ``fully_shard`` on each layer, then on the root with embedding, last norm and head."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from workload import Step, Workload, load_weights, make_optimizer, mean_loss

__all__ = ["build"]


def build(workload: Workload, rank: int, size: int) -> Step:
    mesh = init_device_mesh("cpu", (size,))
    model = load_weights(workload)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
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
