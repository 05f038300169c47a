"""``parse_program``: a Program from its text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final, Never, TypeVar, cast
from urllib.parse import unquote

from shardstage.cluster import CollectiveKind
from shardstage.errors import ProgramError, ShardstageError
from shardstage.graph.cuts import Edge
from shardstage.layout import Mesh
from shardstage.program.instruction import Instruction
from shardstage.program.program import Collective, ParameterUse, Program, Row, TensorType

__all__ = ["VERSION_LINE", "parse_program"]

VERSION_LINE: Final = "shardstage program 1"

_EXAMPLES: Final[Mapping[str, str]] = {
    "mesh": "mesh pp=2 dp=4 tp=1",
    "schedule": "schedule 1f1b",
    "samples": "samples global_batch=16\n  dp=0-3 2*2",
    "stages": "stages 0=pp0 1=pp1",
    "edges": "edges\n  add_7 0>1 grad",
    "messages": "messages\n  m0 add_7:float32[2,16,64]",
    "calls": "calls\n  c1 4*tp.all_reduce:float32[4096] dp.all_reduce:float32[512]{b0}",
    "buckets": "buckets\n  b0 model.norm.weight",
    "parameters": "parameters\n  model.norm.weight stages=1 sum=dp",
    "rows": "rows\n  pp=0 dp=* tp=*\n    COUNT[c0] 0F0 0SEND_F0>1(m0)",
}
_KINDS: Final = "all_reduce|all_gather|reduce_scatter|all_to_all|broadcast|p2p"
_COLLECTIVE: Final = re.compile(
    rf"(?:(\d+)\*)?(tp|dp|world|tie\d+(?:\+\d+)+)\.({_KINDS}):(\w+)\[(\d+)\](?:\{{(\w+)\}})?"
)
_TENSOR: Final = re.compile(r"([^\s:]+):(\w+)\[((?:\d+(?:,\d+)*)?)\]")
_RUN: Final = re.compile(r"(?:(\d+)\*)?(\d+)")
_RANGE: Final = re.compile(r"(\d+)(?:-(\d+))?")
_STAGE: Final = re.compile(r"(\d+)=pp(\d+)")
_WAY: Final = re.compile(r"(\d+)>(\d+)")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Word:
    text: str
    line: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Section:
    """A section's own words and those of its entries."""

    name: str
    line: int
    words: list[_Word]
    entries: list[list[_Word]] = field(default_factory=list)

    def refuse(self, what: str, line: int | None = None) -> Never:
        raise ProgramError(f"line {line or self.line}: {what}", hint=_EXAMPLES[self.name])

    def number(self, word: _Word, key: str) -> int:
        """Of ``key=12``."""
        name, _, value = word.text.partition("=")
        if name != key or not value.isdecimal():
            self.refuse(f"{word.text!r} stands where {key}=… does", word.line)
        return int(value)

    def match(self, pattern: re.Pattern[str], word: _Word, what: str) -> re.Match[str]:
        found = pattern.fullmatch(word.text)
        if found is None:
            self.refuse(f"{word.text!r} is not {what}", word.line)
        return found

    def exactly(self, num_words: int) -> list[_Word]:
        if len(self.words) != num_words:
            self.refuse(f"{self.name} is followed by {len(self.words)} words and not by {num_words}")
        return self.words

    def table(self, read: Callable[[_Section, _Word], Sequence[T]]) -> dict[str, tuple[T, ...]]:
        """Entries that begin with a name."""
        found: dict[str, tuple[T, ...]] = {}
        for name, *words in self.entries:
            if name.text in found:
                self.refuse(f"{name.text} is there twice", name.line)
            if not re.fullmatch(r"\w+", name.text):
                self.refuse(f"{name.text!r} is not a name", name.line)
            found[name.text] = tuple(item for word in words for item in read(self, word))
        return found


def parse_program(text: str) -> Program:
    """The Program that a text writes, which need not be a right one: see ``verify``.

    Raises ``ProgramError`` with the number of the line, what is wrong there, and a right example.
    """
    sections = _sections(text)
    mesh = _mesh(sections["mesh"])
    (global_batch,) = sections["samples"].exactly(1)
    (schedule,) = sections["schedule"].exactly(1)
    return Program(
        mesh=mesh,
        schedule=unquote(schedule.text),
        global_batch=sections["samples"].number(global_batch, "global_batch"),
        samples=_samples(sections["samples"], mesh),
        stage_ranks=_stage_ranks(sections["stages"]),
        edges=tuple(_edge(sections["edges"], entry) for entry in sections["edges"].entries),
        messages=sections["messages"].table(_tensor),
        calls=sections["calls"].table(_collectives),
        buckets=sections["buckets"].table(lambda _, word: (unquote(word.text),)),
        parameters=tuple(_parameter(sections["parameters"], e) for e in sections["parameters"].entries),
        rows=_rows(sections["rows"], mesh),
    )


