"""Where the seconds of a step go on one rank, from the operators that torch's profiler saw."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

__all__ = ["PHASES", "Phases", "measure_phases"]

Phases = Mapping[str, float]
"""Seconds a step by phase; ``Python`` is what no operator accounts for, waiting in gloo's ``Work.wait`` included."""

# An operator belongs to the phase of the outermost of its callers that has one: what a collective copies is the collective's.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "communication": ("c10d::", "gloo:", "_c10d_functional::"),
    "optimizer": ("aten::_fused_adamw_", "Optimizer.step"),
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "copies": ("aten::copy_", "aten::fill_", "aten::zero_", "aten::cat", "aten::clone", "aten::contiguous"),
}
PHASES = (*_NAMES, "other operators", "Python")


def measure_phases(step: Callable[[int], float], numbers: Sequence[int]) -> tuple[list[float], Phases]:
    """Losses and phases of the steps. The profiler itself costs a few per cent."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler, _recorded_communication():
        began_s = time.perf_counter()
        losses = [step(number) for number in numbers]
        elapsed_s = time.perf_counter() - began_s
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        seconds[_phase(event)] += event.self_cpu_time_total * 1e-6 / len(numbers)
    seconds["Python"] = elapsed_s / len(numbers) - sum(seconds[phase] for phase in PHASES[:-1])
    return losses, {phase: seconds[phase] for phase in PHASES}


def _phase(event: Any) -> str:
    found = "other operators" if event.name.startswith("aten::") else "Python"
    while event is not None:
        for phase, starts in _NAMES.items():
            if event.name.startswith(starts):
                found = phase
        event = event.cpu_parent
    return found


@contextmanager
def _recorded_communication() -> Iterator[None]:
    """Gives a process group that is written in Python the events that torch's own have."""
    group = dist.group.WORLD if dist.is_initialized() else None
    if group is None or type(group) is dist.ProcessGroup:
        yield
        return
    from shardstage.runtime.shared_pipes import PipeWork

    calls = ("allreduce", "all_gather_single", "reduce_scatter_single", "broadcast", "send", "recv")
    owners: list[tuple[type, str]] = [(PipeWork, "wait"), *((type(group), name) for name in calls)]
    with ExitStack() as stack:
        for owner, name in owners:
            stack.enter_context(patch.object(owner, name, _recorded(getattr(owner, name))))
        yield


def _recorded(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"c10d::{method.__name__}"):
            return method(*args, **kwargs)

    return call
