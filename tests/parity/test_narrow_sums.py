"""Gradients that are summed in bfloat16 are proved against a tolerance that knows of it, and faults are found all the same."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from tests.parity.entries import Case, prove_all
from tests.parity.models import job_of

from shardstage.graph import ModelGraph
from shardstage.parity import Fault, Verdict
from shardstage.parity.compare import Reference
from shardstage.parity.prove import run_reference
from shardstage.parity.rounding import UNIT_ROUNDOFF, Rounding

TWO_RANKS: Mapping[str, Fault | None] = {
    "dp=2,mb=1,grads=bf16,offload=optimizer": None,
    "dp=2,mb=1,zero=3,grads=bf16": None,
    "dp=2,mb=1,zero=1,grads=bf16": "missing-reduction",
}
THREE_RANKS: Mapping[str, Fault | None] = {"dp=3,mb=2,zero=2,grads=bf16,offload=optimizer": None}


def verdicts_of(plans: Mapping[str, Fault | None], ranks: int, folder: Path) -> dict[str, Verdict]:
    """All plans cut the batch alike and sum in the same dtype: they have one reference."""
    cases: dict[str, Case] = {}
    graph: ModelGraph | None = None
    reference: Reference | None = None
    for plan, fault in plans.items():
        job = job_of(
            "gpt2", folder / "runs", plan=plan, ranks=ranks, steps=1, precision="bfloat16", graph=graph
        )
        reference = reference or run_reference(job)
        graph = job.graph
        cases[plan] = Case(job=job, reference=reference, fault=fault)
    return prove_all(cases, folder / "proofs", num_ranks=ranks)


@pytest.mark.parametrize(("plans", "ranks"), [(TWO_RANKS, 2), (THREE_RANKS, 3)], ids=["2", "3"])
def test_narrow_sums_are_proved_and_their_faults_found(
    plans: Mapping[str, Fault | None], ranks: int, tmp_path: Path
) -> None:
    for plan, verdict in verdicts_of(plans, ranks, tmp_path).items():
        text = verdict.text()
        assert "sums of gradients are rounded to bfloat16" in text
        if plans[plan] is None:
            assert verdict.is_equal, (plan, text)
            assert verdict.largest_ratio < 0.6, (plan, text)
        else:
            assert not verdict.is_equal and verdict.cause is not None, (plan, text)
            assert verdict.cause.name == "missing reduction over dp", (plan, text)


def test_narrow_sums_may_err_more_and_not_by_much(tmp_path: Path) -> None:
    """Each microbatch's gradient errs by bfloat16's roundoff and the model's depth already: rounding sums adds to that."""
    wide, narrow = (
        run_reference(job_of("gpt2", tmp_path, plan=f"mb=1{more}", steps=1, precision="bfloat16")).tolerances
        for more in ("", ",grads=bf16")
    )
    ratios = [narrow.gradients[name] / wide.gradients[name] for name in wide.gradients]
    assert 1.0 < sum(ratios) / len(ratios) < 4.0
    assert "sums of gradients" in narrow.derivation.text()
    assert "sums of gradients" not in wide.derivation.text()


@cache
def disturbed_sum(num_terms: int) -> torch.Tensor:
    """A thousand sums of equal terms, rounded after each."""
    rounding = Rounding({torch.float32: UNIT_ROUNDOFF["bfloat16"]}, seed=3)
    total = torch.zeros(1000, dtype=torch.float64)
    for _ in range(num_terms):
        total += 1 / num_terms
        rounding.disturb_sum(total, UNIT_ROUNDOFF["bfloat16"])
    return total


@pytest.mark.parametrize("num_terms", [1, 4, 16])
def test_a_disturbed_sum_errs_as_often_as_it_is_rounded(num_terms: int) -> None:
    """Of uniform ξ the variance is 1/3; the k-th rounding is of k/n of the sum."""
    error = (disturbed_sum(num_terms) - 1).square().mean().sqrt()
    shares = sum((k / num_terms) ** 2 for k in range(1, num_terms + 1))
    assert float(error) == pytest.approx(UNIT_ROUNDOFF["bfloat16"] * (shares / 3) ** 0.5, rel=0.1)
