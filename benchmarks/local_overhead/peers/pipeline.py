"""``torch.distributed.pipelining`` with manual stages: each rank keeps its layers, 1F1B or GPipe moves the rest.

Stages are cut between layers so that they cost alike, the head counted as two layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from transformers import LlamaForCausalLM
from workload import Step, Workload, load_weights, make_optimizer, mean_loss

__all__ = ["build", "build_gpipe"]


class StageModule(nn.Module):
    """Some consecutive layers of the model; the first stage embeds, the last one norms and has the head."""

    def __init__(self, model: LlamaForCausalLM, layers: range, *, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.embedding = model.model.embed_tokens if is_first else None
        self.rotary = model.model.rotary_emb
        self.layers = nn.ModuleList(model.model.layers[number] for number in layers)
        self.norm = model.model.norm if is_last else None
        self.head = model.lm_head if is_last else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Ids ``[b, s]`` on the first stage, else hidden states ``[b, s, hidden]``; logits on the last one."""
        if self.embedding is not None:
            hidden = self.embedding(hidden)
        position_ids = torch.arange(hidden.shape[1]).unsqueeze(0)
        position_embeddings = self.rotary(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=position_embeddings, position_ids=position_ids)
        if self.norm is not None and self.head is not None:
            hidden = self.head(self.norm(hidden))
        return hidden


def build(workload: Workload, rank: int, size: int) -> Step:
    return _build(workload, rank, size, Schedule1F1B)


def build_gpipe(workload: Workload, rank: int, size: int) -> Step:
    return _build(workload, rank, size, ScheduleGPipe)


def _build(workload: Workload, rank: int, size: int, kind: type[Schedule1F1B] | type[ScheduleGPipe]) -> Step:
    is_first, is_last = rank == 0, rank == size - 1
    layers = stage_layers(workload.num_layers, rank, size)
    module = StageModule(load_weights(workload), layers, is_first=is_first, is_last=is_last)
    stage = PipelineStage(module, rank, size, torch.device("cpu"))
    num_microbatches = workload.global_batch // workload.microbatch
    schedule = kind(stage, num_microbatches, loss_fn=mean_loss)  # divides gradients by num_microbatches
    optimizer = make_optimizer(module.parameters())

    def step(number: int) -> float:
        inputs, labels = workload.batch(number)
        losses: list[Tensor] = []
        if is_first:
            schedule.step(inputs, return_outputs=False)
        elif is_last:
            schedule.step(target=labels, losses=losses, return_outputs=False)
        else:
            schedule.step(return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean().item() if is_last else float("nan")

    return step


def stage_layers(num_layers: int, stage: int, num_stages: int) -> range:
    """The layers of a stage where the head costs as much as two."""
    cost = (num_layers + 2) / num_stages
    bounds = [min(num_layers, round(cost * number)) for number in range(num_stages + 1)]
    return range(bounds[stage], bounds[stage + 1])
