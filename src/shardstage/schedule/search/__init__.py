"""The search for the fastest schedule on stages of given times, within a memory limit.

Owns the problem in the form that a search wants (``problem``), a lower bound (``bound``), list scheduling (``dispatch``), local search
(``exchange``), the exact method for small instances (``exact``) and what puts them together (``optimal``). In go seconds and bytes of
stages, out comes a schedule with the proof that it has. It refuses to know where stages are cut.

A microbatch is as good as another, so of all orders only those matter in which each kind of action of a stage takes the microbatches in
turn: the k-th F of a stage can be given the k-th microbatch that arrives, without any action starting later or any rank holding more.
A rank's row is therefore a word of ``Token``s, kinds of a stage's actions, and says which microbatches by counting.
"""

from shardstage.schedule.search.optimal import OptimalSchedule, optimal

__all__ = ["OptimalSchedule", "optimal"]
