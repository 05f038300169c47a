"""Where state lies changes no bit of a run; gradients of half the width change it by their roundings alone, and save what they should."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runtime.engine_entries import GLOBAL_BATCH, SEQUENCE, VOCABULARY, Case
from tests.runtime.test_engine import results_of

from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.source import load_model
from shardstage.layout import Mesh
from shardstage.plan import Plan, Precision, check, complete, parse_request
from shardstage.runtime.storage import Storage

BFLOAT16_ROUNDOFF = 2.0**-8

PLANS = {2: ("dp=2,zero=1,mb=2,shares=4/2", "dp=2,zero=3,mb=2"), 3: ("dp=3,mb=1,zero=2",)}
ALONE = "pp=2,mb=2"
"""Most of its parameters concern no other rank and have no bucket."""


@cache
def graph_of(precision: Precision) -> ModelGraph:
    source = load_model("gpt2-tiny", tokenizer_vocab=VOCABULARY)
    return capture(source, sequence=SEQUENCE, dtype=precision)


def case_of(shorthand: str, num_ranks: int, precision: Precision = "bfloat16") -> Case:
    plan = complete(
        parse_request(f"{shorthand},dtype={precision}"),
        graph_of(precision),
        num_ranks=num_ranks,
        global_batch=GLOBAL_BATCH,
        sequence=SEQUENCE,
    )
    check(plan, graph_of(precision), num_ranks=num_ranks)
    return Case("gpt2-tiny", graph_of(precision), plan)


@pytest.mark.parametrize("num_ranks", PLANS)
def test_the_optimizers_place_changes_no_bit_and_gradients_dtype_only_roundings(
    num_ranks: int, tmp_path: Path
) -> None:
    """Ties, odd vocabulary, uneven shares, biases and norms, several microbatches; two steps with clipping."""
    kinds = (",grads=bf16", ",grads=bf16,offload=optimizer", "", ",offload=optimizer")
    cases = [case_of(text + more, num_ranks) for text in PLANS[num_ranks] for more in kinds]
    if num_ranks == 2:
        cases += [case_of(ALONE + more, 2, "float32") for more in ("", ",offload=optimizer")]
    found = iter(results_of(cases, num_ranks, tmp_path))
    for text in PLANS[num_ranks]:
        narrow, narrow_sent, wide, wide_sent = (next(found) for _ in kinds)
        assert narrow == narrow_sent, text
        assert wide == wide_sent, text
        assert narrow["gradient_dtypes"] == ["torch.bfloat16"], text
        assert wide["gradient_dtypes"] == ["torch.float32"], text
        _differ_by_roundings_of_sums(narrow, wide)
    alone = list(found)
    assert alone[1:] == alone[:-1]


def _differ_by_roundings_of_sums(narrow: dict[str, Any], wide: dict[str, Any]) -> None:
    """The first loss comes before any gradient. A sum of at most 6 microbatches and ranks is rounded as often, each time by u at most."""
    assert narrow["losses"][0] == wide["losses"][0]
    assert narrow["digests"] != wide["digests"]
    assert narrow["norms"][0] == pytest.approx(wide["norms"][0], rel=GLOBAL_BATCH * BFLOAT16_ROUNDOFF)
    assert narrow["losses"][1] == pytest.approx(wide["losses"][1], rel=BFLOAT16_ROUNDOFF)


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
