"""Every error that Shardstage raises on purpose.

    ShardstageError
    ├── CaptureError        a model cannot be captured as a graph
    ├── ClusterError        a cluster description is wrong or cannot be read
    ├── PlanError           a plan does not fit the model, the cluster or the ranks
    ├── ConfigError         a run file, flag or model name is wrong
    ├── DataError           data is missing, unreadable or too short
    ├── CheckpointError     a checkpoint cannot be written, read or does not match
    ├── ProgramError        a program breaks one of its invariants
    ├── ParityError         a run is not equal to a single device's
    └── RankFailedError     a rank died, hung or diverged

A message says what is wrong and why; ``hint`` is something the user can paste.
"""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "CheckpointError",
    "ClusterError",
    "ConfigError",
    "DataError",
    "ParityError",
    "PlanError",
    "ProgramError",
    "RankFailedError",
    "ShardstageError",
]


class ShardstageError(Exception):
    """Base of all errors meant for the user; the command line prints it in one line and exits with 2.

    ``hint`` is keyword-only text that can be pasted into a shell, a run file or a program.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.hint)


class CaptureError(ShardstageError):
    """A model cannot be captured as a graph."""


class ClusterError(ShardstageError):
    """A cluster description is wrong or cannot be read."""


class PlanError(ShardstageError):
    """A plan does not fit the model, the cluster or the number of ranks."""


class ConfigError(ShardstageError):
    """A run file, a command-line value or a model name is wrong."""


class DataError(ShardstageError):
    """Data is missing, unreadable or too short."""


class CheckpointError(ShardstageError):
    """A checkpoint cannot be written or read, or was made from another model."""


class ProgramError(ShardstageError):
    """A program breaks one of its invariants."""


class ParityError(ShardstageError):
    """A distributed run is not equal to the run of a single device."""


class RankFailedError(ShardstageError):
    """A rank died, hung or left its peers' sequence of collectives."""


def _rebuild(kind: type[ShardstageError], message: str, hint: str | None) -> ShardstageError:
    return kind(message, hint=hint)
