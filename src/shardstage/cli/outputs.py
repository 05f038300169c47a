"""Files that a verb is asked to write: what cannot be there is refused before anything has taken time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from shardstage.errors import ConfigError

__all__ = ["require_endings", "require_folder", "write_text"]


def require_endings(paths: Iterable[Path], endings: Mapping[str, str]) -> None:
    """Refuses a file of which its ending does not say what is to be in it, or that has no folder."""
    for path in paths:
        if path.suffix not in endings:
            known = ", ".join(f"{ending} ({what})" for ending, what in endings.items())
            raise ConfigError(
                f"--out {path}: a file ends in {known}",
                hint=f"--out {path.stem or 'out'}{next(iter(endings))}",
            )
        require_folder(path)


def require_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: there is no folder {path.parent}", hint=f"mkdir -p {path.parent}")


def write_text(path: Path, text: str, *, option: str = "--out") -> None:
    """``ConfigError`` that names the option where the file cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}", hint=f"{option} other{path.suffix}"
        ) from error
