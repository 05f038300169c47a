"""What is computed: a model as one flat list of operators over named values.

Owns ``ModelGraph`` and its capture from an unmodified ``nn.Module``. In goes a model (or a factory) and an example batch, out
comes plain data that needs neither torch nor the model to be read. It refuses to know how many devices there are.

``capture`` and what else needs torch live in ``shardstage.graph.capture``; the types here import without torch.
"""

from shardstage.graph.model_graph import Constant, ModelGraph, Op, Parameter, Ref, Value, refs_in, substitute

__all__ = ["Constant", "ModelGraph", "Op", "Parameter", "Ref", "Value", "refs_in", "substitute"]
