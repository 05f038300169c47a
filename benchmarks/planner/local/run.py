"""The planner's pick against all measured plans, on four ranks of this machine and networks of three speeds.

python benchmarks/planner/local/run.py [--models llama,gpt,vit] [--networks 1,5,20] [--rounds 2] [--finals 4] [--out FOLDER]

Needs root: every rank sits in a network namespace of its own, whose link is shaped. For each network a probe makes the cluster, as
`shardstage probe --ranks 4` does; for each model on it the planner picks a plan, and the pick, the runners-up and a grid of all kinds
of plans are built once and take turns, step by step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from models import MODELS, Workload, captured, write_config
from network import BACKEND, hosts, register_network_backend, require_network_tools
from plans import NUM_RANKS, Candidate, candidates
from ranks import Job, measure
from table import Outcome, plan_table, summary_table

from shardstage.cluster import Cluster, save
from shardstage.cluster.probe import probe
from shardstage.graph import ModelGraph
from shardstage.runtime.launch import launch

PROBE_S = 45.0
SESSION_S = 300.0
"""Of a model on a network: engines are built in 20 to 40 s, and 30 plans take turns for the rest."""


def main() -> None:
    options = _options()
    require_network_tools()
    models = [MODELS[name] for name in options.models.split(",")]
    networks = [float(rate) for rate in options.networks.split(",")]
    _print_budget(len(models), len(networks))
    out = options.out or Path(tempfile.mkdtemp(prefix="shardstage-local-"))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        graphs = _graphs(models, folder)
        outcomes = []
        for rate in networks:
            with hosts(NUM_RANKS, rate):
                cluster = _probed(rate, out)
                for model in models:
                    spec, graph = graphs[model.name]
                    outcomes.append(_outcome(model, spec, graph, cluster, rate, out, options))
    print(f"{summary_table(outcomes)}\n\nevery step that was timed: {out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="llama,gpt,vit", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--networks", default="1,5,20", help="Gbit/s of each host's link")
    parser.add_argument("--rounds", type=int, default=2, help="turns of every plan, of two timed steps")
    parser.add_argument("--finals", type=int, default=4, help="further turns of those near the best")
    parser.add_argument("--only-plans", type=int, help="measure at most so many plans, the pick among them")
    parser.add_argument(
        "--out", type=Path, help="folder for clusters and every step that was timed (a new one)"
    )
    return parser.parse_args()


def _print_budget(num_models: int, num_networks: int) -> None:
    seconds = num_networks * (PROBE_S + num_models * SESSION_S)
    print(
        f"{num_networks} probes of {PROBE_S:.0f} s and {num_networks * num_models} sessions of about {SESSION_S:.0f} s: "
        f"at most {seconds / 60:.0f} minutes\n"
        f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}\n",
        flush=True,
    )


def _graphs(models: list[Workload], folder: Path) -> dict[str, tuple[str, ModelGraph]]:
    specs = {model.name: write_config(model, folder) for model in models}
    return {model.name: (specs[model.name], captured(model, specs[model.name])) for model in models}


def _probed(rate: float, out: Path) -> Cluster:
    """The cluster as a user gets it."""
    began_s = time.perf_counter()
    cluster = probe(
        NUM_RANKS, budget_s=PROBE_S, device="cpu", backend=BACKEND, prepare=register_network_backend
    )
    save(cluster, out / f"cluster-{rate:g}.toml")
    print(f"{rate:g} Gbit/s: probed in {time.perf_counter() - began_s:.0f} s", flush=True)
    return cluster


def _outcome(
    model: Workload,
    spec: str,
    graph: ModelGraph,
    cluster: Cluster,
    rate: float,
    out: Path,
    options: argparse.Namespace,
) -> Outcome:
    """Searches, measures, and prints the plans of one model on one network."""
    began_s = time.perf_counter()
    plans = candidates(
        graph,
        cluster,
        global_batch=model.global_batch,
        sequence=model.sequence,
        only=options.only_plans,
    )
    searched_s, load = time.perf_counter() - began_s, os.getloadavg()[0]
    print(f"{model.name}, {rate:g} Gbit/s: {len(plans)} plans in {searched_s:.0f} s, load average {load:.1f}")
    rows = out / f"{model.name}-{rate:g}.jsonl"
    rows.write_text("".join(f"{line}\n" for line in _described(plans)))
    job = Job(
        graph=graph,
        model=spec,
        plans=tuple(candidate.plan for candidate in plans),
        pick=next(index for index, candidate in enumerate(plans) if candidate.is_pick),
        sequence=model.sequence,
        num_rounds=options.rounds,
        num_finals=options.finals,
        limit_s=SESSION_S,
        out=str(rows),
    )
    launch(
        measure, (job,), num_ranks=NUM_RANKS, log_dir=out / f"logs-{model.name}-{rate:g}", threads_per_rank=1
    )
    outcome = Outcome.of(model.name, rate, plans, rows)
    print(f"{plan_table(outcome)}\n{time.perf_counter() - began_s:.0f} s\n", flush=True)
    return outcome


def _described(plans: list[Candidate]) -> Iterator[str]:
    for index, candidate in enumerate(plans):
        yield json.dumps({"plan": index, "text": candidate.text, "predicted_s": candidate.predicted_s})


if __name__ == "__main__":
    main()
