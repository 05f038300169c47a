"""``library``: the callable of every ``shardstage.*`` target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from shardstage.operators import conversions, dropout, moves, vocabulary, weight_gradients
from shardstage.operators.context import OperatorContext
from shardstage.operators.seeded import seeded

__all__ = ["library"]


def library(context: OperatorContext) -> Mapping[str, Callable[..., Any]]:
    """The operators by target, as this rank runs them: they take the arguments that a local graph writes."""
    alone: dict[str, Callable[..., Any]] = {
        "embedding": vocabulary.embedding,
        "narrow": moves.take,
        "select_heads": conversions.select_heads,
    }
    together: dict[str, Callable[..., Any]] = {
        "addmm_weight": weight_gradients.addmm,
        "all_gather": conversions.all_gather,
        "all_reduce": conversions.all_reduce,
        "attention": dropout.attention,
        "cross_entropy": vocabulary.cross_entropy,
        "dropout": dropout.dropout,
        "gather_whole": conversions.gather_whole,
        "linear_weight": weight_gradients.linear,
        "matmul_weight": weight_gradients.matmul,
        "reduce_scatter": conversions.reduce_scatter,
        "seeded": seeded,
        "slice": conversions.slice_whole,
        "sum_gradient": conversions.sum_gradient,
    }
    bound = {name: partial(function, context) for name, function in together.items()}
    return MappingProxyType({f"shardstage.{name}": call for name, call in (alone | bound).items()})
