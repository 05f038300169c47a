"""What a run says about its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from shardstage.errors import DataError

Objective = Literal["causal", "masked", "seq2seq"]
Split = Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, cut how; or, with ``samples``, which other data set.

    ``samples`` names an indexable of dicts of tensors as ``module:name`` or ``file.py:name`` (the object, or a function that makes it), or
    is ``random``: tensors drawn at random in the shapes that the model reads, enough to prove and to time a run.
    ``paths`` are files, folders or glob patterns; none means the sources of Python's standard library.
    ``sequence`` is the number of tokens in a sample; ``seed`` draws the masks of the masked objective;
    ``validation_ratio`` of the samples, evenly spaced, are kept out of training.
    """

    paths: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    objective: Objective = "causal"
    sequence: int = 128
    seed: int = 0
    validation_ratio: float = 0.0
    samples: str = ""

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise DataError(f"objective {self.objective!r} is not known", hint='objective = "causal"')
        if self.sequence < 1:
            raise DataError(f"a sequence of {self.sequence} tokens cannot be trained on", hint="--seq 128")
        if self.seed < 0:
            raise DataError(f"the seed {self.seed} is negative", hint=f"seed = {-self.seed}")
        if not 0.0 <= self.validation_ratio < 1.0:
            raise DataError(
                f"validation_ratio {self.validation_ratio} leaves nothing to train on: it must be in [0, 1)",
                hint="validation_ratio = 0.05",
            )
