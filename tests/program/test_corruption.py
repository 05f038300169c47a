"""Of a thousand programs with one thing wrong, each that means something else is refused."""

from __future__ import annotations

from collections import Counter
from functools import cache
from random import Random
from typing import Any

import pytest
from tests.program.corruption import CORRUPTIONS, corrupted
from tests.program.hand_written import PIPELINE, SHARDED
from tests.program.oracle import meaning
from tests.program.programs import CASES, program_of

from shardstage.errors import ProgramError
from shardstage.program import Program, parse_program, verify

NUM_CORRUPTIONS = 1000
BY_HAND = {"by hand": PIPELINE, "by hand, sharded": SHARDED}
IS_FULLY_SHARDED = {
    "zero=2",
    "zero=3",
    "zero=3, tp",
    "zero=3, recompute",
    "zero=3, first layers",
    "by hand, sharded",
}


@cache
def names() -> dict[Any, int]:
    """Of the expressions, shared by all programs, so that their meanings can be compared."""
    return {}


@cache
def valid(name: str) -> Program:
    return parse_program(BY_HAND[name]) if name in BY_HAND else program_of(name)


@cache
def valid_meaning(name: str) -> Any:
    return meaning_of(name, valid(name))


def meaning_of(name: str, program: Program) -> Any:
    return meaning(program, names(), is_fully_sharded=name in IS_FULLY_SHARDED)


def is_refused(program: Program) -> bool:
    try:
        verify(program)
    except ProgramError as error:
        return bool(error.hint)
    return False


@pytest.mark.parametrize("name", [*CASES, *BY_HAND])
def test_valid_programs_mean_something(name: str) -> None:
    found = valid_meaning(name)
    assert not isinstance(found, str), found
    assert not is_refused(valid(name))


def test_every_corruption_that_changes_the_meaning_is_refused() -> None:
    random = Random(20)
    sources = [*CASES, *BY_HAND]
    outcomes: Counter[tuple[bool, bool]] = Counter()
    while outcomes.total() < NUM_CORRUPTIONS:
        name, how = random.choice(sources), random.choice(list(CORRUPTIONS))
        program = corrupted(valid(name), how, random)
        if program is None:
            continue
        is_changed = meaning_of(name, program) != valid_meaning(name)
        refused = is_refused(program)
        assert refused or not is_changed, (name, how, meaning_of(name, program))
        outcomes[is_changed, refused] += 1
    changed = outcomes[True, True]
    assert changed > 0.8 * NUM_CORRUPTIONS, outcomes
    assert outcomes[False, False] > 0.01 * NUM_CORRUPTIONS, outcomes  # and it lets harmless changes pass
