"""Where state lies changes no bit of a run; gradients of half the width change it by their roundings alone, and save what they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runtime.storage_cases import assert_only_widths_differ, case_of, storage_cases
from tests.runtime.test_engine import results_of

from shardstage.layout import Mesh
from shardstage.plan import Plan
from shardstage.runtime.storage import Storage

PLANS = ("dp=2,zero=1,mb=2,shares=4/2", "dp=2,zero=3,mb=2")
ALONE = "pp=2,mb=2"
"""Most of its parameters concern no other rank and have no bucket."""


def test_the_optimizers_place_changes_no_bit_and_gradients_dtype_only_roundings(tmp_path: Path) -> None:
    """Ties, odd vocabulary, uneven shares, biases and norms, several microbatches; two steps with clipping. On three ranks: test_engine."""
    cases = {text: case for plan in PLANS for text, case in storage_cases(plan, 2).items()}
    cases |= {ALONE + more: case_of(ALONE + more, 2, "float32") for more in ("", ",offload=optimizer")}
    found = results_of(cases, 2, tmp_path)
    for plan in PLANS:
        assert_only_widths_differ(plan, found)
    assert found[ALONE] == found[f"{ALONE},offload=optimizer"]


def plan_of(**changes: Any) -> Plan:
    return Plan(mesh=Mesh(), stages=(), global_batch=1, sequence=None, microbatch=1, shares=(1,), **changes)


@pytest.mark.parametrize(
    ("changes", "gradients", "master", "needs_master", "is_apart"),
    [
        ({}, torch.float32, torch.float32, False, False),
        ({"precision": "float64"}, torch.float64, torch.float64, False, False),
        ({"precision": "bfloat16"}, torch.float32, torch.float32, True, False),
        ({"precision": "bfloat16", "gradient_dtype": "bfloat16"}, torch.bfloat16, torch.float32, True, True),
        ({"offload": "optimizer"}, torch.float32, torch.float32, True, True),
    ],
)
def test_a_plan_says_where_state_lies_and_how_wide_it_is(
    changes: dict[str, Any],
    gradients: torch.dtype,
    master: torch.dtype,
    needs_master: bool,
    is_apart: bool,
) -> None:
    storage = Storage.of(plan_of(**changes), torch.device("cpu"))
    assert (storage.gradient_dtype, storage.master_dtype) == (gradients, master)
    assert storage.needs_master(storage.compute_dtype) is needs_master
    assert storage.has_apart_gradients is is_apart
    made = storage.new_master((2, 3))
    assert (made.shape, made.dtype, made.device.type) == ((2, 3), master, "cpu")
