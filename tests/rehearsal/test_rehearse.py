"""A rehearsal of plans that are small enough to look at: what is executed, who stands for whom, what differs."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
from tests.runtime.dry_run_cases import Rehearsed, case, rehearsed, source_of

from shardstage.cluster import Cluster, load
from shardstage.planner import predict
from shardstage.rehearsal import Rehearsal, Which, rehearse
from shardstage.rehearsal.text import rehearsal_text
from shardstage.simulator import peak_bytes, planned_prices

MODULE = import_module("shardstage.rehearsal.rehearse")


def cluster_for(given: Rehearsed) -> Cluster:
    return load(f"a100-80:{given.plan.mesh.world_size}")


def tried_out(given: Rehearsed, which: Which = "distinct", **more: object) -> Rehearsal:
    return rehearse(given.graph, given.plan, given.source, cluster_for(given), which=which, **more)  # type: ignore[arg-type]  # passed on


def test_each_kind_of_rank_is_executed_once_and_stands_for_all() -> None:
    found = tried_out(case("uneven shares, pp=3"))
    assert found.differences == ()
    assert all(rank.is_executed and rank.stored is not None for rank in found.ranks)
    assert sorted(rank for each in found.ranks for rank in each.alike) == list(range(6))
    assert found.fullest.peak_bytes == max(rank.peak_bytes for rank in found.ranks)
    assert found.stored_bytes is not None
    assert found.stored_bytes >= 12 * found.program.global_batch


def test_the_simulator_and_the_engine_agree_on_memory() -> None:
    """On tensors of kilobytes alignment and small buffers weigh more than on real ones, where it is a few per mille."""
    for name in ("uneven shares, pp=3", "ties over pp, tp=3"):
        for rank in tried_out(case(name)).ranks:
            assert rank.predicted_bytes == pytest.approx(rank.peak_bytes, rel=0.08), name


@pytest.mark.parametrize("name", ["narrow gradients, offloaded", "zero=3, rows of narrow gradients"])
def test_what_lies_with_the_host_or_is_narrow_is_held_as_predicted(name: str) -> None:
    """Between steps, and at the peak: masters and optimizer state of an offloaded rank take nothing of its device."""
    given = case(name)
    holdings = planned_prices(given.graph, given.plan, load("a100-80:16")).holdings
    run, held = given.run(0), holdings.rank(0)
    is_offloaded = given.plan.offload == "optimizer"
    assert ("optimizer" not in run.between_steps) is (held.optimizer == 0) is is_offloaded
    for category in ("parameters", "master", "optimizer"):
        expected = getattr(held, category)
        assert run.between_steps.get(category, 0) == pytest.approx(expected, rel=0.03), category
    assert peak_bytes(given.program, 0, holdings) == pytest.approx(run.peak.peak_bytes, rel=0.1)


@pytest.mark.parametrize(
    ("model", "modules"),
    [("llama", "*.mlp"), ("llama", "*.self_attn/*norm"), ("gpt2", "*.act"), ("gpt2", "*.ln_?/*.mlp")],
)
def test_named_modules_spare_what_is_predicted(model: str, modules: str) -> None:
    """What the engine's own code holds of activations at most, on tensors without memory: the same bytes fewer than without."""
    spared = []
    for more in ("", f",recompute=selective,modules={modules}"):
        given = rehearsed(model, f"tp=2,sp,mb=32{more}", 2, 32)
        expected = predict(given.graph, given.plan, load("a100-80:2")).ranks[0].activations
        spared.append((max(m.held.get("activations", 0) for m in given.run(0).moments), expected))
    (before, before_predicted), (after, after_predicted) = spared
    assert before - after == before_predicted - after_predicted > 0


def test_all_executes_every_rank_and_none_executes_none() -> None:
    given = rehearsed("llama", "dp=2,pp=2,mb=1", 4, 8)
    every = tried_out(given, "all")
    assert [rank.rank for rank in every.ranks] == [0, 1, 2, 3]
    assert all(rank.is_executed and rank.alike == (rank.rank,) for rank in every.ranks)
    simulated = tried_out(given, "none")
    assert not any(rank.is_executed for rank in simulated.ranks)
    assert simulated.stored_bytes is None
    assert [rank.peak_bytes for rank in simulated.ranks] == [rank.predicted_bytes for rank in simulated.ranks]
    assert simulated.timeline.step_time_s == every.timeline.step_time_s


def test_a_plan_that_compiles_is_tried_out_without_a_compiler() -> None:
    plain, compiled = (rehearsed("llama", f"dp=2,mb=2{more}", 2, 4) for more in ("", ",compile"))
    assert compiled.plan.is_compiled
    assert [rank.held for rank in tried_out(compiled).ranks] == [rank.held for rank in tried_out(plain).ranks]


def test_processes_find_what_one_process_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    given = rehearsed("llama", "pp=3,mb=1", 3, 5)
    alone = tried_out(given)
    monkeypatch.setattr(MODULE, "STARTING_S", 0.0)
    told: list[str] = []
    shared = tried_out(given, num_processes=2, reload=partial(source_of, "llama"), progress=told.append)
    assert shared.ranks == alone.ranks
    assert told[-1] == "dry run of 3 of 3 ranks"


def test_what_the_engine_does_otherwise_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that promises another order of collectives than the engine has: the rank, the act and both are named."""
    given = case("ties over pp, tp=3")
    calls = {
        name: tuple(reversed(found)) if len({c.numel for c in found}) > 1 else found
        for name, found in given.program.calls.items()
    }
    monkeypatch.setattr(MODULE, "lower", lambda *_: replace(given.program, calls=calls))
    monkeypatch.setattr(MODULE, "verify", lambda _: None)
    found = tried_out(given)
    assert found.differences
    text = rehearsal_text(found, mfu=0.1, limit_of=lambda _: 2**30)
    assert re.search(r"differs: rank \d+, .*the Program says .*, the engine did ", text)
    assert "as the program says" not in text


def test_the_text_fits_80_columns_and_names_what_is_held() -> None:
    given = rehearsed("llama", "dp=4,pp=3,mb=1", 12, 200)
    found = tried_out(given)
    for limit_bytes in (2**10, 2**40):
        text = rehearsal_text(found, mfu=0.123, limit_of=lambda _, limit=limit_bytes: limit)
        assert [line for line in text.splitlines() if len(line) > 80] == []
        assert f"rank {found.fullest.rank} holds most" in text
        assert ("too much" in text) == (limit_bytes == 2**10)
    assert "3 of 12 ranks executed" in text and "4 of 50" in text
