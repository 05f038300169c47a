"""What ``torch.distributed.checkpoint`` is to write and read: the boxes of the entries of a rank."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    DefaultSavePlanner,
    LoadPlan,
    LoadPlanner,
    Metadata,
    ReadItem,
    SavePlan,
    TensorStorageMetadata,
    WriteItem,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from shardstage.checkpoint.entry import StateEntry
from shardstage.layout.boxes import Box

__all__ = ["BoxLoadPlanner", "BoxSavePlanner"]

Boxes = dict[MetadataIndex, tuple[StateEntry, Box, Tensor]]


class BoxSavePlanner(DefaultSavePlanner):
    """Every box of every entry; a box that several ranks hold is written by the one that has least to write."""

    def __init__(self, entries: Iterable[StateEntry]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._entries = entries
        self._boxes: Boxes = {}

    def create_local_plan(self) -> SavePlan:
        self._boxes = _boxes(self._entries)
        self.plan = SavePlan([_write_item(index, *held) for index, held in self._boxes.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._boxes[index][2]


class BoxLoadPlanner(LoadPlanner):
    """Reads, for every box of every entry, what the boxes on disk have of it: they may be cut otherwise."""

    def __init__(self, entries: Iterable[StateEntry]) -> None:
        self._entries = entries
        self._boxes: Boxes = {}
        self._metadata: Metadata | None = None

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        self._boxes = _boxes(self._entries)
        return LoadPlan(
            [item for index, (_, box, _) in self._boxes.items() for item in self._reads(index, box)]
        )

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError(f"{read_item.dest_index.fqn} is no tensor, and only tensors are asked for")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self._boxes[read_item.dest_index][2]
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, offset, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: what was resolved is the entry's own memory."""

    def _reads(self, index: MetadataIndex, box: Box) -> list[ReadItem]:
        assert self._metadata is not None
        stored = self._metadata.state_dict_metadata[index.fqn]
        assert isinstance(stored, TensorStorageMetadata)
        reads = create_read_items_for_chunk_list(index.fqn, stored, [_extent(box)])
        if sum(item.lengths.numel() for item in reads) != box.numel:
            raise ValueError(f"not all of {index.fqn} is stored")
        return reads


def _boxes(entries: Iterable[StateEntry]) -> Boxes:
    return {
        MetadataIndex(entry.key, torch.Size(box.offsets)): (entry, box, view)
        for entry in entries
        for box, view in entry.views()
    }


def _write_item(index: MetadataIndex, entry: StateEntry, box: Box, view: Tensor) -> WriteItem:
    return WriteItem(
        index=index,
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_extent(box),
            properties=TensorProperties(dtype=view.dtype),
            size=torch.Size(entry.global_shape),
        ),
    )


def _extent(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))
