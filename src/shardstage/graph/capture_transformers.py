"""What Hugging Face models do differently under tracing, undone: the graph shall be the model that runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["as_untraced"]


@contextmanager
def as_untraced(model: nn.Module, inputs: Collection[str]) -> Iterator[None]:
    """While entered, a ``transformers`` model takes the branches that it takes when nobody traces it.

    Under tracing it builds every attention mask in full, where its eager forward passes ``is_causal=True`` or nothing: without a
    padding mask among the ``inputs`` the plain masks are left out here too, those with a window or any other pattern are not.
    It also looks for packed sequences in position ids, which without such an input are 0, 1, 2, … . No config is changed.
    """
    if "transformers" not in sys.modules or "attention_mask" in inputs or not hasattr(model, "config"):
        yield
        return
    from transformers import AttentionMaskInterface, masking_utils

    original = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    detect = getattr(masking_utils, "find_packed_sequence_indices", None)
    AttentionMaskInterface.register("sdpa", _unless_plain(original))
    if detect is not None and "position_ids" not in inputs:
        masking_utils.find_packed_sequence_indices = _no_packing
    try:
        yield
    finally:
        AttentionMaskInterface.register("sdpa", original)
        if detect is not None:
            masking_utils.find_packed_sequence_indices = detect


def _unless_plain(build_mask: Callable[..., Any]) -> Callable[..., Any]:
    def mask(*args: Any, **options: Any) -> Any:
        return None if _is_plain(**options) else build_mask(*args, **options)

    return mask


def _is_plain(
    *,
    q_length: int | None = None,
    kv_length: int | None = None,
    q_offset: int = 0,
    attention_mask: Any = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **_: Any,
) -> bool:
    """Whether the eager forward would do without this mask, by the conditions of ``transformers.masking_utils``."""
    if attention_mask is not None or (
        local_size is not None and kv_length is not None and kv_length >= local_size
    ):
        return False
    is_causal = allow_is_causal_skip and q_length is not None and q_length in (1, kv_length) and q_offset == 0
    return is_causal or allow_is_bidirectional_skip


def _no_packing(position_ids: Any) -> None:
    """No two samples share a row."""
