"""A plan in words: every number in it is the plan's."""

from __future__ import annotations

import pytest
from tests.cost.machines import round_machine
from tests.cost.toy import toy_graph
from tests.planner.mixed.instances import machines

from shardstage.graph import ModelGraph
from shardstage.plan import complete, explain, parse_request
from shardstage.planner import MixedSearcher, predict
from shardstage.units import format_bytes

GRAPH = toy_graph(num_layers=4)


def text_of(
    text: str, graph: ModelGraph = GRAPH, *, ranks: int = 8, batch: int = 16, with_times: bool = False
) -> str:
    plan = complete(parse_request(text), graph, num_ranks=ranks, global_batch=batch, sequence=64)
    prediction = predict(graph, plan, round_machine(ranks)) if with_times else None
    return explain(plan, graph, prediction=prediction)


def section(text: str, title: str) -> list[str]:
    return next(part for part in text.split("\n\n") if part.startswith(title)).splitlines()


def test_the_mesh_is_drawn() -> None:
    assert section(text_of("tp=2,pp=2"), "mesh") == [
        "mesh     dp=2 × tp=2 × pp=2 on 8 ranks",
        "         pp=0   pp=1",
        "  dp=0   0 1    4 5",
        "  dp=1   2 3    6 7",
    ]


def test_a_mesh_of_thousands_is_not_drawn() -> None:
    lines = section(text_of("", ranks=512, batch=512), "mesh")
    assert lines == ["mesh     dp=512 × tp=1 × pp=1 on 512 ranks"]


def test_the_summary_says_batch_and_savers() -> None:
    lines = section(text_of("pp=2,zero=1,recompute=full,shares=5/3,dp=2,tp=2,sp,compile"), "model")
    assert lines == [
        "model    3072 parameters in 10 tensors, 21 ops, float32".replace("3072", "3.07 k"),
        "batch    16 samples of 64 tokens: 6 to 10 a data-parallel rank, in 5 microbatches of 2",
        "with     zero=1, recompute=full, 1f1b, sequence parallel, compiled",
    ]


def test_named_modules_stand_with_what_recomputes() -> None:
    lines = section(text_of("dp=8,mb=2,recompute=selective,modules=*.up/layers.1"), "model")
    assert lines[-1] == "with     zero=0, recompute=selective, modules=*.up/layers.1"


def test_stages_say_their_modules_and_shares() -> None:
    lines = section(text_of("pp=2,dp=4"), "stages")
    assert lines[2].startswith("  0   embed … layers.2") or lines[2].startswith("  0   embed … layers.1")
    assert lines[3].split()[-1] == "KiB"
    assert "the slowest stage has 1." in lines[-1]
    shares = [float(line.split(" %")[0].split()[-1]) for line in lines[2:4]]
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_what_each_stage_recomputes_stands_with_it() -> None:
    text = text_of("pp=2,dp=4,stages=full:1+selective/none")
    assert "recompute=by stage" in section(text, "model")[-1]
    heads, *rows = section(text, "stages")[1:4]
    assert "recompute" in heads
    assert "full:1+selective" in rows[0] and " none " in rows[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dp=8", ["dp", "all_reduce", "of", "gradients", "1"]),
        ("dp=8,zero=1", ["dp", "reduce_scatter", "of", "gradients", "1"]),
        ("dp=8,zero=2,mb=1", ["dp", "all_gather", "of", "parameters", "6"]),
        ("dp=8,zero=3,mb=1", ["dp", "all_gather", "of", "parameters", "24"]),
        ("tp=2,mb=2", ["tp", "all_reduce", "24"]),
        ("pp=2,mb=1", ["pp", "activations", "and", "their", "gradients", "8"]),
    ],
)
def test_talk_is_counted_by_axis(text: str, said: list[str]) -> None:
    lines = section(text_of(text), "talk a step")
    assert any(line.split()[: len(said)] == said for line in lines), lines


def test_one_rank_talks_to_nobody() -> None:
    assert "talk" not in text_of("", ranks=1)


def test_what_is_not_shared_is_listed_once_for_all_layers() -> None:
    lines = section(text_of("tp=2,replicate=layers.*"), "not shared over tp")
    assert [line.split()[0] for line in lines[2:]] == ["layers.*.up", "layers.*.down"]
    assert "replicate = 'layers.*'" in lines[2]
    assert "every op with weights or heavy work is shared over tp" in text_of("tp=2")


