"""``torch.distributed.pipelining`` with manual stages: each rank keeps its layers, torch's schedules move the rest.

Stages are cut between layers so that they cost alike, the head counted as two layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)
from transformers import LlamaForCausalLM
from workload import Step, Workload, load_weights, make_optimizer, mean_loss

__all__ = ["build"]

# By our name: torch's class, stages of a rank, and whether the second half of the stages goes up the ranks again.
SCHEDULES: Mapping[str, tuple[type[Any], int, bool]] = {
    "gpipe": (ScheduleGPipe, 1, False),
    "1f1b": (Schedule1F1B, 1, False),
    "interleaved-1f1b": (ScheduleInterleaved1F1B, 2, False),
    "looped-bfs": (ScheduleLoopedBFS, 2, False),
    "zb-v": (ScheduleZBVZeroBubble, 2, True),
    "dualpipe-v": (ScheduleDualPipeV, 2, True),
}


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


def build(name: str, workload: Workload, rank: int, size: int, *, is_even: bool = False) -> Step:
    """The step of a rank under torch's schedule; ``is_even`` gives every stage equally many layers, whatever the head costs."""
    kind, per_rank, is_v = SCHEDULES[name]
    num_stages = per_rank * size
    own = [stage for stage in range(num_stages) if _rank_of(stage, size, is_v=is_v) == rank]
    cut = _even_layers if is_even else stage_layers
    model = load_weights(workload)
    modules = [
        StageModule(
            model,
            cut(workload.num_layers, stage, num_stages),
            is_first=stage == 0,
            is_last=stage == num_stages - 1,
        )
        for stage in own
    ]
    stages = [
        PipelineStage(module, stage, num_stages, torch.device("cpu"))
        for module, stage in zip(modules, own, strict=True)
    ]
    num_microbatches = workload.global_batch // workload.microbatch
    held = stages[0] if per_rank == 1 else stages
    schedule = kind(held, num_microbatches, loss_fn=mean_loss)  # divides gradients by num_microbatches
    optimizer = make_optimizer(p for module in modules for p in module.parameters())
    is_first, is_last = 0 in own, num_stages - 1 in own

    def step(number: int) -> float:
        inputs, labels = workload.batch(number)
        losses: list[Tensor] = []
        given = (inputs,) if is_first else ()
        wanted = {"target": labels, "losses": losses} if is_last else {}
        schedule.step(*given, **wanted, return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean().item() if is_last else float("nan")

    return step


def stage_layers(num_layers: int, stage: int, num_stages: int) -> range:
    """The layers of a stage where the head costs as much as two."""
    cost = (num_layers + 2) / num_stages
    bounds = [min(num_layers, round(cost * number)) for number in range(num_stages + 1)]
    return range(bounds[stage], bounds[stage + 1])


def _even_layers(num_layers: int, stage: int, num_stages: int) -> range:
    bounds = [round(num_layers * number / num_stages) for number in range(num_stages + 1)]
    return range(bounds[stage], bounds[stage + 1])


def _rank_of(stage: int, size: int, *, is_v: bool) -> int:
    return min(stage, 2 * size - 1 - stage) if is_v else stage % size
