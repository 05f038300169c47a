"""One process with all cores, eager: what everything else is compared with."""

from __future__ import annotations

from workload import Step, Workload, load_weights, make_optimizer, mean_loss

__all__ = ["build"]


def build(workload: Workload, rank: int, size: int) -> Step:
    model = load_weights(workload)
    optimizer = make_optimizer(model.parameters())

    def step(number: int) -> float:
        inputs, labels = workload.batch(number)
        loss = mean_loss(model(input_ids=inputs).logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
