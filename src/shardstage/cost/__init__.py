"""The price of an op, a collective, a stage and a step on a cluster.

Owns the folding of repeated blocks, the prices of compute, collectives and memory, and the model of a step's time. In go a ModelGraph and
a Cluster, out come seconds and bytes. It refuses to know plans: ``StepSetup`` holds the few numbers of one that a price depends on.
"""
