"""Small timelines with everything that a report shows: 1F1B on three ranks, two of them alike, with talk and memory."""

from __future__ import annotations

from shardstage.report import About, RankNote
from shardstage.schedule import StageTimes, one_f_one_b, run_schedule
from shardstage.timeline import MemorySample, Span, Timeline

NUM_RANKS, NUM_MICROBATCHES = 3, 5

ABOUT = About(
    title="a <small> model on 3 ranks",
    facts=(("model", "small"), ("note", "</script><script>alert(1)</script>")),
    tokens=600,
    ranks=(RankNote(pp=0, stages="0: embedding … add"),),
)


def timeline(source: str = "predicted", *, slower: float = 1.0, alike: int = 1) -> Timeline:
    """F takes 2 s and B 4 s; every F is followed by a message that the next stage waits for."""
    schedule = one_f_one_b(NUM_RANKS, NUM_MICROBATCHES)
    times = [StageTimes(forward_s=2.0 * slower, input_s=2.0 * slower, weight_s=2.0 * slower, receive_s=0.5)]
    ran = run_schedule(schedule, times * NUM_RANKS)
    spans: list[Span] = []
    memory: list[MemorySample] = []
    for rank, row in enumerate(schedule.actions):
        held = 0
        talks = []
        for action, start, end in zip(row, ran.starts_s[rank], ran.ends_s[rank], strict=True):
            spans.append(Span(rank, "compute", str(action), start, end))
            held += 1 if action.kind == "F" else -1
            memory.append(
                MemorySample(rank, start, {"parameters": 100, "activations": 10 * held}, str(action))
            )
            if action.kind == "F" and rank + 1 < NUM_RANKS:
                talks.append(Span(rank, "pp", f"{rank}SEND_F{action.microbatch}>{rank + 1}", end, end + 0.5))
            if action.kind == "F" and rank:
                talks.append(
                    Span(rank, "pp", f"{rank}RECV_F{action.microbatch}<{rank - 1}", start - 0.25, start)
                )
        last = ran.ends_s[rank][-1]
        spans += talks
        spans += [
            Span(rank, "dp", "REDUCE_GRAD", last, last + 1),
            Span(rank, "compute", "STEP", last + 1, last + 2),
        ]
    return Timeline(
        source="measured" if source == "measured" else "predicted",
        spans=tuple(spans),
        memory=tuple(memory),
        alike={rank: tuple(range(rank, rank + NUM_RANKS * alike, NUM_RANKS)) for rank in range(NUM_RANKS)},
        labels={rank: f"pp={rank} dp=0 tp=0" for rank in range(NUM_RANKS)},
    )
