"""Runs one rank of the real thing.

Owns the engine that walks a Program, the process groups it talks through, the optimizer, random numbers and the launch
of local ranks. In goes a Program and batches, out comes a trained stage and a measured Timeline. It refuses to know how
a plan was chosen or what it was predicted to cost.
"""
