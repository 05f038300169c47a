"""Bubbles of the schedules against their published formulas, and what a search adds to them.

python benchmarks/schedules/run.py formulas    every schedule, p in 4...64, m in p...8p: run, and held against the formula
python benchmarks/schedules/run.py search      the best named schedule, the one that a search finds and the bound, on unlike stages
python benchmarks/schedules/run.py random      the same on random stages, with and without a memory limit
python benchmarks/schedules/run.py speed       seconds to make and to run 64 stages x 512 microbatches

Prints Markdown. Seconds in the tables are those of the schedule, in units of a stage's forward; nothing is measured but in ``speed``.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fused import fused_bubble_s

from shardstage.schedule import (
    SCHEDULES,
    Schedule,
    StageBytes,
    StageTimes,
    make_schedule,
    run_schedule,
)
from shardstage.schedule.search import optimal

RANKS = (4, 5, 7, 8, 12, 16, 24, 32, 48, 64)
TIMES = ((1.0, 1.0, 1.0), (2.0, 2.0, 1.0), (3.0, 4.0, 2.0), (1.0, 2.0, 1.0))
"""Seconds of F, I and W."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A formula: p, F, I, W -> seconds of bubble; ``holds`` for these times, ``fits`` p and m, and is of what ``measure`` finds."""

    schedule: str
    formula: str
    source: str
    bubble_s: Callable[[int, float, float, float], float]
    stages_per_rank: int = 1
    condition: str = ""
    holds: Callable[[float, float, float], bool] = lambda f, i, w: True
    fits: Callable[[int, int], bool] = lambda p, m: True
    measure: Callable[[Schedule, float, float, float], float] | None = None


def step_bubble_s(schedule: Schedule, f: float, i: float, w: float) -> float:
    """End of the last action less the seconds that a rank computes."""
    run = run_schedule(schedule, [StageTimes(forward_s=f, input_s=i, weight_s=w)] * schedule.num_stages)
    if schedule.name == "forward-only":
        return run.makespan_s - schedule.num_microbatches * schedule.num_stages / schedule.num_ranks * f
    return run.makespan_s - max(run.busy_s)


def rank_bubble_s(schedule: Schedule, f: float, i: float, w: float) -> float:
    """Most that a rank idles between its first action and its last."""
    times = StageTimes(forward_s=f, input_s=i, weight_s=w)
    return max(run_schedule(schedule, [times] * schedule.num_stages).bubbles_s)


def is_equal(f: float, i: float, w: float) -> bool:
    return f == i == w


def is_w_least(f: float, i: float, w: float) -> bool:
    return w <= min(f, i)


CLAIMS = (
    Claim(
        schedule="gpipe",
        formula="(p - 1)(F + B)",
        source="Huang et al. 2019: (p - 1) / (m + p - 1) of the step",
        bubble_s=lambda p, f, i, w: (p - 1) * (f + i + w),
    ),
    Claim(
        schedule="1f1b",
        formula="(p - 1)(F + B)",
        source="Narayanan et al. 2021, section 2.2.1",
        bubble_s=lambda p, f, i, w: (p - 1) * (f + i + w),
    ),
    *(
        Claim(
            schedule="interleaved-1f1b",
            formula=f"(p - 1)(F + B), v = {v}",
            source="Narayanan et al. 2021, section 2.2.2: 1/v of a rank's time",
            stages_per_rank=v,
            condition="p divides m",
            fits=lambda p, m: m % p == 0,
            bubble_s=lambda p, f, i, w: (p - 1) * (f + i + w),
        )
        for v in (2, 4)
    ),
    *(
        Claim(
            schedule="interleaved-1f1b",
            formula=f"(p - 1)(F + B), v = {v}",
            source="ours: rounds as even as they can be",
            stages_per_rank=v,
            condition="p does not divide m",
            fits=lambda p, m: m % p > 0,
            bubble_s=lambda p, f, i, w: (p - 1) * (f + i + w),
        )
        for v in (2, 4)
    ),
    *(
        Claim(
            schedule="looped-bfs",
            formula=f"(p - 1)(F + B), v = {v}",
            source="Lamy-Poirier 2022: (p - 1) / (m v) of the compute",
            stages_per_rank=v,
            bubble_s=lambda p, f, i, w: (p - 1) * (f + i + w),
        )
        for v in (2, 4)
    ),
    Claim(
        schedule="zb-h1",
        formula="(p - 1)(F + I - W)",
        source="Qi et al. 2023, table 2; DualPipe README: (PP - 1)(F + B - 2W)",
        condition="W <= F, I",
        holds=is_w_least,
        bubble_s=lambda p, f, i, w: (p - 1) * (f + i - w),
    ),
    Claim(
        schedule="zb-v",
        formula="0 within a rank",
        source="Qi et al. 2023, section 6",
        stages_per_rank=2,
        condition="F = I = W, m >= 2p - 1",
        holds=is_equal,
        fits=lambda p, m: m >= 2 * p - 1,
        bubble_s=lambda p, f, i, w: 0.0,
        measure=rank_bubble_s,
    ),
    Claim(
        schedule="zb-v",
        formula="(p - 1) max(F, 2(I - W))",
        source="ours: the start, or what W does not fill",
        stages_per_rank=2,
        condition="W <= F <= I, m >= 2p",
        holds=is_w_least,
        fits=lambda p, m: m >= 2 * p,
        bubble_s=lambda p, f, i, w: (p - 1) * max(f, 2 * (i - w)),
    ),
    Claim(
        schedule="zb-v",
        formula="(p - 1)(I + max(F, I))",
        source="ours: too few W",
        stages_per_rank=2,
        condition="W <= F <= I, m = p",
        holds=is_w_least,
        fits=lambda p, m: m == p,
        bubble_s=lambda p, f, i, w: (p - 1) * (i + max(f, i)),
    ),
    Claim(
        schedule="dualpipe-v",
        formula="(p - 1)(I + W + max(F, I))",
        source="ours: too few W",
        stages_per_rank=2,
        condition="W <= F <= I, m = p",
        holds=is_w_least,
        fits=lambda p, m: m == p,
        bubble_s=lambda p, f, i, w: (p - 1) * (i + w + max(f, i)),
    ),
    Claim(
        schedule="dualpipe-v",
        formula="(p - 1)(F&B + B - 3W)",
        source="DualPipe README, PP = 2p stages, which the V folds onto p ranks",
        stages_per_rank=2,
        condition="F = I, W <= F, m >= 2p, F&B one action of F + B",
        holds=lambda f, i, w: f == i and w <= f,
        fits=lambda p, m: m >= 2 * p,
        bubble_s=lambda p, f, i, w: (p - 1) * (f + 2 * (i + w) - 3 * w),
        measure=fused_bubble_s,
    ),
    Claim(
        schedule="dualpipe-v",
        formula="(p - 1)(F + I - W)",
        source="ours: F and B one behind the other",
        stages_per_rank=2,
        condition="F = I, W <= F, m >= 2p",
        holds=lambda f, i, w: f == i and w <= f,
        fits=lambda p, m: m >= 2 * p,
        bubble_s=lambda p, f, i, w: (p - 1) * (f + i - w),
    ),
    Claim(
        schedule="forward-only",
        formula="(p - 1)F",
        source="the first microbatch's way to the last rank",
        bubble_s=lambda p, f, i, w: (p - 1) * f,
    ),
)


