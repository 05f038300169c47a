"""A recorded step: every instruction once, in order, without overlap, and what was held after it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tests.runtime.engine_entries import GLOBAL_BATCH, SEQUENCE, VOCABULARY, Case, batches_of, engine_of

from shardstage.graph.capture import capture
from shardstage.graph.source import load_model
from shardstage.plan import complete, parse_request
from shardstage.runtime.engine import Engine
from shardstage.runtime.recorder import Recorder


@pytest.fixture(scope="module")
def engine() -> Engine:
    """One rank with three microbatches, two stages and a backward in two halves."""
    graph = capture(load_model("gpt2-tiny", tokenizer_vocab=VOCABULARY), sequence=SEQUENCE)
    plan = complete(
        parse_request("pp=1,mb=2,schedule=zb-v"),
        graph,
        num_ranks=1,
        global_batch=GLOBAL_BATCH,
        sequence=SEQUENCE,
    )
    made = engine_of(Case("gpt2-tiny", graph, plan), rank=0)
    made.step(0, batches_of(made, 0))
    return made


def test_every_instruction_has_a_span(engine: Engine) -> None:
    held = iter(range(1000, 2000))
    engine.recorder = Recorder(0, torch.device("cpu"), lambda: next(held))
    engine.step(1, batches_of(engine, 1))
    spans, memory = engine.recorder.spans(), engine.recorder.memory()
    engine.recorder = None
    assert [span.name for span in spans] == [i.name for i in engine.program.row_of(0).instructions]
    assert all(span.end_s >= span.start_s >= 0 for span in spans)
    assert all(before.end_s <= after.start_s for before, after in pairwise(spans))
    assert [sample.bytes_by_category["allocated"] for sample in memory] == [*range(1000, 1000 + len(spans))]
    assert [sample.cause for sample in memory] == [span.name for span in spans]
    computing = {span.name for span in spans if span.stream == "compute"}
    assert {"0F0", "1F0", "1I0", "0W2", "STEP"} <= computing
    assert {span.stream for span in spans if span.name in ("COUNT", "REDUCE_GRAD")} == {"dp"}


def test_ranks_are_put_on_one_clock(engine: Engine) -> None:
    recorder = engine.recorder = Recorder(3, torch.device("cpu"))
    engine.step(2, batches_of(engine, 2))
    engine.recorder = None
    own, shifted = recorder.spans(), recorder.spans(recorder.origin_s - 5)
    assert recorder.memory() == ()
    assert {span.rank for span in own} == {3}
    assert shifted[0].start_s == pytest.approx(own[0].start_s + 5)


def test_recording_changes_no_number(engine: Engine) -> None:
    before = {name: p.detach().clone() for name, p in named_parameters(engine)}
    plain = engine.step(3, batches_of(engine, 3))
    after = {name: p.detach().clone() for name, p in named_parameters(engine)}
    with torch.no_grad():
        for name, p in named_parameters(engine):
            p.copy_(before[name])
    engine.recorder = Recorder(0, torch.device("cpu"))
    recorded = engine.step(3, batches_of(engine, 3))
    engine.recorder = None
    assert recorded.loss == plain.loss and recorded.gradient_norm == plain.gradient_norm
    assert set(after) == set(before)


def named_parameters(engine: Engine) -> list[tuple[str, torch.nn.Parameter]]:
    return [
        (f"{number}.{name}", p)
        for number, stage in engine.stages.items()
        for name, p in stage.named_parameters()
    ]
