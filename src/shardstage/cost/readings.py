"""``Readings``: what a model's graphs were read to, sharded in one way after the other, kept from one run to the next.

Sharding a graph and reading its kernels depends on the model and on how it is cut, not on the cluster, the batch or the memory limit. So
they are kept beside the model's capture (``graph.cache``), and a second search over the same model takes them from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from shardstage.cost.kernels import Kernel
from shardstage.cost.reading import Again, Attention, Bytes, Kept, Work
from shardstage.graph.cache import code_digest, write_whole

__all__ = ["Read", "Readings"]


class Read(NamedTuple):
    """One sharding: its kept units at any microbatch, local sizes of parameters that several of them use, and the FLOPs of one sample's
    forward on all ranks together."""

    works: tuple[Work, ...]
    shared_elements: dict[str, int]
    whole_flops: float


class Readings:
    """What was read of one model, by the way in which it was sharded; in a file where there is a path for it."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known = {} if path is None else _from_file(path)
        self._is_new = False

    def find(self, key: str, read: Callable[[], Read]) -> Read:
        """What is known by this key, or is read now."""
        if key not in self._known:
            self._known[key] = read()
            self._is_new = True
        return self._known[key]

    def keep(self) -> None:
        """Writes what was added into the file; a folder that cannot be written to costs the next run its time and nothing else."""
        if self._path is None or not self._is_new:
            return
        try:
            write_whole(self._path, json.dumps({"code": _own_code(), "read": self._known}))
            self._is_new = False
        except OSError:
            return


def _from_file(path: Path) -> dict[str, Read]:
    """Nothing where the file is not there, is damaged, or was written by other code."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if entries["code"] != _own_code():
            return {}
        return {key: _read(*fields) for key, fields in entries["read"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


@lru_cache(maxsize=1)
def _own_code() -> str:
    """A digest of the code that cuts, shards and reads graphs."""
    package = Path(__file__).parents[1]
    return code_digest(*(package / folder for folder in ("graph", "sharding", "cost", "cluster")))


def _read(works: Sequence[Any], shared_elements: dict[str, int], whole_flops: float) -> Read:
    return Read(tuple(_work(Work(*fields)) for fields in works), shared_elements, whole_flops)


def _work(plain: Work) -> Work:
    """With the types that JSON does not know."""
    return plain._replace(
        kernels=_kernels(plain.kernels),
        num_kernels=(plain.num_kernels[0], plain.num_kernels[1]),
        calls=_calls(plain.calls),
        input_bytes=Bytes(*plain.input_bytes),
        working_sets=_all_bytes(plain.working_sets),
        shared=tuple(plain.shared),
        kept={mode: _kept(Kept(*fields)) for mode, fields in plain.kept.items()},
        dispatched=Bytes(*plain.dispatched),
        attention=tuple(
            Attention(Bytes(*keys), Bytes(*whole), num_heads) for keys, whole, num_heads in plain.attention
        ),
    )


def _kept(plain: Kept) -> Kept:
    again = plain.again and Again(_kernels(plain.again[0]), _calls(plain.again[1]))
    return plain._replace(saved=Bytes(*plain.saved), extras=_all_bytes(plain.extras), again=again)


def _kernels(plain: Sequence[Any]) -> tuple[Kernel, ...]:
    return tuple(Kernel(*fields) for fields in plain)


def _calls(plain: Sequence[Any]) -> Any:
    return tuple((kind, is_backward, Bytes(*moved)) for kind, is_backward, moved in plain)


def _all_bytes(plain: Sequence[Any]) -> tuple[Bytes, ...]:
    return tuple(Bytes(*each) for each in plain)
