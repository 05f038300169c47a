"""``shardstage rehearse``: the program of all ranks proved, timed and tried out, without a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from shardstage.cli import options
from shardstage.cli.choosing import (
    Question,
    asked_samples,
    capture_model,
    choose_plan,
    headline,
    load_source,
    precision_of,
)
from shardstage.cli.outputs import require_endings, write_text
from shardstage.cli.waiting import capturing, waiting
from shardstage.cli.wrapping import say
from shardstage.errors import ConfigError
from shardstage.plan import Plan, check, load_plan, parse_request, shorthand
from shardstage.units import format_bytes, format_ratio, format_s

if TYPE_CHECKING:  # what imports torch is imported when it is needed: help comes at once
    from shardstage.cluster import Cluster
    from shardstage.cost import Prediction
    from shardstage.graph import ModelGraph
    from shardstage.program import Program
    from shardstage.rehearsal import RankRehearsal, Rehearsal, Which
    from shardstage.report import About
    from shardstage.simulator import Change, PlannedPrices

__all__ = ["rehearse"]

LONGEST_SEQUENCE = 8192
"""Of samples where none is asked for: what large models are trained with, though some read more."""

MICROBATCHES_PER_STAGE = 4
"""Of a batch where none is asked for: enough that the pipeline's bubble does not hide everything else."""

DEFAULT_SEQUENCE = 256

ENDINGS = {".html": "the page", ".json": "the trace", ".txt": "the program"}


Tokens = Annotated[
    int | None,
    options.count(
        "Tokens of a sample (default: a plan file's, else as many as the model reads, at most 8192)"
    ),
]


def rehearse(
    model: options.Model = "llama-tiny",
    cluster: options.ClusterName = "local",
    plan: options.Plan = "auto",
    batch: Annotated[
        int | None,
        options.count("Samples of a step (default: a plan file's, else 4 microbatches a pipeline stage)"),
    ] = None,
    seq: Tokens = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float64 (default: bfloat16 on a GPU that has it)")
    ] = None,
    ranks: Annotated[
        str, typer.Option(help="Ranks to execute: distinct (one of each kind), all or none")
    ] = "distinct",
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            help='What another machine would do: "bandwidth=0.5", "slow=3:1.5", "nodes=+2", "microbatch=2"'
        ),
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Also draw the step here")] = False,
    out: Annotated[
        list[Path] | None,
        typer.Option(
            "--out",
            "-o",
            help="Files to write: .html the page, .json a trace for ui.perfetto.dev, .txt the program",
        ),
    ] = None,
    program: Annotated[
        Path | None, typer.Option(help="Only prove the program in this file, such as one that --out wrote")
    ] = None,
) -> int:
    """Prove, time and try out the program of all ranks, on a machine that has none of them.

    The plan is lowered to the ordered acts of every rank. Proved on paper: every send meets its receive, all ranks of a group run the same
    collectives in the same order, every gradient and sample counts once, nothing waits for ever. A step is simulated. Then the engine's own
    code executes one rank of each kind on tensors without memory, and what it does is held against the program.

    Exit code 0: it runs and fits. 1: it does not fit, or the engine differs from the program. 2: bad input, or a program that is not right.

    [bold]Examples[/]

      shardstage rehearse --model config.json --cluster h100:512 --plan "tp=8"

      shardstage rehearse --plan "pp=4" --cluster h100:4 --what-if "slow=3:1.5"

      shardstage rehearse --program edited.txt
    """
    require_endings(out or (), ENDINGS)
    if program is not None:
        return _prove(program)
    from shardstage.simulator import parse_change

    changes = [parse_change(change) for change in what_if or []]
    findings = _findings(model, cluster, plan, batch, seq, dtype, _which(ranks))
    return findings.show(changes, is_drawn=text, out=out or [])