def microbatches(p: int) -> Iterator[int]:
    """p to 8p: every multiple, and between them some that p does not divide."""
    yield from (k * p for k in range(1, 9))
    yield from (p + 1, 2 * p - 1, 3 * p + p // 2, 8 * p - 1)


def formulas() -> None:
    """Every claim at every size and time that it is made for."""
    print("| schedule | formula | source | where | cases | largest difference |\n|---|---|---|---|---|---|")
    for claim in CLAIMS:
        measure = claim.measure or step_bubble_s
        cases = differ = 0
        worst = 0.0
        for p in RANKS:
            for m in (m for m in microbatches(p) if claim.fits(p, m)):
                made = make_schedule(
                    claim.schedule, num_stages=p * claim.stages_per_rank, num_ranks=p, num_microbatches=m
                )
                for times in (t for t in TIMES if claim.holds(*t)):
                    difference = abs(measure(made, *times) - claim.bubble_s(p, *times))
                    cases, differ = cases + 1, differ + (difference > 0)
                    worst = max(worst, difference)
        print(
            f"| {claim.schedule} | {claim.formula} | {claim.source} | {claim.condition or 'all'} | {cases} | {worst:g} |",
            flush=True,
        )
    print()
    ratios()


def ratios() -> None:
    """Bubble over the step's time, F = I = W = 1, where a rank's layers are the same for every schedule."""
    names = [name for name in SCHEDULES if name != "forward-only"]
    print(f"| p | m | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    for p in (4, 8, 16, 32, 64):
        for m in (p, 2 * p, 4 * p, 8 * p):
            cells = []
            for name in names:
                per_rank = 2 if SCHEDULES[name].takes(2) else 1
                made = make_schedule(name, num_stages=p * per_rank, num_ranks=p, num_microbatches=m)
                bubble = step_bubble_s(made, 1.0, 1.0, 1.0)
                cells.append(f"{bubble / (bubble + 3 * m * per_rank):.1%}")
            print(f"| {p} | {m} | {' | '.join(cells)} |", flush=True)


def stages(seconds: Sequence[float], *, receive_s: float = 0.0, input_ratio: float = 1.0) -> list[StageTimes]:
    return [
        StageTimes(forward_s=s, input_s=input_ratio * s, weight_s=s, receive_s=receive_s) for s in seconds
    ]


CASES = (
    ("4 equal stages", 8, 4, stages([1.0] * 4), None),
    ("transfers of F / 2", 8, 4, stages([1.0] * 4, receive_s=0.5), None),
    ("transfers of F / 2, p microbatches held", 8, 4, stages([1.0] * 4, receive_s=0.5), 4),
    ("I = 2F (attention)", 8, 4, stages([1.0] * 4, input_ratio=2.0), None),
    ("stage 0 slower by half", 8, 4, stages([1.5, 1, 1, 1], receive_s=0.1), None),
    ("stage 1 slower by half", 8, 4, stages([1, 1.5, 1, 1], receive_s=0.1), None),
    ("stage 3 slower by half", 8, 4, stages([1, 1, 1, 1.5], receive_s=0.1), None),
    ("1, 2, 1, 2 and transfers", 16, 4, stages([1, 2, 1, 2], receive_s=0.25), None),
    ("2 stages, 1 and 1.4", 8, 2, stages([1, 1.4], receive_s=0.1), None),
    ("8 uneven stages on 4 ranks", 8, 4, stages([1, 1.5, 1.3, 2, 1, 1, 1, 2.5], receive_s=0.1), None),
    ("8 stages", 32, 8, stages([1.2, 1, 1, 1.1, 1, 0.9, 1, 1.3], receive_s=0.2), None),
    ("16 stages", 64, 16, stages([1 + 0.05 * (s % 5) for s in range(16)], receive_s=0.2), None),
)


def search() -> None:
    """What ``optimal`` finds in ten seconds a case."""
    print("| stages | p | m | 1F1B | best named | | found | bound | proved | gain |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for title, m, p, times, held in CASES:
        memory = [StageBytes(held_bytes=1)] * len(times) if held else []
        found = optimal(
            times, m, num_ranks=p, memory=memory, memory_limit_bytes=held or None, max_seconds=10.0
        )
        plain = "interleaved-1f1b" if len(times) > p else "1f1b"
        base = make_schedule(plain, num_stages=len(times), num_ranks=p, num_microbatches=m)
        base_s = run_schedule(base, times).makespan_s
        assert found.named_s is not None
        print(
            f"| {title} | {p} | {m} | {base_s:.2f} | {found.named_s:.2f} | {found.named} | {found.makespan_s:.2f} "
            f"| {found.bound_s:.2f} | {'yes' if found.is_proved else 'no'} | {1 - found.makespan_s / found.named_s:.1%} |",
            flush=True,
        )


def random_stages(rng: random.Random, p: int) -> list[StageTimes]:
    """Stages that differ by up to three times, I up to twice and W down to half of F, transfers up to half of the mean F."""
    forwards = [rng.uniform(0.5, 1.5) for _ in range(p)]
    return [
        StageTimes(
            forward_s=f,
            input_s=f * rng.uniform(0.8, 2.0),
            weight_s=f * rng.uniform(0.5, 1.0),
            receive_s=rng.uniform(0.0, 0.5),
        )
        for f in forwards
    ]


def random_problems() -> None:
    """Thirty random pipelines a row, two seconds each."""
    print(
        "| p | m | microbatches held | against 1F1B: median, most | against the best named | proved | gap to the bound: most |"
    )
    print("|---|---|---|---|---|---|---|")
    for p, m, held in ((2, 8, 0), (4, 8, 0), (4, 8, 4), (8, 16, 0), (8, 16, 8), (8, 64, 0), (8, 64, 8)):
        rng = random.Random(p * m + held)
        gains, named, gaps = [], [], []
        for _ in range(30):
            times = random_stages(rng, p)
            found = optimal(
                times,
                m,
                memory=[StageBytes(held_bytes=1)] * p if held else [],
                memory_limit_bytes=held or None,
            )
            base = make_schedule("1f1b", num_stages=p, num_ranks=p, num_microbatches=m)
            assert found.named_s is not None
            gains.append(1 - found.makespan_s / run_schedule(base, times).makespan_s)
            named.append(1 - found.makespan_s / found.named_s)
            gaps.append((found.makespan_s / found.bound_s - 1, found.is_proved))
        print(
            f"| {p} | {m} | {held or 'any'} | {statistics.median(gains):.1%}, {max(gains):.1%} "
            f"| {statistics.median(named):.1%}, {max(named):.1%} | {sum(proved for _, proved in gaps)} of 30 "
            f"| {max(gap for gap, _ in gaps):.1%} |",
            flush=True,
        )


def speed() -> None:
    print("| schedule | actions | make s | run s |\n|---|---|---|---|")
    for name in SCHEDULES:
        per_rank = 2 if SCHEDULES[name].places == "v" else 1
        began_s = time.perf_counter()
        made = make_schedule(name, num_stages=64 * per_rank, num_ranks=64, num_microbatches=512)
        made_s = time.perf_counter()
        run_schedule(made, [StageTimes(forward_s=1.0, input_s=1.0, weight_s=1.0)] * made.num_stages)
        ran_s = time.perf_counter()
        actions = sum(map(len, made.actions))
        print(f"| {name} | {actions:,} | {made_s - began_s:.2f} | {ran_s - made_s:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("formulas", "search", "random", "speed"))
    {"formulas": formulas, "search": search, "random": random_problems, "speed": speed}[
        parser.parse_args().what
    ]()


if __name__ == "__main__":
    main()
