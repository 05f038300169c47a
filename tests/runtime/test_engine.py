"""Every plan trains as one device does: the engine on real ranks against a plain PyTorch loop over the unmodified model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.runtime.engine_entries import (
    GLOBAL_BATCH,
    NUM_STEPS,
    OPTIMIZER,
    SEQUENCE,
    VOCABULARY,
    Case,
    global_batch,
    run_cases,
)
from tests.runtime.recompute_cases import RECOMPUTING, recompute_cases
from tests.runtime.storage_cases import assert_only_widths_differ, storage_cases

from shardstage.graph import ModelGraph
from shardstage.graph.capture import capture
from shardstage.graph.source import load_model
from shardstage.layout import Replicate
from shardstage.plan import check, complete, parse_request
from shardstage.program import StageGraphs
from shardstage.runtime.launch import launch
from shardstage.runtime.optimizer import learning_rate
from shardstage.runtime.weights import initialised_model

# The runs compute in float64; what is left is that the models themselves round to float32 in places (norms, softmax): a relative
# 2**-24 each, over a few dozen such places in sequence, in a loss of about 5.6.
TOLERANCE = 64 * 2**-24

THREE_RANKS = {
    "llama-tiny": (
        "pp=3",
        "dp=3,zero=3",
        "tp=3,sp",
        "dp=3,mb=1,zero=1",
        "pp=3,schedule=zb-h1,mb=1",
        "pp=3,schedule=interleaved-1f1b,mb=1,recompute=selective",
        "pp=3,schedule=dualpipe-v,mb=1",
    ),
    "gpt2-tiny": ("pp=3,schedule=gpipe", "tp=3", "pp=3,schedule=zb-v,mb=1", "pp=3,schedule=looped-bfs,mb=2"),
}
FOUR_RANKS = {
    "llama-tiny": (
        "dp=4,shares=2/2/1/1",
        "zero=3,dp=4,shares=2/2/1/1",
        "tp=4,recompute=full",
        "pp=4,mb=1",
        "dp=2,tp=2,zero=1",
        "dp=2,tp=2,sp,zero=2,recompute=selective",
        "dp=2,pp=2,mb=1,zero=3,schedule=gpipe",
        "tp=2,pp=2,sp,mb=2",
        "dp=2,pp=2,schedule=zb-v,mb=1,zero=1",
        "tp=2,pp=2,schedule=zb-h1,mb=1,recompute=full",
        "dp=2,pp=2,schedule=interleaved-1f1b,mb=1,zero=2,v=3",
        "dp=2,pp=2,schedule=zb-h1,mb=2,shares=4/2,zero=3",
    ),
    "gpt2-tiny": ("dp=2,pp=2,mb=1", "tp=2,pp=2,mb=3", "dp=2,tp=2,zero=3", "pp=4,mb=1,recompute=full"),
    "bert-tiny": ("dp=2,tp=2", "pp=4,mb=2", "tp=4,sp", "dp=2,pp=2,schedule=dualpipe-v,mb=1"),
    "mixtral-tiny": ("tp=2,pp=2,mb=2",),
}

STORED_ON_THREE = "dp=3,mb=1,zero=2"


@cache
def graph_of(model: str) -> ModelGraph:
    return capture(load_model(model, tokenizer_vocab=VOCABULARY), sequence=SEQUENCE, dtype="float64")


def case_of(model: str, shorthand: str, num_ranks: int) -> Case:
    plan = complete(
        parse_request(f"{shorthand},dtype=float64"),
        graph_of(model),
        num_ranks=num_ranks,
        global_batch=GLOBAL_BATCH,
        sequence=SEQUENCE,
    )
    check(plan, graph_of(model), num_ranks=num_ranks)
    return Case(model, graph_of(model), plan)


def table_cases(table: Mapping[str, Sequence[str]], num_ranks: int) -> dict[str, Case]:
    """By model and shorthand."""
    return {
        f"{model} {shorthand}": case_of(model, shorthand, num_ranks)
        for model, shorthands in table.items()
        for shorthand in shorthands
    }


def results_of(cases: Mapping[str, Case], num_ranks: int, folder: Path) -> dict[str, dict[str, Any]]:
    """What the ranks found, by the cases' names. To start a rank takes more of a core than a case."""
    out = folder / "results.json"
    launch(
        run_cases, (list(cases.values()), str(out)), num_ranks=num_ranks, log_dir=folder, threads_per_rank=1
    )
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return dict(zip(cases, found, strict=True))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each model on one rank."""
    cases = {model: case_of(model, "mb=6", 1) for model in FOUR_RANKS}
    return results_of(cases, 1, tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def on_three_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Everything that three ranks are asked for."""
    folder = tmp_path_factory.mktemp("three")
    cases = {
        **table_cases(THREE_RANKS, 3),
        **recompute_cases(folder),
        **storage_cases(STORED_ON_THREE, 3),
    }
    return results_of(cases, 3, folder)


