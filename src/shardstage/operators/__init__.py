"""The callables behind a graph's targets: torch's by name, and the sharded operators as autograd functions.

In go local tensors and the group of the ranks that share a stage, out come local tensors. It refuses to know the plan.
"""
