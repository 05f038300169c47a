"""``Task``: how a model and a batch become one summed loss, and which tensors such a batch holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardstage.errors import ConfigError

__all__ = ["InputSpec", "Task", "batch_task", "causal_task", "image_task", "masked_task", "seq2seq_task"]

IGNORED = -100  # torch.nn.functional.cross_entropy's default ignore_index

Size = int | Literal["microbatch", "sequence"]
Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """A tensor of the batch: its sizes, where "microbatch" and "sequence" stand for the sizes of a run, and its dtype.

    Integers are drawn below ``high`` where the model must be given real values.
    """

    shape: tuple[Size, ...]
    dtype: str = "int64"
    high: int = 2

    def sizes(self, microbatch: int, sequence: int | None) -> tuple[int, ...]:
        known = {"microbatch": microbatch, "sequence": sequence}
        sizes = tuple(size if isinstance(size, int) else known[size] for size in self.shape)
        if any(size is None for size in sizes):
            raise ConfigError("this model reads sequences, and no length is given", hint="sequence = 512")
        return tuple(size for size in sizes if size is not None)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a model is trained to do.

    ``loss(model, batch)`` is the *sum* of the losses of all targets of the batch (never the mean). ``objective`` names what the
    data must prepare: "causal" (labels shifted by one), "masked", "seq2seq", "images", or "custom".
    """

    objective: str
    inputs: Mapping[str, InputSpec]
    loss: Loss

    @property
    def has_sequence(self) -> bool:
        return any("sequence" in spec.shape for spec in self.inputs.values())

    def example_batch(self, microbatch: int, sequence: int | None = None) -> dict[str, Tensor]:
        """A batch of these sizes on "meta"."""
        return {
            name: torch.empty(
                spec.sizes(microbatch, sequence), dtype=getattr(torch, spec.dtype), device="meta"
            )
            for name, spec in self.inputs.items()
        }

    def random_batch(
        self, microbatch: int, sequence: int | None = None, *, seed: int = 0
    ) -> dict[str, Tensor]:
        """A batch of these sizes with values: integers below each input's ``high``, floats from a normal distribution."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: _random(spec, spec.sizes(microbatch, sequence), generator)
            for name, spec in self.inputs.items()
        }


def causal_task(vocab_size: int) -> Task:
    """Next token: the labels are the inputs shifted by one, which the data have done."""
    return _token_task("causal", vocab_size, _causal_loss)


def masked_task(vocab_size: int) -> Task:
    """Hidden tokens, from both sides."""
    return _token_task("masked", vocab_size, _plain_loss)


def seq2seq_task(vocab_size: int, *, start_id: int, pad_id: int) -> Task:
    """A sequence from a sequence of the same length; the decoder reads the labels shifted right, after ``start_id``."""

    return _token_task("seq2seq", vocab_size, partial(_seq2seq_loss, start_id=start_id, pad_id=pad_id))


def image_task(*, image_size: tuple[int, int], num_channels: int, num_classes: int) -> Task:
    """One class per image."""
    return Task(
        objective="images",
        inputs={
            "pixel_values": InputSpec(shape=("microbatch", num_channels, *image_size), dtype="float32"),
            "labels": InputSpec(shape=("microbatch",), high=num_classes),
        },
        loss=_plain_loss,
    )


def batch_task(loss: Loss, batch: Mapping[str, Tensor]) -> Task:
    """A task of the user's own: ``loss(model, batch)`` sums over targets; ``batch`` shows by example what it reads.

    Dim 0 of every tensor is the microbatch. The second dim of ``input_ids`` is the sequence, and so is every dim of that size.
    """
    ids = batch.get("input_ids")
    sequence = ids.shape[1] if ids is not None and ids.dim() > 1 else None
    return Task(
        objective="custom",
        inputs={name: _spec_of(tensor, sequence) for name, tensor in batch.items()},
        loss=loss,
    )


def _token_task(objective: str, vocab_size: int, loss: Loss) -> Task:
    tokens = InputSpec(shape=("microbatch", "sequence"), high=vocab_size)
    return Task(objective=objective, inputs={"input_ids": tokens, "labels": tokens}, loss=loss)


def _causal_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return _summed_cross_entropy(_logits(_apply(model, batch, use_cache=False)), batch["labels"])


def _plain_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return _summed_cross_entropy(_logits(_apply(model, batch)), batch["labels"])


def _seq2seq_loss(model: nn.Module, batch: Mapping[str, Tensor], *, start_id: int, pad_id: int) -> Tensor:
    labels = batch["labels"]
    start = labels.new_full((labels.shape[0], 1), start_id)
    shifted = torch.cat((start, labels[:, :-1]), dim=1)
    decoder_input_ids = shifted.masked_fill(shifted == IGNORED, pad_id)
    output = model(**_without_labels(batch), decoder_input_ids=decoder_input_ids, use_cache=False)
    return _summed_cross_entropy(_logits(output), labels)


def _apply(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Any:
    """The model's output for all of the batch but the labels: by name for one of transformers, in order for a plain module."""
    inputs = _without_labels(batch)
    return model(**inputs, **options) if hasattr(model, "config") else model(*inputs.values())


def _summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ over targets of -log softmax(logits)[label], in float32 at least.  logits: [..., V], labels: [...]"""
    is_narrow = torch.finfo(logits.dtype).bits < 32
    scores = logits.float() if is_narrow else logits
    return F.cross_entropy(scores.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=IGNORED)


def _logits(output: Any) -> Tensor:
    """A model's output is its logits, has them, or has them first."""
    if isinstance(output, Tensor):
        return output
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


def _without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _spec_of(tensor: Tensor, sequence: int | None) -> InputSpec:
    sizes: list[Size] = ["sequence" if size == sequence else size for size in tensor.shape]
    dtype = str(tensor.dtype).removeprefix("torch.")
    return InputSpec(shape=("microbatch", *sizes[1:]), dtype=dtype)


def _random(spec: InputSpec, sizes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator, dtype=dtype)
    return torch.randint(spec.high, sizes, generator=generator).to(dtype)
