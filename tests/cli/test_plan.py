"""``shardstage plan``: what the user reads, and what lands in the file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from tests.cost.machines import round_machine
from tests.cost.toy import Experts, toy_graph
from typer.testing import CliRunner

from shardstage import capture, load_model
from shardstage.cli import plan as verb
from shardstage.cli.choosing import KnownModel, precision_of
from shardstage.cluster import load, save
from shardstage.errors import PlanError
from shardstage.plan import load_plan

GRAPH = toy_graph(num_layers=6, width=64, hidden=256)


@pytest.fixture(autouse=True)
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy stands for any model: capture has tests of its own."""

    monkeypatch.setattr(
        verb, "known_model", lambda _name, _seq, _dtype: KnownModel(graph=GRAPH, max_sequence=1024)
    )


def ran(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(verb.plan)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments), catch_exceptions=True)
    if result.exception is not None:
        raise result.exception
    return result


def said(*arguments: str) -> str:
    return ran(*arguments).output


def table(*arguments: str) -> dict[str, Any]:
    """What ``--json`` prints; nothing else may be on standard output."""
    found = json.loads(ran("--cluster", "cpu:4", "--seq", "64", "--json", *arguments).stdout)
    assert isinstance(found, dict)
    return found


def test_a_chosen_plan_is_shown_with_its_price_and_what_else_there_was() -> None:
    text = said("--cluster", "cpu:4", "--ranks", "4", "--seq", "64")
    for word in (
        "plan",
        "step time",
        "low",
        "high",
        "tokens/s, MFU",
        "memory",
        "proof      best of",
        "gap 0",
        "slower",
        "why not",
    ):
        assert word in text


