"""How one model is cut along the tensor-parallel axis, by rules over its captured graph.

Owns the rules (``rules/``: placements in → placement out, and the local op), the walk that applies them, and ``Sharding``, its result. In
goes a ``ModelGraph`` of any model, out comes the ``ModelGraph`` of each rank: the same type with local shapes and, between the ops, those
that ranks talk by. It refuses to know the model's name, what an operator does to numbers, and how fast a link is; it imports no torch.
"""

from shardstage.sharding.describe import describe
from shardstage.sharding.local import localize
from shardstage.sharding.shard import shard
from shardstage.sharding.sharding import Conversion, Sharding, Unsharded
from shardstage.sharding.state import Placing, State

__all__ = ["Conversion", "Placing", "Sharding", "State", "Unsharded", "describe", "localize", "shard"]
