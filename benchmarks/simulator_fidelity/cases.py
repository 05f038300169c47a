"""What is run: one model cut in several ways, under every schedule that fits."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from shardstage.graph import ModelGraph
from shardstage.graph.blocks import find_blocks
from shardstage.graph.capture import capture
from shardstage.graph.source import load_model
from shardstage.plan import check, complete, parse_request
from shardstage.plan.complete import ranges
from shardstage.plan.plan import Plan
from shardstage.schedule import Action, Schedule, make_schedule

__all__ = ["Case", "cases_of", "make_graph", "model_file"]

NUM_LAYERS = 6
MICROBATCH = 2
NUM_MICROBATCHES = 8
MAX_STAGES = 4

ONE_STAGE = ("1f1b", "gpipe", "zb-h1")
SEVERAL_STAGES = ("interleaved-1f1b", "looped-bfs", "zb-v", "dualpipe-v")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A plan; ``reference`` names the stages, the first case of each is the one that prices are measured in."""

    name: str
    reference: str
    plan: Plan


def model_file(folder: Path) -> Path:
    """The configuration of a small Llama, for ``load_model``."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 2048,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def make_graph(model: Path, sequence: int) -> ModelGraph:
    return capture(load_model(str(model)), sequence=sequence)


def cases_of(graph: ModelGraph, *, num_ranks: int, sequence: int) -> list[Case]:
    """Every schedule of at most four stages, even and uneven: one on each rank, or two."""
    found: list[Case] = []
    for per_rank, schedules in ((1, ONE_STAGE), (2, SEVERAL_STAGES)):
        num_stages = per_rank * num_ranks
        for shape, layers in (("even", None), ("uneven", uneven_layers(num_stages))):
            if num_stages > MAX_STAGES:
                continue
            stages = f"{num_stages} {shape} stages on {num_ranks} ranks"
            base = make_plan(graph, num_ranks, per_rank, schedules[0], sequence, layers)
            found.append(Case(name=f"{stages}: half split", reference=stages, plan=half_split(base)))
            for schedule in schedules:
                plan = make_plan(graph, num_ranks, per_rank, schedule, sequence, layers)
                found.append(Case(name=f"{stages}: {schedule}", reference=stages, plan=plan))
    return found


def uneven_layers(num_stages: int) -> tuple[int, ...]:
    """Blocks of each stage (embedding and head are blocks too): the first has many, the others few."""
    rest = (NUM_LAYERS + 2) // (num_stages + 1)
    sizes = [max(1, rest)] * num_stages
    sizes[num_stages // 2] += NUM_LAYERS + 2 - sum(sizes)
    return tuple(sizes)


def make_plan(
    graph: ModelGraph,
    num_ranks: int,
    per_rank: int,
    schedule: str,
    sequence: int,
    blocks: tuple[int, ...] | None,
) -> Plan:
    several = f",v={per_rank}" if per_rank > 1 else ""
    plan = complete(
        parse_request(f"pp={num_ranks}{several},schedule={schedule},mb={MICROBATCH}"),
        graph,
        num_ranks=num_ranks,
        global_batch=MICROBATCH * NUM_MICROBATCHES,
        sequence=sequence,
    )
    if blocks is not None:
        starts = [block.start for block in find_blocks(graph)]
        firsts = [sum(blocks[:stage]) for stage in range(len(blocks))]
        plan = replace(plan, stages=ranges(graph, [starts[first] for first in firsts]))
    check(plan, graph, num_ranks=num_ranks)
    return plan


def half_split(plan: Plan) -> Plan:
    """The same stages under a 1F1B order in which the backwards of odd microbatches are cut in two, so that F, B, I and W are measured."""
    schedule: Schedule = make_schedule(
        plan.schedule,
        num_stages=len(plan.stages),
        num_ranks=plan.mesh.pp,
        num_microbatches=plan.num_microbatches,
    )
    rows = []
    for row in schedule.actions:
        acts: list[Action] = []
        for action in row:
            if action.kind == "B" and action.microbatch % 2:
                acts += [action._replace(kind="I"), action._replace(kind="W")]
            else:
                acts.append(action)
        rows.append(" ".join(map(str, acts)))
    return replace(plan, schedule="custom", actions=tuple(rows))
