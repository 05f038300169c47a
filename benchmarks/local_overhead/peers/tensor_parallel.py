"""``parallelize_module``: columns then rows in attention and MLP, vocabulary sharded in embedding, head and loss.

``build_sequence_parallel`` shards the norms and residuals over the sequence too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from workload import Step, Workload, load_weights, make_optimizer, mean_loss

__all__ = ["build", "build_sequence_parallel"]


@dataclass(frozen=True, kw_only=True)
class _Styles:
    """``residual`` is how activations lie between the sharded pairs; the two dicts add what that asks for."""

    residual: Placement
    layer: dict[str, ParallelStyle]
    root: dict[str, ParallelStyle]


def build(workload: Workload, rank: int, size: int) -> Step:
    return _build(workload, size, _Styles(residual=Replicate(), layer={}, root={}))


def build_sequence_parallel(workload: Workload, rank: int, size: int) -> Step:
    attention = PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": Shard(1)},
        desired_input_kwarg_layouts={"hidden_states": Replicate()},
    )
    styles = _Styles(
        residual=Shard(1),
        layer={
            "input_layernorm": SequenceParallel(),
            "post_attention_layernorm": SequenceParallel(),
            "self_attn": attention,
            "mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        },
        root={"model.norm": SequenceParallel()},
    )
    return _build(workload, size, styles)


def _build(workload: Workload, size: int, styles: _Styles) -> Step:
    mesh = init_device_mesh("cpu", (size,))
    model = load_weights(workload)
    residual = styles.residual
    for layer in model.model.layers:
        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in columns}
        plan |= {
            name: RowwiseParallel(output_layouts=residual) for name in ("self_attn.o_proj", "mlp.down_proj")
        }
        parallelize_module(layer, mesh, plan | styles.layer)
    embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=residual)
    head = ColwiseParallel(input_layouts=residual, output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, {"model.embed_tokens": embedding, "lm_head": head, **styles.root})
    optimizer = make_optimizer(model.parameters())
    position_ids = torch.arange(workload.sequence).unsqueeze(
        0
    )  # the model would count its own, sharded tokens

    def step(number: int) -> float:
        inputs, labels = workload.batch(number)
        with loss_parallel():
            logits = model(input_ids=inputs, position_ids=position_ids).logits
            loss = mean_loss(logits, labels)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return (loss.full_tensor() if isinstance(loss, DTensor) else loss).item()

    return step
