"""``class_shares``: what each class of devices does of a step, and what it holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardstage.planner.mixed.lanes import classes_of_stages
from shardstage.planner.mixed.priced import MixedPriced
from shardstage.planner.mixed.pricing import MixedPricing

__all__ = ["ClassShare", "class_shares", "layers_by_class"]


@dataclass(frozen=True, kw_only=True)
class ClassShare:
    """What a class of devices does: ``num_layers`` of a pipeline's (units, of a model without layers), ``num_samples`` of a step.

    ``peak_bytes`` are those of its fullest rank, of ``limit_bytes``; of ``num_devices`` so many are used.
    """

    name: str
    num_devices: int
    num_used: int
    num_layers: int
    num_samples: int
    peak_bytes: int
    limit_bytes: int


def class_shares(pricing: MixedPricing, priced: MixedPriced, limits: Sequence[int]) -> Iterator[ClassShare]:
    """Of each class of the cluster, in its order."""
    of = priced.choice.arrangement
    layers, samples = layers_by_class(pricing, priced), of.samples(pricing.global_batch)
    for number, part in enumerate(pricing.cluster.parts):
        yield ClassShare(
            name=part.device.name,
            num_devices=part.num_devices,
            num_used=of.used[number],
            num_layers=layers[number],
            num_samples=samples[number],
            peak_bytes=priced.peaks[number],
            limit_bytes=limits[number],
        )


def layers_by_class(pricing: MixedPricing, priced: MixedPriced) -> list[int]:
    """How many layers lie on each class: those that begin there; units, of a model without layers."""
    setup, layers = priced.setup, pricing.folded.layers
    stops, found = (*setup.starts[1:], pricing.num_units), [0] * len(pricing.costs.classes)
    has_layers = any(layer >= 0 for layer in layers)
    for lane in priced.choice.arrangement.lanes:
        for number, start, stop in zip(classes_of_stages(lane, setup), setup.starts, stops, strict=True):
            units = range(start, stop)
            found[number] += sum(
                not has_layers or (layers[unit] >= 0 and (not unit or layers[unit - 1] != layers[unit]))
                for unit in units
            )
    return found