def test_a_written_plan_loads_and_is_priced_the_same(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    first = said("--cluster", "cpu:4", "--plan", "tp=2,pp=2", "--seq", "64", "--out", str(path))
    plan = load_plan(path)
    assert (plan.mesh.tp, plan.mesh.pp, plan.global_batch, plan.sequence) == (2, 2, 16, 64)
    assert plan.graph_fingerprint
    assert f"written to {path}" in first
    again = said("--cluster", "cpu:4", "--plan", str(path), "--seq", "64")
    assert _line(again, "step time") == _line(first, "step time")


def test_a_plan_file_says_of_which_samples_its_step_is(tmp_path: Path) -> None:
    """Another ``--batch`` beside it was followed by nobody, and not mentioned."""
    path = tmp_path / "plan.toml"
    first = said(
        "--cluster", "cpu:4", "--plan", "tp=2,pp=2", "--batch", "24", "--seq", "64", "--out", str(path)
    )
    again = said("--cluster", "cpu:4", "--plan", str(path))
    assert _line(again, "batch") == _line(first, "batch")
    for other, asked in (
        ("--batch 32", "32 samples of 64 tokens"),
        ("--seq 128", "24 samples of 128 tokens"),
    ):
        with pytest.raises(
            PlanError, match=f"is for 24 samples of 64 tokens a step, and not for {asked}"
        ) as refused:
            said("--cluster", "cpu:4", "--plan", str(path), *other.split())
        assert refused.value.hint == "--batch 24 --seq 64"


def test_a_plan_file_for_images_leaves_tokens_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = replace(GRAPH, sequence=None, is_sequence_scalable=False)
    monkeypatch.setattr(verb, "known_model", lambda *_: KnownModel(graph=images))
    path = tmp_path / "plan.toml"
    said("--cluster", "cpu:4", "--plan", "dp=4", "--batch", "24", "--out", str(path))
    assert "24 samples" in said("--cluster", "cpu:4", "--plan", str(path), "--seq", "64")
    with pytest.raises(PlanError, match="is for 24 samples a step, and not for 8 samples"):
        said("--cluster", "cpu:4", "--plan", str(path), "--batch", "8")


def test_explain_says_who_does_what() -> None:
    text = said("--cluster", "cpu:4", "--plan", "tp=2,pp=2", "--explain")
    for title in ("mesh     dp=1", "stages", "memory a rank", "talk a step"):
        assert title in text


def test_the_memory_that_a_rank_may_hold_is_kept() -> None:
    with pytest.raises(PlanError, match=r"no plan for 4 ranks fits into 1.00 KiB"):
        said("--cluster", "cpu:4", "--memory", "1KiB")


def test_a_plan_that_does_not_fit_the_device_is_said() -> None:
    assert "it will not fit" in said(
        "--cluster", "cpu:4", "--plan", "mb=8192", "--batch", "32768", "--seq", "512"
    )


def test_a_plan_that_needs_more_than_a_rank_may_hold_is_said() -> None:
    notes = table("--plan", "tp=4", "--max-memory", "1KiB")["notes"]
    assert any("more than the 1.00 KiB of --max-memory" in note for note in notes)


def test_a_search_over_a_mixed_cluster_is_for_all_its_devices() -> None:
    with pytest.raises(
        PlanError, match="--ranks 4: a search over several classes of devices plans for all 8"
    ):
        said("--cluster", "h100:4 + b200:4", "--ranks", "4")


def test_a_plan_for_other_ranks_is_refused() -> None:
    with pytest.raises(PlanError, match="needs 2 ranks, and there are 4"):
        said("--cluster", "cpu:4", "--plan", "dp=2")


def test_images_are_planned_by_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture has no tokens: ``--seq None`` was the hint that its refusal gave."""
    images = replace(GRAPH, sequence=None, is_sequence_scalable=False)
    monkeypatch.setattr(verb, "known_model", lambda *_: KnownModel(graph=images))
    assert "samples/s, MFU" in said("--cluster", "cpu:2")
    priced = json.loads(ran("--cluster", "cpu:2", "--plan", "dp=2", "--json").stdout)
    assert not re.search(r"^sequence = ", priced["plan_file"], re.MULTILINE)


def test_experts_that_the_model_has_not_cannot_be_dealt_out() -> None:
    with pytest.raises(PlanError, match="ep=8 deals experts out to ranks, and this model has no layer"):
        said("--cluster", "h100:8", "--fix", "ep=8")


def test_samples_longer_than_the_model_s_limit_are_refused() -> None:
    with pytest.raises(PlanError, match="2048 tokens are longer than the 1024 positions"):
        said("--cluster", "cpu:4", "--seq", "2048")


def test_a_gpu_plans_in_bfloat16_and_the_flag_decides() -> None:
    with pytest.raises(PlanError, match="computes in bfloat16, and the model was captured in float32"):
        said("--cluster", "h100:4")
    assert "dtype=float32" in said("--cluster", "h100:4", "--fix", "dtype=fp32")


def test_gpus_without_bfloat16_plan_in_float32_and_say_what_float16_would_gain() -> None:
    """A V100 was planned in bfloat16, which its tensor cores do not have: a ninth of the speed that was promised."""
    text = said("--cluster", "v100-16:4")
    assert "dtype=fp16, 6 times the rate of float32" in " ".join(text.split())
    with pytest.raises(PlanError, match="computes in float16, and the model was captured in float32"):
        said("--cluster", "v100-16:4", "--fix", "dtype=fp16")
    with pytest.raises(PlanError, match="computes in bfloat16, and the model was captured in float32"):
        said("--cluster", "a100-40:4")


def test_among_gpus_of_which_some_have_no_bfloat16_all_compute_in_float32() -> None:
    assert precision_of("auto", None, load("a100-40:4 + v100-16:4")) == "float32"
    assert precision_of("auto", None, load("a100-40:4 + h100:4")) == "bfloat16"
    assert precision_of("auto", "fp16", load("v100-16:4")) == "float16"


def test_what_is_fixed_is_kept() -> None:
    found = table("--fix", "tp=2,zero=1")
    assert "tp=2" in found["plan"] and "zero=1" in found["plan"]


def test_a_fixed_decision_that_does_not_exist_is_refused() -> None:
    with pytest.raises(PlanError, match="colour"):
        said("--cluster", "cpu:4", "--fix", "colour=2")


@pytest.mark.parametrize("flag", ["--memory", "--max-memory"])
def test_the_plan_holds_no_more_than_it_may(flag: str) -> None:
    free = table()
    limit = free["peak_bytes"] - 1
    tight = table(flag, f"{limit}B")
    assert tight["peak_bytes"] <= limit == tight["certificate"]["limit_bytes"]
    assert tight["step_time_s"] >= free["step_time_s"]


def test_a_limit_without_a_unit_is_refused() -> None:
    """``--max-memory 24`` was 24 bytes: the refusal said to take 58,851,884 GPUs."""
    with pytest.raises(PlanError, match="a unit is missing") as caught:
        said("--cluster", "cpu:4", "--max-memory", "24")
    assert caught.value.hint == "--max-memory 24GiB"


def test_no_search_takes_more_than_a_device_has(tmp_path: Path) -> None:
    """``--max-memory 40GiB`` of 24 GiB was answered with a plan of 35.5, and a note that it would not fit."""
    machine = round_machine(4)
    device = replace(machine.device, memory_bytes=2_000_000, name="Old GPU")
    save(replace(machine, device=device), tmp_path / "machine.toml")
    asked = ("--cluster", str(tmp_path / "machine.toml"), "--fix", "dtype=fp32")
    usual, told = table(*asked), table(*asked, "--max-memory", "40GiB")
    assert usual["peak_bytes"] <= 0.92 * 2_000_000
    assert told["certificate"]["limit_bytes"] == 2_000_000 >= told["peak_bytes"]
    assert any("40.0 GiB is more than the 1.91 MiB of a Old GPU" in note for note in told["notes"])
    is_tight = told["peak_bytes"] > 0.92 * 2_000_000
    assert any("a step can use about 1.75 MiB" in note for note in told["notes"]) == is_tight


def test_memory_is_shown_with_what_a_rank_may_hold() -> None:
    asked = ("--cluster", "cpu:4", "--seq", "64", "--max-memory", "3GiB")
    assert re.search(
        r"^memory +\S+ \S+ a rank( .pp=\d.)? of 3.00 GiB: parameters", said(*asked), re.MULTILINE
    )


def test_gradients_of_what_stages_share_are_not_said_to_wait_for_dp(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "dp 14.2 ms" was said of GPT-2 on two stages, where dp=1."""
    tied = toy_graph(num_layers=6, width=64, hidden=256, is_tied=True)
    monkeypatch.setattr(verb, "known_model", lambda *_: KnownModel(graph=tied))
    waits = [
        _line(said("--cluster", "cpu:4", "--seq", "64", "--plan", plan), "waits")
        for plan in ("pp=4", "pp=2,dp=2", "tp=4")
    ]
    assert "tp 0 s, parameters that stages share " in waits[0] and "dp" not in waits[0]
    assert all(", dp " in line and "share" not in line for line in waits[1:])


def test_the_least_memory_is_told_with_what_it_costs() -> None:
    """Of a plan that was a quarter slower nothing said so, nor what the fastest one takes."""
    asked = ("--cluster", "cpu:4", "--seq", "64")
    fastest, least = said(*asked), said(*asked, "--objective", "memory")
    shown = _line(fastest, "step time").split("   ")[0].removeprefix("step time").strip()
    assert f"fastest    {shown} with " in least and "fastest" not in fastest
    assert re.search(r"proof +best of [\d,]+ plans within [\d.]+ .iB a rank, gap", least)
    assert table("--objective", "memory")["fastest"]["step_time_s"] == table()["step_time_s"]
    assert table()["fastest"] is None


def test_devices_without_a_price_are_chosen_by_device_seconds_and_that_is_said() -> None:
    cheapest = table("--objective", "cost")
    assert any("no price is known" in note for note in cheapest["notes"])
    assert not any("no price is known" in note for note in table()["notes"])
    priced = table("--cluster", "a100-80:4", "--objective", "cost", "--fix", "dtype=fp32")
    assert priced["dollars"] and not any("no price is known" in note for note in priced["notes"])


def test_json_is_one_object_with_everything_that_is_shown() -> None:
    found = table()
    assert found["ranks"] == 4 and found["step_time_s"] > 0
    assert found["step_time_low_s"] <= found["step_time_s"] <= found["step_time_high_s"]
    assert max(found["rank_peak_bytes"]) == found["peak_bytes"]
    proof = found["certificate"]
    left_out = sum(proof[name] for name in ("by_bound", "by_memory", "by_rule"))
    assert proof["enumerated"] == proof["priced"] + proof["unfit"] + left_out
    assert proof["gap"] == 0 and proof["cost_s"] == found["step_time_s"]
    assert found["why_not"] and found["front"]
    assert found["runners_up"]
    assert all(row["step_time_s"] >= found["step_time_s"] for row in found["runners_up"])
    assert found["front"][0]["step_time_s"] == found["step_time_s"]


def test_a_plan_that_was_given_has_a_price_and_no_proof() -> None:
    found = table("--plan", "tp=2,pp=2")
    assert found["certificate"] is None and found["front"] == [] and found["why_not"] == []
    assert found["step_time_s"] > 0


def test_the_plan_file_in_the_json_is_a_plan(tmp_path: Path) -> None:
    found = table()
    path = tmp_path / "plan.toml"
    path.write_text(found["plan_file"], encoding="utf-8")
    assert load_plan(path).graph_fingerprint
    again = table("--plan", str(path))
    assert again["step_time_s"] == pytest.approx(found["step_time_s"], rel=1e-9)
    assert again["plan"] == found["plan"]


def test_json_stays_json_where_files_are_written_and_more_is_asked_for(tmp_path: Path) -> None:
    page, plan = tmp_path / "page.html", tmp_path / "plan.toml"
    assert table("--out", str(page), "--out", str(plan), "--explain")["ranks"] == 4
    assert page.exists() and plan.exists()


def test_the_page_stands_alone_and_has_pictures_of_the_front_and_the_mesh(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert f"page written to {path}" in said("--cluster", "cpu:4", "--seq", "64", "--out", str(path))
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.endswith("</html>\n")
    assert page.count("<svg") == 2 and page.count("</svg>") == 2
    assert "src=" not in page and "href=" not in page
    for title in ("Runners-up", "Why not", "How the proof deals with all plans"):
        assert f"<h2>{title}</h2>" in page


def test_the_page_of_a_given_plan_says_that_nothing_was_searched(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    said("--cluster", "cpu:4", "--seq", "64", "--plan", "tp=2,pp=2", "--out", str(path))
    page = path.read_text(encoding="utf-8")
    assert "The plan was given, not searched." in page and page.count("<svg") == 1


@pytest.mark.parametrize("objective", ["time", "cost", "memory"])
def test_an_objective_is_kept_within_what_it_says(objective: str) -> None:
    fastest, found = table(), table("--objective", objective)
    if objective == "time":
        assert found == fastest
    if objective == "memory":
        assert found["peak_bytes"] <= fastest["peak_bytes"]
        assert found["step_time_s"] <= 1.25 * fastest["step_time_s"]
    if objective == "cost":
        assert found["ranks"] * found["step_time_s"] <= fastest["ranks"] * fastest["step_time_s"]


def test_an_objective_beside_a_plan_that_is_given_is_said_to_choose_nothing() -> None:
    given = ("--plan", "dp=2,tp=2")
    assert table(*given, "--objective", "cost")["plan"] == table(*given)["plan"]
    note = "--objective cost says how to choose, and this plan was given"
    assert note in table(*given, "--objective", "cost")["notes"]
    assert note not in [*table(*given)["notes"], *table("--objective", "cost")["notes"]]


def test_an_objective_that_is_none_is_refused_with_those_that_are() -> None:
    with pytest.raises(PlanError, match="'speed' is not one of time, cost, memory") as caught:
        said("--cluster", "cpu:4", "--objective", "speed")
    assert caught.value.hint == "--objective time"


def test_a_search_in_parts_of_blocks_says_what_the_plan_costs_in_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--plan`` with the plan that a search had found said another time, and that it would not fit."""
    experts = Experts(number=2, hidden=64, chosen=1)
    graph = toy_graph(num_layers=2, width=64, hidden=1024, vocab=128, experts=experts)
    monkeypatch.setattr(verb, "known_model", lambda *_: KnownModel(graph=graph, max_sequence=1024))
    save(round_machine(16, latency_s=1e-4, op_latency_s=1e-4), tmp_path / "machine.toml")
    asked = ("--cluster", str(tmp_path / "machine.toml"), "--batch", "32", "--seq", "32")
    limit = "3740432B"
    search = ("--fix", "tp=1,zero=3,dtype=fp32", "--max-memory", limit, "--out", str(tmp_path / "plan.toml"))
    (note,) = (line for line in said(*asked, *search).splitlines() if "few blocks" in line)
    alone = said(*asked, "--plan", str(tmp_path / "plan.toml"), "--max-memory", limit)
    step_s = _line(alone, "step time").split("   ")[0].removeprefix("step time").strip()
    needed = _line(alone, "memory").removeprefix("memory").strip().split(" a rank")[0]
    assert f"takes {step_s} and needs {needed} a rank: to fit, it was searched for within 3.32 MiB" in note
    assert not any("more than" in line for line in alone.splitlines())
    least = said(*asked, "--fix", "tp=1,dtype=fp32", "--objective", "memory")
    assert "in whole blocks" in least and "to fit" not in least, "nobody asked for less than there is"
    assert "few blocks" not in said("--cluster", "cpu:4", "--plan", "dp=4")
    monkeypatch.setattr(verb, "known_model", lambda *_: KnownModel(graph=GRAPH, max_sequence=1024))
    assert "few blocks" not in said("--cluster", "cpu:4"), "blocks are enough"


def test_a_runnable_plan_has_no_note_that_it_does_not_run() -> None:
    runs = table("--fix", "runnable", "--batch", "7")
    assert not any("--fix runnable" in note for note in runs["notes"])
    assert table("--batch", "7")["step_time_s"] <= runs["step_time_s"]


def test_what_runs_says_where_ranks_beyond_whole_nodes_only_hinder(tmp_path: Path) -> None:
    """On 17 GPUs what runs was five times slower than on 16 of them, and nothing said so."""
    save(round_machine(8, node=4, latency_s=1e-3), tmp_path / "machine.toml")
    asked = ("--cluster", str(tmp_path / "machine.toml"), "--batch", "8", "--seq", "64")

    def notes(*more: str) -> list[str]:
        found = table(*asked, *more)["notes"]
        return [note for note in found if "leaves no rank idle" in note]

    (note,) = notes("--fix", "runnable,dtype=fp32", "--ranks", "7")
    assert note.endswith("less time: --ranks 4") and "4 of these 7" in note
    assert not notes("--fix", "runnable,dtype=fp32", "--ranks", "4")
    assert not notes("--fix", "dtype=fp32", "--ranks", "7")


def test_what_compiling_would_bring_is_said_where_nobody_decided_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--fix compile`` was 40 % faster than the best plan of all, and nothing said so."""
    graph = capture(load_model("gpt2-tiny"), sequence=64)
    monkeypatch.setattr(verb, "known_model", lambda *_: KnownModel(graph=graph, max_sequence=1024))
    asked = ("--cluster", "h100:4", "--seq", "64", "--batch", "16")
    searched = json.loads(ran(*asked, "--fix", "dtype=fp32", "--json").stdout)
    compiled = json.loads(ran(*asked, "--fix", "dtype=fp32,compile", "--json").stdout)
    assert compiled["step_time_s"] < 0.99 * searched["step_time_s"]
    (note,) = (note for note in searched["notes"] if "torch.compile" in note)
    assert "less time: --fix compile" in note
    assert not any("torch.compile" in note for note in compiled["notes"])


def test_what_savers_would_bring_is_searched_where_more_is_asked_for() -> None:
    """Three searches take as long as three: without --explain the plan's own mesh is priced with savers."""
    asked = ("--cluster", "h100:4", "--seq", "64", "--fix", "dtype=fp32", "--json")
    (quick,) = json.loads(ran(*asked).stdout)["savings"]
    (searched,) = json.loads(ran(*asked, "--explain").stdout)["savings"]
    assert quick["savers"] == searched["savers"] == "offload=optimizer" and quick["plan"] is None
    offloaded = json.loads(ran(*asked[:-2], "dtype=fp32,offload=optimizer", "--json").stdout)
    assert searched["plan"] == offloaded["plan"]
    assert searched["step_time_s"] == offloaded["step_time_s"] <= quick["step_time_s"]


def test_ranks_that_a_fixed_decision_leaves_idle_are_said_to_be_so() -> None:
    (note,) = (n for n in table("--fix", "dp=3,dtype=fp32")["notes"] if "stay idle" in n)
    assert note.endswith("no faster, keeping to --fix dp=3,dtype=fp32")


def test_a_device_with_a_price_gives_a_step_its_price() -> None:
    arguments = ("--cluster", "a100-80:4", "--seq", "64", "--fix", "dtype=fp32")
    found = json.loads(ran(*arguments, "--json").stdout)
    assert found["dollars"] == pytest.approx(4 * found["step_time_s"] / 3600 * 3.4309, rel=1e-3)
    assert "cost       $" in said(*arguments)
    assert table()["dollars"] is None


def _line(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name))


_FREES_LARGE_ARRAYS = """
import numpy as np
from shardstage.cli.app import run
from shardstage.runtime.peak_memory import resident_bytes

assert run(["plan", "--model", "llama-tiny", "--cluster", "h100:2", "--plan", "dp=2"]) == 0
before = resident_bytes()
for _ in range(2):
    arrays = [np.ones(2**20) for _ in range(8)]
    arrays.clear()
print(resident_bytes() - before)
"""


def test_a_search_keeps_what_it_frees() -> None:
    """Each block of groups asked the system for the arrays anew that the block before had freed."""
    command = [sys.executable, "-c", _FREES_LARGE_ARRAYS]
    maps_each = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    ended = subprocess.run(command, capture_output=True, check=True, text=True, env=maps_each)
    assert int(ended.stdout.splitlines()[-1]) > 32 * 2**20
