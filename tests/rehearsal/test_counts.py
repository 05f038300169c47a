"""What a proof is said to have held for is what the program has."""

from __future__ import annotations

from tests.runtime.dry_run_cases import case, rehearsed

from shardstage.rehearsal import counts_of
from shardstage.rehearsal.text import counts_text


def test_every_rank_and_every_group_is_counted() -> None:
    program = case(
        "ties over pp, tp=3"
    ).program  # gpt2 on pp=2, tp=3: 3 microbatches of 2, embedding tied over both stages
    counts = counts_of(program)
    assert (counts.num_ranks, counts.num_samples, counts.num_parameters) == (
        6,
        6,
        len(program.parameters),
    )
    per_rank = [program.row_of(rank).instructions for rank in range(6)]
    assert counts.num_instructions == sum(map(len, per_rank))
    assert counts.num_messages == sum(i.is_send for row in per_rank for i in row)
    calls = [call for row in per_rank for i in row for call in program.collectives(i)]
    assert counts.collectives["tp"] * 3 == sum(call.axis == "tp" for call in calls)
    assert counts.collectives["tie"] * 2 == sum(call.axis.startswith("tie") for call in calls)
    assert counts.groups == {"tie": 3, "tp": 2, "world": 1}
    assert "dp" not in counts.collectives


def test_bytes_are_those_of_all_messages() -> None:
    program = rehearsed("llama", "pp=3,mb=1", 3, 5).program
    per_message = 8 * 32 * 4  # tokens, features, bytes
    sends = 2 * 5 * 2  # boundaries, microbatches, forwards and backwards
    counts = counts_of(program)
    assert counts.num_messages == sends
    assert counts.message_bytes >= sends * per_message


def test_the_text_fits_80_columns() -> None:
    for name in ("zero=3, ties, several in flight", "uneven shares, pp=3"):
        lines = counts_text(counts_of(case(name).program)).splitlines()
        assert lines[0].startswith("proved     ")
        assert max(map(len, lines)) <= 80
