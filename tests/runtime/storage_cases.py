"""One plan with its state in other places and widths: on the device or offloaded, gradients wide or narrow."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
from tests.runtime.engine_entries import GLOBAL_BATCH, SEQUENCE, VOCABULARY, Case

from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.source import load_model
from shardstage.plan import Precision, check, complete, parse_request

BFLOAT16_ROUNDOFF = 2.0**-8
PLACES = (",grads=bf16", ",grads=bf16,offload=optimizer", "", ",offload=optimizer")


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


def storage_cases(plan: str, num_ranks: int) -> dict[str, Case]:
    """By their shorthands."""
    return {plan + place: case_of(plan + place, num_ranks) for place in PLACES}


def assert_only_widths_differ(plan: str, found: Mapping[str, dict[str, Any]]) -> None:
    """Where state lies changes no bit; gradients of half the width change a run by their roundings alone."""
    narrow, narrow_sent, wide, wide_sent = (found[plan + place] for place in PLACES)
    assert narrow == narrow_sent, plan
    assert wide == wide_sent, plan
    assert narrow["gradient_dtypes"] == ["torch.bfloat16"], plan
    assert wide["gradient_dtypes"] == ["torch.float32"], plan
    _differ_by_roundings_of_sums(narrow, wide)


def _differ_by_roundings_of_sums(narrow: dict[str, Any], wide: dict[str, Any]) -> None:
    """The first loss comes before any gradient. A sum of at most 6 microbatches and ranks is rounded as often, each time by u at most."""
    assert narrow["losses"][0] == wide["losses"][0]
    assert narrow["digests"] != wide["digests"]
    assert narrow["norms"][0] == pytest.approx(wide["norms"][0], rel=GLOBAL_BATCH * BFLOAT16_ROUNDOFF)
    assert narrow["losses"][1] == pytest.approx(wide["losses"][1], rel=BFLOAT16_ROUNDOFF)
