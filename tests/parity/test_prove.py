"""Plans are proved, and every fault is found, by ranks that really run."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from tests.parity.entries import Case, prove_all
from tests.parity.models import job_of

from shardstage.parity import Fault, Verdict
from shardstage.parity.compare import Reference
from shardstage.parity.prove import run_reference
from shardstage.training.job import TrainJob

CORRECT = {
    "gpt2 dp=2": ("gpt2", "dp=2"),
    "gpt2 pp=2": ("gpt2", "pp=2"),
    "gpt2 zero=3": ("gpt2", "zero=3,dp=2"),
    "bert tp=2": ("bert", "tp=2"),
    "bert with sequence parallel": ("bert", "tp=2,sp=1"),
    "llama tp=2 bfloat16": ("llama", "tp=2"),
    "llama one microbatch a sample": ("llama", "dp=2,mb=1"),
}
BROKEN: Mapping[str, tuple[str, str, Fault, str, str, tuple[int, ...]]] = {
    # name: model, plan, fault, cause, module, ranks
    "sum": ("gpt2", "dp=2", "missing-reduction", "missing reduction over dp", "transformer.wte.weight", (0, 1)),
    "sharded sum": ("gpt2", "zero=3,dp=2", "missing-reduction", "missing reduction over dp", "transformer.wte.weight", (0, 1)),
    "sum in bfloat16": ("llama", "dp=2", "missing-reduction", "missing reduction over dp", "lm_head.weight", (0, 1)),
    "tp sum": ("bert", "tp=2", "missing-tp-reduction", "missing reduction over tp", "bert.embeddings.dropout", (0, 1)),
    "loss": ("gpt2", "pp=2", "doubled-loss", "doubled loss", "transformer.wte.weight", (0, 1)),
    "masks": ("gpt2", "dp=2", "wrong-rng", "wrong RNG", "transformer.drop", (0, 1)),
    "tie": ("gpt2", "pp=2", "lost-tie", "lost tie", "transformer.wte.weight", (0, 1)),
    "dtype": ("gpt2", "dp=2", "dtype", "dtype: computed in bfloat16", "transformer.drop", (0, 1)),
    "samples": ("gpt2", "dp=2", "swapped-batch", "wrong data order", "transformer.drop", (1,)),
}  # fmt: skip
PRECISION = {"gpt2": "float32", "bert": "float32", "llama": "bfloat16"}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TrainJob, Reference]]:
    """A job on one rank for each model, and its reference, which holds for every plan."""
    jobs = {m: job_of(m, tmp_path_factory.mktemp(m), precision=p) for m, p in PRECISION.items()}
    return {model: (job, run_reference(job)) for model, job in jobs.items()}


@pytest.fixture(scope="module")
def verdicts(
    references: dict[str, tuple[TrainJob, Reference]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Verdict]:
    """All cases of two ranks."""
    folder = tmp_path_factory.mktemp("two-ranks")

    def case(model: str, plan: str, fault: Fault | None) -> Case:
        first, reference = references[model]
        job = job_of(
            model, folder / "runs", plan=plan, ranks=2, precision=PRECISION[model], graph=first.graph
        )
        return Case(job=job, reference=reference, fault=fault)

    cases = {name: case(model, plan, None) for name, (model, plan) in CORRECT.items()}
    cases |= {name: case(model, plan, fault) for name, (model, plan, fault, *_) in BROKEN.items()}
    return prove_all(cases, folder / "proofs", num_ranks=2)


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_plan_is_equal_with_room_to_spare(name: str, verdicts: dict[str, Verdict]) -> None:
    verdict = verdicts[name]
    assert verdict.is_equal, verdict.text()
    assert verdict.largest_ratio < 0.6, verdict.text()
    assert "EQUAL: the run computes what one device computes" in verdict.text()


@pytest.mark.parametrize("name", BROKEN)
def test_a_fault_is_found_and_named(name: str, verdicts: dict[str, Verdict]) -> None:
    verdict = verdicts[name]
    _, _, _, cause, module, ranks = BROKEN[name]
    assert not verdict.is_equal
    assert verdict.largest_ratio > 3, verdict.text()
    assert verdict.cause is not None and verdict.failure is not None, verdict.text()
    assert (verdict.cause.name, verdict.failure.module) == (cause, module), verdict.text()
    assert set(verdict.failure.ranks) == set(ranks), verdict.text()


def test_what_a_verdict_prints_fits_80_columns(verdicts: dict[str, Verdict]) -> None:
    for verdict in verdicts.values():
        assert [line for line in verdict.text().splitlines()[1:] if len(line) > 80] == []
