"""What sharding knows of each family of ops: placements in → placement out, and the local op.

Owns ``RULES``, the table from a target to its rule; a new op is one line in the table, a new family one file. A rule refuses to know what
comes before or after its op: it asks for other cuts by raising, and the walk decides.
"""

from shardstage.sharding.rules.table import RULES, is_random, rewrite_of

__all__ = ["RULES", "is_random", "rewrite_of"]
