"""``samples_of``: the data set that a run trains on."""

from __future__ import annotations

from typing import get_args

from shardstage.data import (
    DataConfig,
    Objective,
    PackedText,
    RandomSamples,
    SampleSource,
    TensorSpec,
    as_source,
)
from shardstage.errors import ConfigError, DataError
from shardstage.graph.source import ModelSource, import_object

__all__ = ["RANDOM", "reads_text", "samples_of"]

RANDOM = "random"
"""Of ``DataConfig.samples``: no data set, but tensors of the shapes that the model reads."""


def reads_text(source: ModelSource) -> bool:
    """Whether packed text is what the model is trained on."""
    return source.task.objective in get_args(Objective)


def samples_of(config: DataConfig, source: ModelSource) -> SampleSource:
    """The run's own data set, random tensors, or text.

    Raises DataError for a data set that cannot be imported or text that cannot be read, ConfigError where a model that reads no text is
    given no data set.
    """
    if config.samples == RANDOM:
        return _random_samples(config, source)
    if config.samples:
        return _imported(config.samples)
    if not reads_text(source):
        raise ConfigError(
            f"{source.name} is trained on {source.task.objective} data, and the run names none",
            hint='[data] samples = "my_data.py:dataset"  # or samples = "random"',
        )
    return PackedText.from_config(config)


def _imported(spec: str) -> SampleSource:
    found = import_object(spec, what="data set")
    made = found() if callable(found) and not hasattr(found, "__getitem__") else found
    if not isinstance(made, SampleSource) and not (hasattr(made, "__len__") and hasattr(made, "__getitem__")):
        raise DataError(
            f"{spec} is a {type(made).__name__}, which has no length or cannot be indexed",
            hint="a list of dicts of tensors, or a torch.utils.data.Dataset with a length",
        )
    return as_source(made)


def _random_samples(config: DataConfig, source: ModelSource) -> RandomSamples:
    specs = {
        name: TensorSpec(spec.sizes(1, config.sequence)[1:], spec.dtype, spec.high)
        for name, spec in source.task.inputs.items()
    }
    return RandomSamples(specs, seed=config.seed)
