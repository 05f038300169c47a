"""Which device runs which node of a graph that is not a chain.

Owns PlacementGraph, Placement and the search between them. In go the seconds and bytes of every node, the seconds that moving each tensor
takes, and the number of devices; out come the device of every node, the stage time, a bound that no placement can beat, and how it was
found. It refuses to know what the nodes compute, what the devices are called, and in which order a device runs its nodes; it imports no
torch.

    place_contiguous(graph, num_devices)    each device runs a contiguous set: exact, over ideals
    place(graph, num_devices)               any set: never slower than the former
    lower_bound(graph, num_devices)         seconds that no placement can beat

    graph.py       the objective                      ideals.py      sets that a pipeline can have done
    clusters.py    what must or may stay together     contiguous.py  dynamic programming over ideals
    weld.py        what any faster one keeps together refine.py      tabu search on the objective
    starts.py      placements to begin from           multilevel.py  the same on coarser graphs
    limits.py      the devices                        anneal.py      annealing on the objective
    anywhere.py    best of all starts
"""

from shardstage.planner.placement.anywhere import place
from shardstage.planner.placement.contiguous import place_contiguous
from shardstage.planner.placement.graph import (
    Placement,
    PlacementGraph,
    Tensor,
    device_loads_s,
    device_memory_bytes,
    stage_time_s,
)
from shardstage.planner.placement.weld import lower_bound

__all__ = [
    "Placement",
    "PlacementGraph",
    "Tensor",
    "device_loads_s",
    "device_memory_bytes",
    "lower_bound",
    "place",
    "place_contiguous",
    "stage_time_s",
]
