"""Ops that draw random numbers in a way of their own: made to draw the same on every rank that runs them whole."""

from __future__ import annotations

from dataclasses import replace

from shardstage.graph import Op
from shardstage.sharding.call import LocalCall

__all__ = ["draws_otherwise", "rewrite_seeded"]

_DRAWING = frozenset(
    f"aten.{name}"
    for name in (
        "alpha_dropout.default bernoulli.default bernoulli.p feature_alpha_dropout.default feature_dropout.default "
        "multinomial.default native_dropout.default normal.Tensor_Tensor normal_functional.default rand.default rand_like.default "
        "randint.default randint.low randint_like.default randint_like.low_dtype randn.default randn_like.default randperm.default "
        "rrelu.default rrelu_with_noise.default uniform.default"
    ).split()
)

_RECURRENT = frozenset(f"aten.{name}.input" for name in ("gru", "lstm", "rnn_relu", "rnn_tanh"))

_RECURRENT_DROPOUT, _RECURRENT_TRAIN = 5, 6
"""Positions of ``dropout`` and ``train`` among the arguments of a recurrent layer."""


def draws_otherwise(op: Op) -> bool:
    """Whether the op draws random numbers inside; recurrent layers do where they drop out between layers."""
    if op.target in _RECURRENT:
        return bool(op.args[_RECURRENT_TRAIN] and op.args[_RECURRENT_DROPOUT] > 0)
    return op.target in _DRAWING


def rewrite_seeded(call: LocalCall) -> tuple[Op, ...]:
    """``shardstage.seeded(target, ordinal, the op's own arguments)``."""
    args = (call.op.target, call.random_ordinal, *call.op.args)
    return (replace(call.op, target="shardstage.seeded", args=args),)