def test_times_are_told_when_they_are_known() -> None:
    assert "predicted (" not in text_of("pp=2")
    lines = section(text_of("pp=2", with_times=True), "step")
    assert "predicted (" in lines[0] and "tokens/s, MFU" in lines[1] and "bubble" in lines[2]


def test_an_offloaded_optimizer_shows_in_memory_and_on_the_way_to_the_host() -> None:
    plain, off = (text_of(f"dp=8,zero=1{more}") for more in ("", ",offload=optimizer"))
    assert "offload=optimizer" in section(off, "model")[-1]
    heads = section(off, "memory")[1].split()
    assert heads[-1] == "host" and "optimizer" not in heads and "optimizer" in section(plain, "memory")[1]
    rows = {line.split()[0]: line for line in section(off, "talk")[2:]}
    owned = f"{3072 * 4 // 8 / 1024:.2f} KiB"
    assert rows["host"].endswith(owned)


def test_gradients_of_half_the_width_take_half_the_bytes_on_their_way() -> None:
    wide, narrow = (
        next(line for line in section(text_of(f"dp=8{more}"), "talk") if "all_reduce" in line).split()
        for more in (",dtype=bf16", ",dtype=bf16,grads=bf16")
    )
    assert float(wide[-2]) == 2 * float(narrow[-2])


@pytest.mark.parametrize("text", ["dp=8", "dp=4,cp=2", "dp=8,compile", "pp=2,tp=2,dp=2,sp,compile"])
def test_memory_is_what_the_plan_was_priced_at(text: str) -> None:
    """Explained were sequences that nobody shares and kernels that nobody compiles: 95.8 GiB of a plan that needs 65.3."""
    plan = complete(parse_request(text), GRAPH, num_ranks=8, global_batch=16, sequence=64)
    prediction = predict(GRAPH, plan, round_machine(8))
    told = explain(plan, GRAPH, prediction=prediction)
    for number, line in enumerate(section(told, "stages")[2 : 2 + plan.mesh.pp]):
        assert line.endswith(format_bytes(prediction.stages[number].memory.total_bytes))
    heads, *rows = section(told, "memory a rank")[1:]
    for row, use in zip(rows, prediction.ranks, strict=True):
        assert row.split()[1:] == " ".join(format_bytes(getattr(use, name)) for name in heads.split()).split()
    alone = section(explain(plan, GRAPH), "memory a rank")
    assert alone == section(told, "memory a rank"), "the graph alone says as much"


def test_ranks_that_share_sequences_are_in_the_picture() -> None:
    """Half of the ranks were missing, and the mesh was of fewer than it said."""
    text = text_of("dp=2,cp=2", ranks=4)
    assert section(text, "mesh") == [
        "mesh     dp=2 × tp=1 × pp=1 × cp=2 on 4 ranks",
        "              pp=0",
        "  dp=0 cp=0   0",
        "  dp=0 cp=1   1",
        "  dp=1 cp=0   2",
        "  dp=1 cp=1   3",
    ]
    assert "and what is sent along cp, which is priced and not counted here" in text


@pytest.mark.parametrize("text", ["dp=8", "tp=2", "", "pp=2"])
def test_a_section_with_nothing_to_say_leaves_no_gap(text: str) -> None:
    assert "\n\n\n" not in text_of(text, with_times=True)


def test_stages_on_unlike_devices_are_balanced_by_their_time() -> None:
    """Of a plan that gives a device of twice the speed twice the layers it was said that one stage is the slowest by far."""
    cluster = machines((1, 1.0), (1, 2.0))
    graph = toy_graph(num_layers=10)
    plan = MixedSearcher(
        graph,
        cluster,
        global_batch=16,
        sequence=64,
        precision="float32",
        fix=parse_request("pp=2"),
        fixed=frozenset({"pp"}),
    ).best((2**40, 2**40))
    told = section(explain(plan.best, graph, prediction=plan.prediction), "stages")
    assert float(told[-1].split(" has ")[1].split()[0]) < 1.15
    alone = section(explain(plan.best, graph), "stages")
    assert float(alone[-1].split(" has ")[1].split()[0]) > 1.2