def _findings(
    model: str, cluster: str, plan: str, batch: int | None, seq: int | None, dtype: str | None, which: Which
) -> _Findings:
    """Completes the plan, says what it is, and rehearses it."""
    from shardstage.cli.machine import cluster_named, num_default_ranks
    from shardstage.rehearsal import rehearse as try_out
    from shardstage.runtime.environment import num_usable_cores

    asked = _asked_of(plan)
    batch, seq = asked_samples(plan, batch=batch, sequence=seq)
    console = Console(highlight=False, emoji=False)
    with console.status("looking at the cluster"):
        machine = cluster_named(cluster, ranks=asked.num_ranks or num_default_ranks())
    num_ranks = asked.num_ranks or machine.num_devices
    precision = precision_of(plan, dtype, machine)
    with console.status(f"reading {model}"):
        source = load_source(model)
    sequence = seq or min(source.max_sequence or DEFAULT_SEQUENCE, LONGEST_SEQUENCE)
    with capturing(console, model, sequence=sequence):
        graph = capture_model(source, sequence, precision)
    with console.status("choosing a plan" if plan == "auto" else "completing the plan"):
        question = Question(
            plan=plan,
            num_ranks=num_ranks,
            batch=batch or asked.batch(num_ranks),
            sequence=sequence,
            precision=precision,
        )
        picked = choose_plan(question, graph, machine)
        chosen, prediction = picked.plan, picked.prediction
        notes = check(chosen, graph, num_ranks=num_ranks, cluster=machine, max_sequence=source.max_sequence)
    console.print(headline(model, graph, machine, num_ranks))
    console.print("\n".join(_planned(chosen)), soft_wrap=True)
    for note in notes:
        say(console, f"[yellow]note[/]  {escape(note)}")
    why = "the steps of distinct ranks run op by op on tensors without data: minutes for hundreds of layers or of ranks under ZeRO-3"
    with waiting(console, f"rehearsing {shorthand(chosen)}", why) as status:
        found = try_out(
            graph,
            chosen,
            source,
            machine,
            which=which,
            reload=partial(load_source, model),
            num_processes=num_usable_cores(),
            progress=status.update,
        )
    return _Findings(
        console=console, model=model, graph=graph, machine=machine, prediction=prediction, found=found
    )


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What a plan's text says before there is a graph; 0 for what it leaves open."""

    num_ranks: int = 0
    model_ranks: int = 1
    num_stages: int = 1
    microbatch: int = 1

    def batch(self, num_ranks: int) -> int:
        """Enough microbatches for the pipeline."""
        microbatches = MICROBATCHES_PER_STAGE * self.num_stages
        return microbatches * self.microbatch * max(1, num_ranks // self.model_ranks)


def _asked_of(text: str) -> _Asked:
    if text == "auto":
        return _Asked()
    if text.endswith(".toml"):
        return _Asked(num_ranks=load_plan(text).mesh.world_size)
    request = parse_request(text)
    return _Asked(
        num_ranks=(request.dp or 0) * request.tp * request.pp,
        model_ranks=request.tp * request.pp,
        num_stages=request.pp,
        microbatch=request.microbatch or 1,
    )


def _which(text: str) -> Which:
    for which in ("distinct", "all", "none"):
        if text == which:
            return which
    raise ConfigError(f"--ranks {text}: it is distinct, all or none", hint="--ranks distinct")


def _planned(plan: Plan) -> Iterator[str]:
    yield f"[bold]{'plan':<11}[/]{shorthand(plan)}"
    samples = f"{plan.global_batch:,} samples" + (f" of {plan.sequence:,} tokens" if plan.sequence else "")
    yield f"{'batch':<11}{samples}, {plan.num_microbatches:,} microbatches of {plan.microbatch} a data-parallel rank"


def _prove(path: Path) -> int:
    """The proof of a program that somebody wrote, or edited."""
    from shardstage.program import parse_program, verify
    from shardstage.rehearsal.counts import counts_of
    from shardstage.rehearsal.text import counts_text

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"{path} cannot be read: {reason}", hint="--program program.txt") from error
    program = parse_program(text)
    verify(program)
    typer.echo(counts_text(counts_of(program)))
    return 0


