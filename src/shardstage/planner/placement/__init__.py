"""Which device runs which node of a graph that is not a chain.

Owns PlacementGraph, Placement, the search between them, and how a captured model becomes such a graph. In go the seconds and bytes of
every node, the seconds that moving each tensor takes, and the number of devices; out come the device of every node, the stage time, a
bound that no placement can beat, and how it was found. It refuses to know what the nodes compute and what the devices are called
(``model.py`` and ``placed.py`` do), and in which order a device runs its nodes; it imports no torch. What it places is priced, not run: the
engine runs stages in the captured order.

    place_contiguous(graph, num_devices)    each device runs a contiguous set: exact, over ideals
    place(graph, num_devices)               any set: never slower than the former
    place_in_order(graph, num_devices)      stages of the nodes in their order
    lower_bound(graph, num_devices)         seconds that no placement can beat
    place_model(model, cluster, …)          all three for the ops of a captured model

    graph.py       the objective                      ideals.py      sets that a pipeline can have done
    clusters.py    what must or may stay together     contiguous.py  dynamic programming over ideals
    weld.py        what any faster one keeps together refine.py      tabu search on the objective
    starts.py      placements to begin from           multilevel.py  the same on coarser graphs
    limits.py      the devices                        anneal.py      annealing on the objective
    anywhere.py    best of all starts
    model.py       a model's ops, priced           placed.py      where they run, by modules
"""

from shardstage.planner.placement.anywhere import place
from shardstage.planner.placement.contiguous import place_contiguous, place_in_order
from shardstage.planner.placement.graph import (
    Placement,
    PlacementGraph,
    Tensor,
    device_loads_s,
    device_memory_bytes,
    stage_time_s,
)
from shardstage.planner.placement.model import OpGraph, placement_graph
from shardstage.planner.placement.placed import PlacedModel, place_model
from shardstage.planner.placement.weld import lower_bound

__all__ = [
    "OpGraph",
    "PlacedModel",
    "Placement",
    "PlacementGraph",
    "Tensor",
    "device_loads_s",
    "device_memory_bytes",
    "lower_bound",
    "place",
    "place_contiguous",
    "place_in_order",
    "place_model",
    "placement_graph",
    "stage_time_s",
]
