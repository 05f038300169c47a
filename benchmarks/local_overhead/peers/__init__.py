"""The torch-native ways to do what we do: one file each, ``build(workload, rank, size) -> Step``, over stock gloo.

Each is written as its tutorial in PyTorch's documentation writes it, with the choices of somebody who knows it well. They know
nothing of shardstage.
"""
