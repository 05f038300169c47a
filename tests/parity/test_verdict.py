"""What a verdict says."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from shardstage.parity.tolerance import Derivation
from shardstage.parity.verdict import Cause, FirstFailure, Row, Verdict

DERIVATION = Derivation(
    precision="float32",
    unit_roundoff=2.0**-24,
    num_ops=100,
    longest_sum=64,
    num_probes=2,
    num_steps=4,
    relative={"loss": 1e-7, "gradient_norm": 1e-7, "gradient": 1e-6, "parameter": 1e-5},
)
GOOD = Row(quantity="loss", where="step 3 of 4", error=1e-7, tolerance=1e-6, reference=5.0, count=4)
VERDICT = Verdict(subject="llama-tiny on dp=2", rows=(GOOD,), derivation=DERIVATION)


def row(error: float, tolerance: float = 1.0) -> Row:
    return replace(GOOD, error=error, tolerance=tolerance)


def test_a_run_is_equal_if_every_row_is_within_its_tolerance() -> None:
    assert VERDICT.is_equal and VERDICT.largest_ratio == 0.1
    assert not replace(VERDICT, rows=(GOOD, row(1.1))).is_equal


def test_what_is_no_number_is_not_equal() -> None:
    assert not row(math.nan).is_equal
    assert not row(1e-300, 0.0).is_equal
    assert row(0.0, 0.0).is_equal


def test_other_losses_than_the_training_runs_are_not_equal() -> None:
    verdict = replace(VERDICT, logged="step 2 has loss 5.0 there and 5.1 here", is_log_equal=False)
    assert not verdict.is_equal
    assert "step 2 has loss 5.0 there and 5.1 here" in verdict.text()
    assert "NOT EQUAL" in verdict.text()


def test_a_failure_names_module_rank_and_cause() -> None:
    verdict = replace(
        VERDICT,
        rows=(row(1e9),),
        failure=FirstFailure(module="layers.3", direction="forward", ranks=(1,)),
        cause=Cause(name="wrong RNG", evidence="rank 1 draws its dropout masks from " + "seed 17 " * 20),
    )
    text = verdict.text()
    assert "first at  layers.3 (forward), rank 1" in text
    assert "probably  wrong RNG" in text
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_a_long_name_keeps_its_end() -> None:
    long = replace(GOOD, where="model.decoder.layers.17.self_attention.projection.weight")
    line = replace(VERDICT, rows=(long,)).text().splitlines()[3]
    assert "…" in line and "projection.weight" in line and len(line) <= 80


def test_the_report_is_json_with_every_ratio() -> None:
    report = json.loads(VERDICT.to_json())
    assert report["is_equal"] is True
    assert report["rows"][0]["ratio"] == 0.1
    assert report["derivation"]["precision"] == "float32"
