"""``export_hf``: a checkpoint as a folder that ``transformers`` loads, written one tensor at a time."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from shardstage.checkpoint.agreement import as_checkpoint_error
from shardstage.checkpoint.entry import StateEntry
from shardstage.checkpoint.load import CheckpointReader, find_checkpoint
from shardstage.checkpoint.safetensors_file import StoredTensor, write_safetensors
from shardstage.errors import CheckpointError
from shardstage.graph.skeleton import build_skeleton
from shardstage.layout import Replicate
from shardstage.units import GIB

if TYPE_CHECKING:
    from shardstage.graph.source import ModelSource

__all__ = ["check_export_folder", "export_hf"]

_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def export_hf(
    folder: str | Path,
    source: ModelSource,
    out: str | Path,
    *,
    step: int | Literal["latest"] = "latest",
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = 4 * GIB,
) -> Path:
    """Writes the model of a checkpoint in ``folder`` to ``out``, which ``from_pretrained`` of its class loads; returns ``out``.

    Holds one tensor at a time. Floating tensors are written in ``dtype`` (None: as in the checkpoint), tied ones once, as transformers
    does. ``tokenizer`` is the folder (or the tokenizer.json) of a Hugging Face tokenizer, copied beside. ``out`` appears when it is
    complete. Not collective: one rank calls it. Raises CheckpointError where ``source`` is no Hugging Face model or not that of the
    checkpoint, where ``out`` exists, or where it cannot be written.
    """
    out = Path(out)
    check_export_folder(out)
    reader = CheckpointReader(find_checkpoint(Path(folder), step))
    model = build_skeleton(source.factory)
    if not hasattr(model, "config") or not hasattr(model.config, "save_pretrained"):
        raise CheckpointError(
            f"{type(model).__name__} is no Hugging Face model, so it has no such folder",
            hint=f"read the tensors from {reader.path} with torch.distributed.checkpoint",
        )
    tensors = list(_tensors(model, reader, dtype))
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_settings(partial, model, dtype or _floating_dtype(tensors))
        _copy_tokenizer(partial, tokenizer)
        _write_tensors(partial, tensors, max_shard_bytes)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise as_checkpoint_error(error, f"the model cannot be exported to {out}") from error
    return out


def check_export_folder(out: str | Path) -> None:
    """Raises CheckpointError where ``out`` already holds something: call it before a long run, not after."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already, and an export replaces nothing", hint=f"{out}-2")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Exported:
    """A tensor under the name that transformers gives it, and how to get its value."""

    stored: StoredTensor
    read: Callable[[], Tensor]


def _tensors(model: nn.Module, reader: CheckpointReader, dtype: torch.dtype | None) -> Iterator[_Exported]:
    """Every tensor of the model's state once, in its order."""
    for names, tensor in _tied_names(model).items():
        key = next(
            (
                f"{kind}.{name}"
                for kind in ("model", "buffer")
                for name in names
                if f"{kind}.{name}" in reader.tensors
            ),
            None,
        )
        stored = tuple(tensor.shape) if key is None else tuple(reader.tensors[key].size)
        is_value_known = key is not None or not (isinstance(tensor, nn.Parameter) or tensor.is_meta)
        if not is_value_known or stored != tuple(tensor.shape):
            raise CheckpointError(
                f"{reader.path} is of another model: it has no {names[0]} of shape {tuple(tensor.shape)}",
                hint="export with the model that was trained",
            )
        yield _exported(_written_name(model, names), tensor, key, reader, dtype)


def _exported(
    name: str, tensor: Tensor, key: str | None, reader: CheckpointReader, dtype: torch.dtype | None
) -> _Exported:
    own_dtype = tensor.dtype if key is None else reader.tensors[key].properties.dtype
    written = dtype if dtype is not None and own_dtype.is_floating_point else own_dtype
    shape = tuple(tensor.shape)

    def read() -> Tensor:
        if key is None:
            return tensor.detach().to(written)
        whole = torch.empty(shape, dtype=own_dtype)
        entry = StateEntry(key=key, tensor=whole, global_shape=shape, placement=Replicate(), tp_rank=0)
        reader.read([entry])
        return whole.to(written)

    return _Exported(stored=StoredTensor(name=name, shape=shape, dtype=written), read=read)


def _tied_names(model: nn.Module) -> Mapping[tuple[str, ...], Tensor]:
    """Each tensor of ``state_dict`` (buffers that are not saved left out) with all its names."""
    saved = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in saved.items():
        names.setdefault(id(tensor), []).append(name)
    return {tuple(found): saved[found[0]] for found in names.values()}


def _written_name(model: nn.Module, names: tuple[str, ...]) -> str:
    """Of tied names, the one that is not declared a copy of another (``all_tied_weights_keys`` of transformers 5, a list before)."""
    copies = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ()
    return next((name for name in names if name not in copies), names[0])


def _floating_dtype(tensors: list[_Exported]) -> torch.dtype:
    dtypes = (exported.stored.dtype for exported in tensors)
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _write_settings(out: Path, model: Any, dtype: torch.dtype) -> None:
    """config.json, and generation_config.json where the model generates."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(out)
    generation_config = getattr(model, "generation_config", None)
    if generation_config is not None and model.can_generate():
        generation_config.save_pretrained(out)


def _copy_tokenizer(out: Path, tokenizer: str | Path | None) -> None:
    if tokenizer is None:
        return
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


def _write_tensors(out: Path, tensors: list[_Exported], max_shard_bytes: int) -> None:
    shards = _shards(tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        write_safetensors(
            out / file, [exported.stored for exported in shard], (exported.read() for exported in shard)
        )
        weight_map.update({exported.stored.name: file for exported in shard})
    if len(shards) > 1:
        total_bytes = sum(exported.stored.num_bytes for exported in tensors)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )


def _shards(tensors: list[_Exported], max_shard_bytes: int) -> list[list[_Exported]]:
    """Runs of tensors of at most ``max_shard_bytes``; a larger tensor has a file of its own."""
    shards: list[list[_Exported]] = [[]]
    filled_bytes = 0
    for exported in tensors:
        if shards[-1] and filled_bytes + exported.stored.num_bytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(exported)
        filled_bytes += exported.stored.num_bytes
    return shards
