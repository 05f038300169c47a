"""Documents: the text files under the given paths, in one order for every machine."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from shardstage.errors import DataError

# Of the standard library: no tests, nothing installed into it, nothing that differs between builds.
_NOT_STDLIB_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
_NOT_STDLIB_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")


def find_documents(paths: Sequence[str]) -> tuple[Path, ...]:
    """Return the files of each path in turn, sorted within a folder or pattern, each file once.

    No path means the Python sources of the standard library. Hidden files and ``__pycache__`` are left out.
    Raises DataError for a path that does not exist or holds no file.
    """
    if not paths:
        return _standard_library(Path(sysconfig.get_path("stdlib")))
    found = (file for path in paths for file in _files_of(path))
    return tuple({file.resolve(): file for file in found}.values())


def read_documents(files: Sequence[Path]) -> Iterator[str]:
    """Yield the text of each file that is not empty. Raises DataError naming a file that is no UTF-8 text."""
    for file in files:
        text = _decode(file, _read(file))
        if text:
            yield text


def fingerprint_documents(files: Sequence[Path]) -> str:
    """Return a digest of the contents in their order, whatever the files are called and wherever they lie."""
    digest = hashlib.sha256()
    for file in files:
        content = _read(file)
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()[:32]


def _standard_library(root: Path) -> tuple[Path, ...]:
    files = tuple(
        file
        for file in _walk(root, without=_NOT_STDLIB_FOLDERS)
        if file.suffix == ".py" and not file.name.startswith(_NOT_STDLIB_FILES)
    )
    if not files:
        raise DataError(
            f"this Python has no sources of its standard library in {root}", hint='paths = ["my_texts/"]'
        )
    return files


def _files_of(path: str) -> tuple[Path, ...]:
    given = Path(path).expanduser()
    if given.is_dir():
        files = tuple(_walk(given))
    elif given.exists() or given.is_symlink():
        files = (given,)
    elif glob.has_magic(path):
        files = tuple(
            sorted(file for file in map(Path, glob.glob(str(given), recursive=True)) if file.is_file())
        )
    else:
        raise DataError(f"no file or folder {path!r} (seen from {Path.cwd()})", hint=f"ls {given.parent}")
    if not files:
        raise DataError(f"{path!r} matches no file", hint=f'paths = ["{given.parent}/**/*.txt"]')
    return files


def _walk(root: Path, *, without: Collection[str] = ()) -> list[Path]:
    """Files below ``root``, sorted by their parts. A broken link is kept, so that reading it names it."""
    skipped = {"__pycache__", *without}
    found = []
    for folder, folders, names in os.walk(root, onerror=_refuse_folder):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        files = (Path(folder, name) for name in names if not name.startswith("."))
        found += [file for file in files if file.is_file() or file.is_symlink()]
    return sorted(found)


def _refuse_folder(error: OSError) -> NoReturn:
    raise DataError(
        f"{error.filename} cannot be read: {error.strerror}", hint=f"chmod u+rx {error.filename}"
    ) from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", hint=f"ls -lL {file}") from error


def _decode(file: Path, content: bytes) -> str:
    hint = f'paths = ["{file.parent}/**/*.txt"]'
    if b"\0" in content:
        raise DataError(f"{file} is a binary file: it holds a NUL byte", hint=hint)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset {error.start}",
            hint=f"iconv -f LATIN1 -t UTF-8 {file} -o {file}.txt",
        ) from error
