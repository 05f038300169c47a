"""The callables behind a graph's targets: torch's by name, and the sharded operators as autograd functions.

Owns the only code that computes on shards. In go local tensors and the group of the ranks that share a stage, out come local tensors;
``library(context)`` names them all. It refuses to know the plan, the model, and why a value lies as it does.
"""

from shardstage.operators.context import OperatorContext, RandomState
from shardstage.operators.library import library

__all__ = ["OperatorContext", "RandomState", "library"]
