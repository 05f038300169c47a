"""Reads the safetensors files of a Hugging Face folder straight into shards."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shardstage.errors import CheckpointError
from shardstage.layout import Placement, Shard

__all__ = ["stream_safetensors"]

_log = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"


def stream_safetensors(
    folder: Path,
    model: nn.Module,
    wanted: Mapping[str, Placement],
    *,
    tp_rank: int,
    dtype: torch.dtype | None = torch.float32,
) -> Iterator[tuple[str, Tensor]]:
    """Yields (fqn, this rank's shard) of each wanted parameter of ``model``, reading no other rows and columns of the files.

    ``model`` may lie on meta: only its names and shapes are used. A tensor may be stored under any of its tied names, with or without the
    model's base prefix. Raises CheckpointError where names or shapes of the files do not fit the model.
    """
    files = _files(folder)
    names = _stored_names(model, files)
    _refuse_missing(folder, [fqn for fqn in wanted if fqn not in names])
    _refuse_foreign(folder, model, set(files) - set(names.values()))
    shapes = {fqn: tuple(p.shape) for fqn, p in model.named_parameters(remove_duplicate=False)}
    for fqn, placement in wanted.items():
        with _opened(files[names[fqn]]) as file:
            stored = file.get_slice(names[fqn])
            if tuple(stored.get_shape()) != shapes[fqn]:
                raise CheckpointError(
                    f"{names[fqn]} in {files[names[fqn]].name} has shape {tuple(stored.get_shape())}, the model wants {shapes[fqn]}",
                    hint=f"use the config.json of {folder}",
                )
            local = _read(stored, placement, tp_rank)
        yield fqn, local if dtype is None or not local.is_floating_point() else local.to(dtype)


def _read(stored: Any, placement: Placement, tp_rank: int) -> Tensor:
    if not isinstance(placement, Shard):
        whole: Tensor = stored[...]
        return whole
    before = (slice(None),) * placement.dim
    return torch.cat(
        [stored[(*before, slice(start, stop))] for start, stop in placement.intervals(tp_rank)],
        dim=placement.dim,
    )


def _files(folder: Path) -> dict[str, Path]:
    """Where each stored tensor lies."""
    if (folder / _INDEX).is_file():
        weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with _opened(path) as file:
            found.update(dict.fromkeys(file.keys(), path))
    if not found:
        raise CheckpointError(
            f"no safetensors files in {folder}",
            hint='model.save_pretrained(folder), or "hf download <name> --local-dir <folder>"',
        )
    return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="download the file again") from error


def _stored_names(model: nn.Module, files: Mapping[str, Path]) -> dict[str, str]:
    """The stored name of each parameter and buffer, by every name that the model has for it; absent where there is none."""
    tied: dict[int, list[str]] = {}
    for fqn, tensor in _tensors(model):
        tied.setdefault(id(tensor), []).append(fqn)
    prefix = getattr(model, "base_model_prefix", "")
    found: dict[str, str] = {}
    for fqns in tied.values():
        spellings = [spelling for fqn in fqns for spelling in _spellings(fqn, prefix)]
        stored = next((name for name in spellings if name in files), None)
        if stored is not None:
            found.update(dict.fromkeys(fqns, stored))
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _spellings(fqn: str, prefix: str) -> tuple[str, ...]:
    return (fqn, fqn.removeprefix(f"{prefix}."), f"{prefix}.{fqn}") if prefix else (fqn,)


def _refuse_missing(folder: Path, missing: list[str]) -> None:
    if missing:
        raise CheckpointError(
            f"{folder} has no tensor for {len(missing)} of the model's parameters: {_some(missing)}",
            hint=f"--model {folder}; if it is its model, and transformers renames its tensors on loading: "
            "--model file.py:factory, where factory calls from_pretrained",
        )


def _refuse_foreign(folder: Path, model: nn.Module, extra: set[str]) -> None:
    """Refuses stored tensors that belong to a module which the model has, or to a list of layers which it has shorter.

    What belongs to a part that the model lacks altogether, such as another task's head, is left out and logged.
    """
    prefix = getattr(model, "base_model_prefix", "")
    ignored = [
        re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    ]
    ties = set(getattr(model, "_tied_weights_keys", None) or ())
    extra = {name for name in extra if name not in ties and not any(p.search(name) for p in ignored)}
    modules = {spelling for name, _ in model.named_modules() for spelling in _spellings(name, prefix)}
    foreign = sorted(name for name in extra if _parent(name) in modules or _is_further_layer(name, modules))
    if foreign:
        raise CheckpointError(
            f"{folder} holds {len(foreign)} tensors that the model has no place for: {_some(foreign)}",
            hint=f"use the model that {folder}/config.json describes",
        )
    if extra:
        _log.warning(
            "%s also holds tensors of parts that the model lacks, left out: %s", folder, _some(sorted(extra))
        )


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_further_layer(name: str, modules: set[str]) -> bool:
    parts = name.split(".")
    return any(
        part.isdigit() and ".".join(parts[:i]) in modules and ".".join(parts[: i + 1]) not in modules
        for i, part in enumerate(parts)
        if i
    )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", …" if len(listed) > 3 else "")
