"""``cached``: a capture is made once for a model, a length and a dtype, and read from the user's cache folder from then on.

    $SHARDSTAGE_CACHE (off: none), else $XDG_CACHE_HOME/shardstage, else ~/.cache/shardstage
        captures/<key>.graph        a line of JSON about the capture, then the graph in short
        captures/<key>.readings     what the graph was read to, sharded in one way after the other (``cost.readings``)
        cluster-<key>.toml          how this machine was measured (``cli.machine``)

The key covers all that a capture depends on: the config's bytes or the built-in name, length, dtype, this package's own code and the
versions of torch and transformers. A ``module:factory`` may depend on any code, which no key can cover: it is captured every time.
Needs neither torch nor the model where the capture is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

from shardstage.errors import CaptureError
from shardstage.graph.blocks import Block
from shardstage.graph.file import graph_from_json, graph_to_json
from shardstage.graph.model_graph import ModelGraph
from shardstage.graph.unfold import Repeat, ShortGraph

__all__ = [
    "Captured",
    "cache_folder",
    "cached",
    "capture_key",
    "code_digest",
    "is_cacheable",
    "readings_path",
    "write_whole",
]


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A model's graph in short, and the longest sequence that the model has positions for (None: no limit).

    ``blocks`` and ``fingerprint`` are those of the whole graph where they are known already.
    """

    short: ShortGraph
    max_sequence: int | None = None
    blocks: tuple[Block, ...] = field(default=(), compare=False)
    fingerprint: str = field(default="", compare=False)

    def unfold(self) -> ModelGraph:
        """The whole graph, which need not be asked again for what is known."""
        graph = self.short.unfold()
        if self.fingerprint:
            vars(graph).update(blocks=self.blocks, fingerprint=self.fingerprint)
        return graph


def cached(
    spec: str, *, sequence: int, dtype: str, capture: Callable[[], Captured]
) -> tuple[Captured, tuple[str, ...]]:
    """The capture of the model that ``spec`` names, made by ``capture`` where it is not yet in the cache; and notes for the user."""
    folder, key = cache_folder(), capture_key(spec, sequence=sequence, dtype=dtype)
    if folder is None or key is None:
        return capture(), ()
    path = folder / "captures" / f"{key}.graph"
    notes: list[str] = []
    try:
        return from_text(path.read_text(encoding="utf-8")), ()
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError, CaptureError) as error:
        reason = (
            error.message if isinstance(error, CaptureError) else error
        )  # the note says what is done, no hint
        notes.append(f"the cached capture {path} cannot be read, and is made again: {reason}")
    captured = capture()
    try:
        write_whole(path, to_text(captured))
    except OSError as error:
        notes.append(f"the capture is not kept for the next time: {error} (SHARDSTAGE_CACHE names a folder)")
    return captured, tuple(notes)


def cache_folder() -> Path | None:
    """Where captures and the measurement of this machine are kept; None where the user wants none."""
    chosen = os.environ.get("SHARDSTAGE_CACHE", "")
    if chosen.lower() in ("off", "0", "none"):
        return None
    if chosen:
        return Path(chosen).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if shared else Path.home() / ".cache") / "shardstage"


def is_cacheable(spec: str) -> bool:
    """Whether a capture of the model of that name is kept."""
    return cache_folder() is not None and _content(spec) is not None


def capture_key(spec: str, *, sequence: int, dtype: str) -> str | None:
    """Names the capture by all that it depends on; None where that cannot be known."""
    content = _content(spec)
    if content is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for part in (json.dumps([spec, sequence, dtype, *_versions()]).encode(), content):
        digest.update(part)
        digest.update(b"\0")
    return digest.hexdigest()


def _content(spec: str) -> bytes | None:
    """The bytes of a model's config, none of a built-in name's; None for code, of which nobody knows what else it reads."""
    path = Path(spec).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return path.read_bytes()
    return None if ":" in spec or "/" in spec else b""


def readings_path(spec: str, *, sequence: int, dtype: str) -> Path | None:
    """Where readings of the model's graph are kept; None where it has no capture."""
    folder, key = cache_folder(), capture_key(spec, sequence=sequence, dtype=dtype)
    return None if folder is None or key is None else folder / "captures" / f"{key}.readings"


def to_text(captured: Captured) -> str:
    """The capture as a line about it, with a digest of the rest, and its graph."""
    graph, whole = graph_to_json(captured.short.graph), captured.unfold()
    about = {
        "digest": _digest(graph),
        "fingerprint": whole.fingerprint,
        "blocks": [asdict(block) for block in whole.blocks],
        "max_sequence": captured.max_sequence,
        "repeats": [asdict(repeat) for repeat in captured.short.repeats],
    }
    return f"{json.dumps(about)}\n{graph}"


def from_text(text: str) -> Captured:
    """The capture of ``to_text``. Raises CaptureError for any other text."""
    line, _, graph = text.partition("\n")
    try:
        about = json.loads(line)
        if about["digest"] != _digest(graph):
            raise CaptureError("the file is damaged", hint="remove it")
        repeats = tuple(Repeat(**repeat) for repeat in about["repeats"])
        limit, fingerprint = about["max_sequence"], about["fingerprint"]
        blocks = tuple(Block(**block) for block in about["blocks"])
    except (ValueError, KeyError, TypeError) as error:
        raise CaptureError(f"this is no capture: {error}", hint="remove the file") from error
    short = ShortGraph(graph=graph_from_json(graph), repeats=repeats)
    return Captured(short=short, max_sequence=limit, blocks=blocks, fingerprint=fingerprint)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_whole(path: Path, text: str) -> None:
    """All of the file or nothing, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@lru_cache(maxsize=1)
def _versions() -> tuple[str, str, str]:
    """Of torch, of transformers and of this package's own code that captures."""
    return _version("torch"), _version("transformers"), code_digest(Path(__file__).parent)


def _version(package: str) -> str:
    """Of an installed package, nothing where there is none: by the name of the folder that installers keep of it (PyPA, "Recording
    installed projects"), as ``importlib.metadata`` takes 30 ms to load, a fiftieth of a search."""
    for folder in sys.path:
        for path in Path(folder).glob(f"{package}-*.dist-info"):
            return path.name.removeprefix(f"{package}-").removesuffix(".dist-info")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def code_digest(*folders: Path) -> str:
    """A digest of the code in these folders of the package, and of what it asks of torch beyond its public names."""
    digest = hashlib.blake2b(digest_size=16)
    inside = (path for folder in folders for path in sorted(folder.rglob("*.py")))
    for path in (*inside, Path(__file__).parents[1] / "compat.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()
