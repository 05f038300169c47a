"""``verify``: the proof that a Program's instructions fit together, on paper, for all ranks.

Ranks of a row act alike, and columns that no check can tell apart are checked once, so that thousands of ranks take seconds.
"""

from __future__ import annotations

from shardstage.program.program import Program
from shardstage.program.verify_acts import (
    check_buffers,
    check_computations,
    check_message_order,
    check_message_types,
    check_transfers,
)
from shardstage.program.verify_collectives import check_alike_microbatches, check_collectives
from shardstage.program.verify_deadlock import check_deadlock
from shardstage.program.verify_fold import Fold, fold_of
from shardstage.program.verify_parameters import (
    check_buckets,
    check_reductions,
    check_unsharding,
    is_fully_sharded,
)
from shardstage.program.verify_structure import (
    check_frame,
    check_parameters,
    check_ranks,
    check_samples,
    check_tables,
)

__all__ = ["verify"]


def verify(program: Program) -> None:
    """Returns if the program is right; raises ``ProgramError`` with the rank, the step and a drawn grid if not.

    Proved: every rank has its acts; every microbatch runs once through every stage; messages and collectives match at all their ends in
    type and order; nothing is read before it is written; every gradient is summed once over the ranks that share its parameter; and no
    ranks wait for each other.
    """
    check_samples(program)
    check_tables(program)
    check_ranks(program)
    check_parameters(program)
    fold = fold_of(program)
    _check_rows(fold)
    for column in fold.columns:
        for pp in range(program.mesh.pp):
            check_message_types(column, pp)
        check_message_order(column)
    check_collectives(fold)
    check_alike_microbatches(fold)
    check_deadlock(fold)


def _check_rows(fold: Fold) -> None:
    """What can be seen in a row alone, once for each row."""
    program = fold.program
    is_sharded = is_fully_sharded(program)
    seen: set[int] = set()
    for column in fold.columns:
        for pp, row in enumerate(column.rows):
            if id(row) in seen:
                continue
            seen.add(id(row))
            check_frame(column, pp)
            check_computations(column, pp)
            check_transfers(column, pp)
            check_buffers(column, pp)
            check_buckets(column, pp)
            check_unsharding(column, pp, is_sharded=is_sharded)
            check_reductions(column, pp)