def test_every_plan_of_three_ranks_trains_as_one_rank_does(
    on_three_ranks: dict[str, dict[str, Any]], single: dict[str, dict[str, Any]]
) -> None:
    _train_as_one_rank_does(table_cases(THREE_RANKS, 3), on_three_ranks, single)


def test_every_plan_of_four_ranks_trains_as_one_rank_does(
    single: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    cases = table_cases(FOUR_RANKS, 4)
    _train_as_one_rank_does(cases, results_of(cases, 4, tmp_path), single)


def test_what_recomputes_changes_no_bit_of_a_run(on_three_ranks: dict[str, dict[str, Any]]) -> None:
    """Seven layers with dropout: after two steps losses, norms and all weights are those without recomputation."""
    for plain, others in RECOMPUTING.items():
        for more in others:
            assert on_three_ranks[f"{plain},{more}"] == on_three_ranks[plain], more


def test_on_three_ranks_too_state_may_lie_anywhere_and_gradients_dtype_changes_only_roundings(
    on_three_ranks: dict[str, dict[str, Any]],
) -> None:
    assert_only_widths_differ(STORED_ON_THREE, on_three_ranks)


def _train_as_one_rank_does(
    cases: Mapping[str, Case], found: Mapping[str, dict[str, Any]], single: Mapping[str, dict[str, Any]]
) -> None:
    for text, case in cases.items():
        result, expected = found[text], single[case.model]
        assert result["targets"] == expected["targets"], text
        assert result["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE), text
        assert result["norms"] == pytest.approx(expected["norms"], rel=TOLERANCE), text
        _holds_its_share_only(case, result["held"])


def _holds_its_share_only(case: Case, held: list[int]) -> None:
    """No rank holds more than its part of the masters: of 4 heads on 3 ranks one gets two, so half of what is cut by heads."""
    whole, plan = case.graph.num_parameters, case.plan
    placements = StageGraphs(case.graph, plan).sharding_at(plan.microbatches(0)[0]).parameters
    kept_whole = sum(
        case.graph.values[p.name].numel
        for p in case.graph.parameters
        if isinstance(placements[p.fqn], Replicate)
    )
    largest_part = -(-4 // plan.mesh.tp) / 4
    largest = (kept_whole + largest_part * (whole - kept_whole)) / (plan.mesh.dp if plan.zero else 1)
    assert sum(held) >= whole * (1 if plan.zero else plan.mesh.dp)
    if plan.mesh.pp == 1:
        assert max(held) <= 1.1 * largest  # rows that do not divide


def test_one_rank_trains_as_a_plain_loop_does(single: dict[str, dict[str, Any]]) -> None:
    """Llama without dropout against ten lines of PyTorch that use nothing of ours but the weights."""
    model = initialised_model(
        load_model("llama-tiny", tokenizer_vocab=VOCABULARY), seed=7, dtype=torch.float64
    )
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": OPTIMIZER.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
    )
    losses, norms = [], []
    for step in range(NUM_STEPS):
        batch = global_batch(step)
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert OPTIMIZER.max_grad_norm is not None
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIMIZER, step)
        optimizer.step()
        losses.append(loss.item())
    assert single["llama-tiny"]["losses"] == pytest.approx(losses, rel=TOLERANCE)
    assert single["llama-tiny"]["norms"] == pytest.approx(norms, rel=TOLERANCE)
