"""Another framework's way to store the same plan, category by category."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.cost.test_memory import ELEMENTS, priced, setup

from shardstage.cost.accounting import OUR_ACCOUNTING, Accounting, LossBytes
from shardstage.cost.memory import MemoryUse, rank_memory, stage_memory, step_bytes
from shardstage.layout import Mesh

LEAN = Accounting(copies_reduced_part=False, num_posted_receives=0, has_own_receives=False)


def last(accounting: Accounting, **changes: Any) -> MemoryUse:
    case = setup(**{"mesh": Mesh(pp=2), "starts": (0, 3), "num_microbatches": 4, **changes})
    return stage_memory(priced(), case, 1, accounting)


def test_without_an_accounting_it_is_ours() -> None:
    for zero in range(4):
        case = setup(zero=zero, precision="bfloat16")
        assert stage_memory(priced(), case, 0) == stage_memory(priced(), case, 0, OUR_ACCOUNTING)


@pytest.mark.parametrize(
    ("zero", "gradient_bytes", "expected"), [(0, 2, 2.0), (1, 2, 2.0), (1, None, 4.0), (0, None, 4.0)]
)
def test_gradients_are_as_wide_as_the_framework_keeps_them(
    zero: int, gradient_bytes: int | None, expected: float
) -> None:
    lean = replace(LEAN, gradient_bytes=gradient_bytes)
    use = stage_memory(priced(), setup(zero=zero, precision="bfloat16"), 0, lean)
    assert use.gradients == expected * ELEMENTS


def test_gradients_of_a_shard_are_of_that_width_too() -> None:
    narrow = replace(LEAN, gradient_bytes=2)
    case = setup(zero=3, precision="bfloat16")
    wide, half = (stage_memory(priced(), case, 0, accounting) for accounting in (LEAN, narrow))
    assert wide.gradients > half.gradients >= wide.gradients // 2


def test_views_of_buffers_are_no_copies() -> None:
    ours, lean = (
        stage_memory(priced(), setup(zero=1, precision="bfloat16"), 0, accounting)
        for accounting in (OUR_ACCOUNTING, LEAN)
    )
    assert ours.gradients - lean.gradients == 4 * ELEMENTS // 4
    assert ours.communication > lean.communication == 0


def test_what_came_is_what_the_first_layer_saves() -> None:
    case = setup(mesh=Mesh(pp=2), starts=(0, 3), num_microbatches=1)
    kept = sum(unit.kept["none"].saved_bytes for unit in priced().units[3:])
    assert stage_memory(priced(), case, 1, LEAN).activations == kept
    assert stage_memory(priced(), case, 1).activations > kept


def test_a_stage_may_keep_what_it_sent() -> None:
    case = setup(mesh=Mesh(pp=2), starts=(0, 3), num_microbatches=1)
    keeping = replace(LEAN, keeps_sent=True)
    sent = priced().units[3].input_bytes
    plain, kept = (stage_memory(priced(), case, 0, accounting).activations for accounting in (LEAN, keeping))
    assert kept - plain == sent
    assert stage_memory(priced(), case, 1, keeping) == stage_memory(priced(), case, 1, LEAN)


def test_a_loss_of_the_framework_replaces_the_last_unit() -> None:
    loss = LossBytes(kept_bytes=1_000_000, transient_bytes=500_000)
    plain, own = last(LEAN), last(replace(LEAN, loss=loss))
    assert own.transient == 1_500_000
    assert own.activations == plain.activations - priced().units[-1].kept["none"].saved_bytes
    first = setup(mesh=Mesh(pp=2), starts=(0, 3))
    assert stage_memory(priced(), first, 0, replace(LEAN, loss=loss)) == stage_memory(
        priced(), first, 0, LEAN
    )


@pytest.mark.parametrize(("schedule", "waiting"), [("1f1b", 0), ("zb-h1", 0), ("gpipe", 3)])
def test_losses_wait_only_under_gpipe(schedule: str, waiting: int) -> None:
    """The last stage goes back at once after its forward, unless all forwards come first; weights' gradients need no loss."""
    without, loss = (LossBytes(kept_bytes=n, transient_bytes=0) for n in (0, 1_000_000))
    uses = [last(replace(LEAN, loss=each), schedule=schedule) for each in (without, loss)]
    assert uses[1].activations - uses[0].activations == waiting * 1_000_000


def test_workspaces_are_held_once_by_a_rank_of_several_stages() -> None:
    case = setup(mesh=Mesh(pp=2), starts=(0, 1, 2, 3), schedule="interleaved-1f1b", num_microbatches=4)
    use = rank_memory(priced(), case, 0, replace(LEAN, fixed_bytes=1000))
    assert use.fixed == 1000
    assert ("fixed", 1000) in set(use.categories())


def test_the_step_needs_its_copies_or_a_bucket_but_no_activations() -> None:
    case = setup(zero=1, precision="bfloat16")
    copying = replace(LEAN, update_bytes=8.0, bucket_bytes=10)
    use = stage_memory(priced(), case, 0, copying)
    state = use.parameters + use.master + use.gradients + use.optimizer
    assert step_bytes(use, case, copying) == state + 8 * ELEMENTS // 4
    assert step_bytes(use, case, replace(copying, bucket_bytes=10**6)) == state + 10**6


def test_a_device_needs_more_than_what_is_allocated() -> None:
    accounting = Accounting(context_bytes=500, reserved_ratio=1.25)
    assert accounting.device_bytes(1000) == 1750
    assert OUR_ACCOUNTING.device_bytes(1000) == 1000
