"""A plan tried out without its devices: proved, timed, and executed by the engine's own code for each kind of rank.

Owns ``rehearse`` and what it finds: the counts of the proof, the predicted timeline, what each kind of rank did and holds, and how its
checkpoint is shared out. In go a graph, a plan and a cluster, out comes a ``Rehearsal``. It
refuses to know how a plan was chosen and how its result is drawn.

    found = rehearse(graph, plan, source, cluster)
    found.timeline.step_time_s, found.fullest.peak_bytes, found.differences
"""

from shardstage.rehearsal.counts import Counts, counts_of
from shardstage.rehearsal.rehearsal import RankRehearsal, Rehearsal
from shardstage.rehearsal.rehearse import Which, rehearse

__all__ = [
    "Counts",
    "RankRehearsal",
    "Rehearsal",
    "Which",
    "counts_of",
    "rehearse",
]
