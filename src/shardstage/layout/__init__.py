"""Where the pieces of a tensor lie.

Owns the mesh (named axes over ranks) and the placement of a tensor along one axis: Replicate, Shard, Partial. In go sizes, out
come the intervals that each rank holds. It refuses to know what is computed on them, and runs without torch.
"""

from shardstage.layout.mesh import AXES, Mesh
from shardstage.layout.placement import Interval, Partial, Placement, Replicate, Shard, balanced_sizes

__all__ = ["AXES", "Interval", "Mesh", "Partial", "Placement", "Replicate", "Shard", "balanced_sizes"]
