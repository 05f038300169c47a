"""The learning rate over steps, and a step over leaves that is torch's own on the whole."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from shardstage.runtime.leaves import Leaf
from shardstage.runtime.optimizer import Optimizer, OptimizerConfig, learning_rate

CONFIG = OptimizerConfig(lr=1.0, warmup_steps=4, total_steps=14, min_lr_ratio=0.1)


def test_the_rate_rises_linearly_then_falls_along_a_cosine() -> None:
    assert [learning_rate(CONFIG, step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(CONFIG, 4) == 1.0
    assert learning_rate(CONFIG, 9) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert learning_rate(CONFIG, 14) == learning_rate(CONFIG, 99) == pytest.approx(0.1)


def test_without_an_end_the_rate_stays() -> None:
    config = OptimizerConfig(lr=0.5, warmup_steps=2)
    assert [learning_rate(config, step) for step in (0, 1, 2, 1000)] == [0.25, 0.5, 0.5, 0.5]


def leaves_of(
    tensors: list[torch.Tensor], gradients: list[torch.Tensor | None], *, is_decayed: bool = True
) -> list[Leaf]:
    return [
        Leaf(master=tensor, gradient=lambda g=gradient: g, pieces=(), is_decayed=is_decayed, is_counted=True)  # type: ignore[misc]
        for tensor, gradient in zip(tensors, gradients, strict=True)
    ]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_shards_step_as_the_whole_does(kind: str) -> None:
    """Elementwise optimizers do not see where a tensor is cut, but for the last bit: torch's kernel fuses multiply and add in
    vector registers and not in the rest of a tensor, so each of the few operations of a step may differ by u = 2**-24."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(15, generator=generator)
    gradients = [torch.randn(15, generator=generator) for _ in range(3)]
    config = OptimizerConfig(kind=kind, lr=0.1)  # type: ignore[arg-type]
    shards = [whole[:7].clone(), whole[7:].clone()]
    held: list[torch.Tensor] = [torch.empty(15), torch.empty(7), torch.empty(8)]
    one = Optimizer(config, leaves_of([whole], [held[0]]))
    two = Optimizer(config, leaves_of(shards, [held[1], held[2]]))
    for step, gradient in enumerate(gradients):
        held[0].copy_(gradient)
        held[1].copy_(gradient[:7])
        held[2].copy_(gradient[7:])
        one.step(step)
        two.step(step)
    torch.testing.assert_close(torch.cat(shards), whole, rtol=3 * 16 * 2**-24, atol=3 * 16 * 2**-24)


def test_biases_and_norms_are_not_decayed() -> None:
    tensor = torch.ones(3)
    optimizer = Optimizer(
        OptimizerConfig(lr=0.1, weight_decay=0.5), leaves_of([tensor], [torch.zeros(3)], is_decayed=False)
    )
    optimizer.step(0)
    assert torch.equal(tensor, torch.ones(3))


def test_gradients_are_scaled_before_the_step() -> None:
    tensor = torch.zeros(2)
    optimizer = Optimizer(
        OptimizerConfig(kind="sgd", lr=1.0, weight_decay=0.0), leaves_of([tensor], [torch.tensor([4.0, 8.0])])
    )
    assert optimizer.step(0, gradient_scale=0.25) == 1.0
    assert tensor.tolist() == [-1.0, -2.0]


def test_a_rank_that_holds_nothing_steps_nothing() -> None:
    optimizer = Optimizer(OptimizerConfig(), leaves_of([torch.empty(0)], [torch.empty(0)]))
    optimizer.step(0)
    assert optimizer.state(optimizer.leaves[0])["exp_avg"].numel() == 0


def test_a_loaded_state_knows_how_many_steps_it_has_seen() -> None:
    """AdamW corrects its bias by the number of steps: two runs agree only if it is restored."""

    def trained(
        num_steps: int, start: int, tensor: torch.Tensor, state: dict[str, torch.Tensor] | None
    ) -> Optimizer:
        gradient = torch.tensor([0.5, -2.0])
        leaves = leaves_of([tensor], [gradient])
        optimizer = Optimizer(OptimizerConfig(lr=0.1), leaves)
        if state is not None:
            for name, value in optimizer.state(leaves[0]).items():
                value.copy_(state[name])
            optimizer.set_num_steps(start)
        for step in range(start, start + num_steps):
            optimizer.step(step)
        return optimizer

    through, resumed = torch.ones(2), torch.ones(2)
    trained(4, 0, through, None)
    first = trained(2, 0, resumed, None)
    trained(2, 2, resumed, {name: value.clone() for name, value in first.state(first.leaves[0]).items()})
    assert torch.equal(through, resumed)


@pytest.mark.parametrize("is_sent", [False, True])
def test_gradients_that_lie_apart_are_brought_to_their_masters_run_by_run(is_sent: bool) -> None:
    """Leaves of 5 elements in runs of two: narrow gradients are widened and scaled there, and stay as they are where they lie."""
    generator = torch.Generator().manual_seed(1)
    first = [torch.randn(5, generator=generator) for _ in range(3)]
    narrow = [torch.randn(5, generator=generator).bfloat16() for _ in range(3)]
    apart = [
        replace(leaf, is_apart=True, is_sent=is_sent)
        for leaf in leaves_of([t.clone() for t in first], [*narrow[:2], None])
    ]
    plain = leaves_of([t.clone() for t in first], [*(g.float() for g in narrow[:2]), None])
    one, two = (
        Optimizer(OptimizerConfig(lr=0.1), plain),
        Optimizer(OptimizerConfig(lr=0.1), apart, run_bytes=40),
    )
    before = [gradient.clone() for gradient in narrow]
    assert one.step(0, gradient_scale=0.5) == two.step(0, gradient_scale=0.5)
    for leaf, other in zip(plain, apart, strict=True):
        torch.testing.assert_close(leaf.master, other.master, rtol=0, atol=0)
        assert other.master.grad is None
        for name, tensor in one.state(leaf).items():
            torch.testing.assert_close(tensor, two.state(other)[name], rtol=0, atol=0)
    assert all(map(torch.equal, narrow, before))
    on_host = sum(tensor.numel() for tensor in two.on_host())
    assert on_host == (3 * 3 * 5 + 2 * 5 if is_sent else 0)