def _sections(text: str) -> dict[str, _Section]:
    """The text by section; refuses one that is unknown, there twice, or missing."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != VERSION_LINE:
        first = repr(lines[0]) if lines else "nothing"
        raise ProgramError(f"line 1: {first} does not begin a program", hint=VERSION_LINE)
    found: dict[str, _Section] = {}
    section: _Section | None = None
    for number, line in enumerate(lines[1:], start=2):
        words = [_Word(word, number) for word in line.partition("#")[0].split()]
        if not words:
            continue
        if not line[0].isspace():
            section = _new_section(words, found)
        elif section is None:
            raise ProgramError(f"line {number}: this belongs to no section", hint=_EXAMPLES["mesh"])
        else:
            _extend(section, line, words)
    for name, example in _EXAMPLES.items():
        if name not in found:
            raise ProgramError(f"line {len(lines)}: the program ends without {name}", hint=example)
    return found


def _new_section(words: list[_Word], found: dict[str, _Section]) -> _Section:
    name, line = words[0].text, words[0].line
    if name not in _EXAMPLES or name in found:
        problem = "is there twice" if name in found else "is not a section"
        raise ProgramError(f"line {line}: {name!r} {problem}", hint="\n".join(_EXAMPLES.values()))
    found[name] = _Section(name=name, line=line, words=words[1:])
    return found[name]


def _extend(section: _Section, line: str, words: list[_Word]) -> None:
    if not line.startswith("    "):
        section.entries.append(words)
    elif section.entries:
        section.entries[-1].extend(words)
    else:
        section.words.extend(words)


def _mesh(section: _Section) -> Mesh:
    pp, dp, tp = section.exactly(3)
    mesh = Mesh(pp=section.number(pp, "pp"), dp=section.number(dp, "dp"), tp=section.number(tp, "tp"))
    if mesh.world_size < 1:
        section.refuse("an axis of 0 ranks")
    return mesh


def _samples(section: _Section, mesh: Mesh) -> tuple[tuple[int, ...], ...]:
    found: dict[int, tuple[int, ...]] = {}
    for dps, *words in section.entries:
        sizes: list[int] = []
        for word in words:
            count, size = section.match(_RUN, word, "a number of samples").groups()
            sizes += [int(size)] * int(count or 1)
        for dp in _coordinates(section, dps, "dp", mesh.dp):
            if dp in found:
                section.refuse(f"dp={dp} is there twice", dps.line)
            found[dp] = tuple(sizes)
    for dp in range(mesh.dp):
        if dp not in found:
            section.refuse(f"dp={dp} has no microbatches")
    return tuple(found[dp] for dp in range(mesh.dp))


def _coordinates(section: _Section, word: _Word, axis: str, size: int) -> tuple[int, ...]:
    """Of ``dp=0-3,7`` or ``dp=*``."""
    name, _, ranges = word.text.partition("=")
    if name != axis:
        section.refuse(f"{word.text!r} stands where {axis}=… does", word.line)
    if ranges == "*":
        return tuple(range(size))
    found: list[int] = []
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            section.refuse(f"{word.text!r} are no coordinates", word.line)
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < size:
            section.refuse(f"{word.text!r} does not lie within {axis}=0-{size - 1}", word.line)
        found += range(first, last + 1)
    return tuple(found)


def _stage_ranks(section: _Section) -> tuple[int, ...]:
    ranks: list[int] = []
    for word in section.words:
        stage, rank = section.match(_STAGE, word, "the rank of a stage").groups()
        if int(stage) != len(ranks):
            section.refuse(f"{word.text!r} stands where stage {len(ranks)} does", word.line)
        ranks.append(int(rank))
    if not ranks:
        section.refuse("no stages")
    return tuple(ranks)


def _edge(section: _Section, words: list[_Word]) -> Edge:
    if len(words) not in (2, 3) or (len(words) == 3 and words[2].text != "grad"):
        section.refuse(
            "an edge is a value, the two stages and, where a gradient flows back, grad", words[0].line
        )
    source, target = section.match(_WAY, words[1], "a pair of stages").groups()
    return Edge(
        value=unquote(words[0].text), source=int(source), target=int(target), requires_grad=len(words) == 3
    )


def _tensor(section: _Section, word: _Word) -> tuple[TensorType, ...]:
    value, dtype, shape = section.match(_TENSOR, word, "a tensor").groups()
    return (TensorType(unquote(value), dtype, tuple(int(size) for size in shape.split(",") if size)),)


def _collectives(section: _Section, word: _Word) -> tuple[Collective, ...]:
    count, axis, kind, dtype, numel, bucket = section.match(_COLLECTIVE, word, "a collective").groups()
    call = Collective(axis, cast("CollectiveKind", kind), dtype, int(numel), bucket or "")
    return (call,) * int(count or 1)


def _parameter(section: _Section, words: list[_Word]) -> ParameterUse:
    fqn, line = unquote(words[0].text), words[0].line
    named = {key: value for key, _, value in (word.text.partition("=") for word in words[1:])}
    stages = named.pop("stages", "")
    summed_over = named.pop("sum", "")
    is_frozen = named.pop("frozen", None) is not None
    if named or not all(stage.isdecimal() for stage in stages.split(",")):
        section.refuse(f"parameter {fqn} wants stages=…, perhaps sum=… and frozen", line)
    return ParameterUse(
        fqn=fqn,
        stages=tuple(map(int, stages.split(","))),
        summed_over=tuple(summed_over.split(",")) if summed_over else (),
        is_trained=not is_frozen,
    )


def _rows(section: _Section, mesh: Mesh) -> tuple[Row, ...]:
    read = cache(Instruction.parse)  # rows hold the same few acts many times
    return tuple(_row(section, entry, mesh, read) for entry in section.entries)


def _row(section: _Section, words: list[_Word], mesh: Mesh, read: Callable[[str], Instruction]) -> Row:
    if len(words) < 3:
        section.refuse("a row begins with its ranks", words[0].line)
    pp, dp, tp, *rest = words
    return Row(
        pp=section.number(pp, "pp"),
        dp=_coordinates(section, dp, "dp", mesh.dp),
        tp=_coordinates(section, tp, "tp", mesh.tp),
        instructions=tuple(_instruction(word, read) for word in rest),
    )


def _instruction(word: _Word, read: Callable[[str], Instruction]) -> Instruction:
    try:
        return read(word.text)
    except ShardstageError as error:
        raise ProgramError(f"line {word.line}: {error.message}", hint=error.hint) from error
