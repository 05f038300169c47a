"""The text of a Program: readable, editable by hand, and read back exactly.

    shardstage program 1
    mesh pp=2 dp=4 tp=1
    schedule 1f1b
    samples global_batch=16
      dp=0-3 2*2
    stages 0=pp0 1=pp1
    edges
      add_7 0>1 grad
    messages
      m0 add_7:float32[2,16,64]
    calls
      c1 4*tp.all_reduce:float32[4096] dp.all_reduce:float32[512]{b0}
    buckets
      b0 model.norm.weight
    parameters
      model.norm.weight stages=1 sum=dp
    rows
      pp=0 dp=* tp=*
        COUNT[c0] 0F0 0SEND_F0>1(m0) 0F1 0SEND_F1>1(m0) 0RECV_B0<1(m0) 0B0 …

A line that begins with four spaces goes on with the one before; ``#`` begins a comment. What a name must not hold (blanks, brackets, …)
is written ``%20``. The reader is ``shardstage.program.text_parse``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from urllib.parse import quote

from shardstage.program.program import Collective, ParameterUse, Program, TensorType
from shardstage.program.text_parse import VERSION_LINE, parse_program

__all__ = ["format_program", "parse_program"]

_LINE_LENGTH = 120
_UNSAFE = re.compile(r"[^\w.@+/-]")


def format_program(program: Program) -> str:
    """The Program as text that ``parse_program`` reads back to an equal one; lines of 120 columns where a word allows."""
    return "\n".join(line for item in _items(program) for line in _wrapped(item)) + "\n"


def _items(program: Program) -> Iterator[tuple[str, list[str]]]:
    """Indentation and words of each line before it is wrapped."""
    mesh = program.mesh
    yield "", [VERSION_LINE]
    yield "", ["mesh", f"pp={mesh.pp}", f"dp={mesh.dp}", f"tp={mesh.tp}"]
    yield "", ["schedule", _name(program.schedule)]
    yield "", ["samples", f"global_batch={program.global_batch}"]
    for sizes, dps in _folded(program.samples):
        yield "  ", [f"dp={_ranges(dps, len(program.samples))}", *_runs(map(str, sizes))]
    yield "", ["stages", *(f"{stage}=pp{rank}" for stage, rank in enumerate(program.stage_ranks))]
    yield "", ["edges"]
    for edge in program.edges:
        way = f"{edge.source}>{edge.target}"
        yield "  ", [_name(edge.value), way, *(["grad"] if edge.requires_grad else [])]
    yield "", ["messages"]
    for name, tensors in program.messages.items():
        yield "  ", [name, *map(_tensor, tensors)]
    yield "", ["calls"]
    for name, calls in program.calls.items():
        yield "  ", [name, *_runs(map(_collective, calls))]
    yield "", ["buckets"]
    for name, fqns in program.buckets.items():
        yield "  ", [name, *map(_name, fqns)]
    yield "", ["parameters"]
    for parameter in program.parameters:
        yield "  ", _parameter(parameter)
    yield "", ["rows"]
    for row in program.rows:
        yield "  ", [f"pp={row.pp}", f"dp={_ranges(row.dp, mesh.dp)}", f"tp={_ranges(row.tp, mesh.tp)}"]
        yield "    ", list(map(str, row.instructions))


def _wrapped(item: tuple[str, list[str]]) -> Iterator[str]:
    """Lines of a list of words; those after the first are indented deeper, by four at least."""
    indent, words = item
    line, is_empty = indent, True
    for word in words:
        if not is_empty and len(line) + 1 + len(word) > _LINE_LENGTH:
            yield line
            line, is_empty = max(indent + "  ", "    ", key=len) if len(indent) < 4 else indent, True
        line += word if is_empty else f" {word}"
        is_empty = False
    if not is_empty:
        yield line


def _folded(rows: Sequence[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Runs of neighbours that are equal."""
    for sizes, group in groupby(range(len(rows)), key=rows.__getitem__):
        yield sizes, list(group)


def _runs(words: Iterable[str]) -> list[str]:
    """``4*word`` for four equal words in a row."""
    counted = [(word, len(list(group))) for word, group in groupby(words)]
    return [word if count == 1 else f"{count}*{word}" for word, count in counted]


def _ranges(coordinates: Sequence[int], size: int) -> str:
    """``0-3,7``; ``*`` for all of them."""
    if list(coordinates) == list(range(size)):
        return "*"
    runs: list[list[int]] = []
    for coordinate in coordinates:
        if runs and coordinate == runs[-1][-1] + 1:
            runs[-1].append(coordinate)
        else:
            runs.append([coordinate])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _tensor(tensor: TensorType) -> str:
    return f"{_name(tensor.value)}:{tensor.dtype}[{','.join(map(str, tensor.shape))}]"


def _collective(call: Collective) -> str:
    bucket = f"{{{call.bucket}}}" if call.bucket else ""
    return f"{call.axis}.{call.kind}:{call.dtype}[{call.numel}]{bucket}"


def _parameter(parameter: ParameterUse) -> list[str]:
    words = [_name(parameter.fqn), f"stages={','.join(map(str, parameter.stages))}"]
    if parameter.summed_over:
        words.append(f"sum={','.join(parameter.summed_over)}")
    return words if parameter.is_trained else [*words, "frozen"]


def _name(name: str) -> str:
    return _UNSAFE.sub(lambda found: quote(found[0], safe=""), name)