@dataclass(frozen=True, kw_only=True)
class _Findings:
    """A rehearsal on its way to the screen and to files."""

    console: Console
    model: str
    graph: ModelGraph
    machine: Cluster
    prediction: Prediction
    found: Rehearsal

    @property
    def _mfu(self) -> float:
        """Of the simulated step."""
        return self.prediction.mfu * self.prediction.step_time_s / self.found.timeline.step_time_s

    @property
    def _calibrated_s(self) -> tuple[float, float] | None:
        """Low and high of the simulated step, as far from it as the plan's are from its formula."""
        if self.machine.calibration_of(0) is None:
            return None
        formula = self.prediction
        ratio = self.found.timeline.step_time_s / formula.step_time_s
        return ratio * formula.step_time_low_s, ratio * formula.step_time_high_s

    def show(self, changes: list[Change], *, is_drawn: bool, out: list[Path]) -> int:
        """Prints and writes it; returns the exit code."""
        from shardstage.rehearsal.text import rehearsal_text

        found = self.found
        for path in out:  # first: whoever reads what is printed may leave
            self._write(path)
        self._print(
            rehearsal_text(found, mfu=self._mfu, limit_of=self._limit_of, calibrated_s=self._calibrated_s)
        )
        tightest = max(found.ranks, key=lambda rank: rank.peak_bytes - self._limit_of(rank))
        is_fitting = tightest.peak_bytes <= self._limit_of(tightest)
        if not is_fitting:
            self._print_misfit(tightest)
        for line in self._changed(changes):
            self._print(line)
        if is_drawn:
            from shardstage.report import report_text

            self._print("\n" + report_text(self._about(), [found.timeline]).rstrip())
        for path in out:
            self._print(f"written to {path}: {ENDINGS[path.suffix]}")
        return 0 if is_fitting and not found.differences else 1

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def _part_of(self, rank: RankRehearsal) -> Cluster:
        """The part of the machine with the smallest devices that such a rank runs on."""
        numbers = {self.machine.part_of(alike) for alike in rank.alike} if self.machine.is_mixed else {0}
        return min(map(self.machine.part, numbers), key=lambda part: part.device.memory_bytes)

    def _limit_of(self, rank: RankRehearsal) -> int:
        from shardstage.planner import usable_bytes

        return usable_bytes(self._part_of(rank))

    def _print_misfit(self, rank: RankRehearsal) -> None:
        from shardstage.planner import cheapest_fit, cheapest_mixed_fit

        device, limit = self._part_of(rank).device, self._limit_of(rank)
        self.console.print(
            f"\n[bold red]does not fit[/]  rank {rank.rank}{_and_others(len(rank.alike))} would hold {format_bytes(rank.peak_bytes)} at "
            f"{rank.act}; of a {device.name}'s {format_bytes(device.memory_bytes)} a step can use {format_bytes(limit)}",
            soft_wrap=True,
        )
        with self.console.status("looking for a plan that fits"):
            if self.machine.is_mixed:
                fit = cheapest_mixed_fit(self.graph, self.machine, self.found.plan)
            else:
                fit = cheapest_fit(self.graph, self.machine, self.found.plan, limit_bytes=limit)
        if fit is None:
            self._print(
                "no plan for so many ranks fits; a larger --cluster, or a smaller --batch or --seq, may"
            )
            return
        slower = fit.prediction.step_time_s / self.prediction.step_time_s - 1
        self._print(
            f"cheapest change that fits: {', '.join(fit.changes)}\n"
            f"  {format_bytes(fit.peak_bytes)} a rank, {format_s(fit.prediction.step_time_s)} a step, {_compared(slower)}\n"
            f"  {fit.asked}"
        )

    def _changed(self, changes: list[Change]) -> Iterator[str]:
        if changes:
            yield ""
        for change in changes:
            from shardstage.simulator import what_if

            program, prices = self._priced(self.found.plan, self.machine)
            answer = what_if(program, prices, change, lower=self._lower)
            yield (
                f"what if {change}: {format_s(answer.before_s)} → {format_s(answer.after_s)} a step, "
                f"{answer.speed_up:.3f} × the samples/s"
            )

    def _priced(self, plan: Plan, machine: Cluster) -> tuple[Program, PlannedPrices]:
        from shardstage.program import StageGraphs, lower
        from shardstage.simulator import planned_prices

        stages = StageGraphs(self.graph, plan)
        program = self.found.program if plan == self.found.plan else lower(self.graph, plan, stages)
        return program, planned_prices(self.graph, plan, machine, stages=stages)

    def _lower(self, change: Change) -> tuple[Program, PlannedPrices]:
        """The plan after a change, on as many devices as it takes."""
        from shardstage.simulator import changed_plan

        per_node = self.machine.devices_per(self.machine.levels[0])
        plan = changed_plan(self.found.plan, change, devices_per_node=per_node)
        machine = self.machine.with_devices(max(plan.mesh.world_size, self.machine.num_devices))
        check(plan, self.graph, num_ranks=plan.mesh.world_size, cluster=machine)
        return self._priced(plan, machine)

    def _about(self) -> About:
        from shardstage.report import About, RankNote

        plan, program = self.found.plan, self.found.program
        return About(
            title=f"{self.model} on {plan.mesh.world_size} × {self.machine.device.name}, rehearsed",
            facts=(
                ("plan", shorthand(plan)),
                (
                    "batch",
                    f"{plan.global_batch} samples, {plan.num_microbatches} microbatches a data-parallel rank",
                ),
                ("MFU", format_ratio(self._mfu)),
            ),
            tokens=None if plan.sequence is None else plan.global_batch * plan.sequence,
            ranks=tuple(
                RankNote(
                    pp=pp,
                    stages="; ".join(
                        f"{stage}: {plan.stages[stage].first} … {plan.stages[stage].last}"
                        for stage in program.stages_of(pp)
                    ),
                )
                for pp in range(plan.mesh.pp)
            ),
        )

    def _write(self, path: Path) -> None:
        from shardstage.program import format_program
        from shardstage.report import report_page
        from shardstage.timeline.trace import timeline_to_trace

        if path.suffix == ".html":
            text = report_page(self._about(), [self.found.timeline])
        elif path.suffix == ".json":
            text = timeline_to_trace(self.found.timeline)
        else:
            text = format_program(self.found.program)
        write_text(path, text)


def _and_others(num_alike: int) -> str:
    return "" if num_alike == 1 else f" (and {num_alike - 1} like it)"


def _compared(slower: float) -> str:
    """How a plan that fits stands to the one that does not."""
    if slower > 0.005:
        return f"{format_ratio(slower)} slower than this plan would be"
    return "as fast as this plan would be" if slower > -0.005 else f"{format_ratio(-slower)} faster"
