"""Reads and writes the TOML of a cluster: exact, deterministic, with errors that name the place."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from shardstage.errors import ClusterError

__all__ = ["Table", "to_toml"]


class Table:
    """One table of a file, read key by key; ``done`` refuses what nobody asked for.

    ``where`` names the table in messages, such as ``"h100.toml [device]"``.
    """

    def __init__(self, entries: Mapping[str, Any], where: str) -> None:
        self._entries = entries
        self._where = where
        self._known: set[str] = set()

    def text(self, key: str) -> str:
        value = self._take(key)
        if not isinstance(value, str) or not value:
            raise ClusterError(f"{self._where}: {key} must be text, not {value!r}", hint=f'{key} = "…"')
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; none when the key is absent."""
        self._known.add(key)
        value = self._entries.get(key, [])
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise ClusterError(f"{self._where}: {key} must be a list of texts", hint=f'{key} = ["…"]')
        return tuple(value)

    def number(self, key: str, *, default: float | None = None) -> float:
        if default is not None and key not in self._entries:
            return default
        return _number(self._take(key), f"{self._where}: {key}")

    def integer(self, key: str) -> int:
        value = self._take(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ClusterError(
                f"{self._where}: {key} must be a whole number, not {value!r}", hint=f"{key} = 8"
            )
        return value

    def points(self, key: str) -> tuple[tuple[float, float], ...]:
        """A list of pairs of numbers."""
        return tuple((first, second) for first, second in self.rows(key, width=2))

    def rows(self, key: str, *, width: int) -> tuple[tuple[float, ...], ...]:
        """A list of lists of ``width`` numbers each."""
        value = self._take(key)
        if not isinstance(value, list) or not all(
            isinstance(row, list) and len(row) == width for row in value
        ):
            what = "pairs" if width == 2 else f"lists of {width} numbers"
            raise ClusterError(
                f"{self._where}: {key} must be a list of {what}",
                hint=f"{key} = [[{', '.join(['1e9', '2e11', '0.5'][:width])}]]",
            )
        here = f"{self._where}: {key}"
        return tuple(tuple(_number(each, here) for each in row) for row in value)

    def has(self, key: str) -> bool:
        """Whether the table holds ``key``."""
        return key in self._entries

    def table(self, key: str) -> Table:
        value = self._take(key)
        if not isinstance(value, dict):
            raise ClusterError(f"{self._where}: {key} must be a table, not {value!r}", hint=f"[{key}]")
        return Table(value, f"{self._where} [{key}]")

    def tables(self, key: str) -> Iterator[Table]:
        """The tables of ``[[key]]``; none when the key is absent."""
        self._known.add(key)
        value = self._entries.get(key, [])
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise ClusterError(f"{self._where}: {key} must be a list of tables", hint=f"[[{key}]]")
        return (
            Table(entry, f"{self._where} [[{key}]] {index}") for index, entry in enumerate(value, start=1)
        )

    def remaining_numbers(self) -> dict[str, float]:
        """Every key that was not read yet, as a number."""
        keys = [key for key in self._entries if key not in self._known]
        return {key: self.number(key) for key in keys}

    def done(self) -> None:
        """Raises ClusterError when the table holds a key that was not read."""
        for key in self._entries:
            if key not in self._known:
                near = get_close_matches(key, self._known, n=1)
                known = ", ".join(sorted(self._known))
                raise ClusterError(
                    f"{self._where}: unknown key {key!r}",
                    hint=f"{near[0]} = …" if near else f"known keys: {known}",
                )

    def _take(self, key: str) -> Any:
        self._known.add(key)
        if key not in self._entries:
            raise ClusterError(f"{self._where}: {key} is missing", hint=f"add a line `{key} = …`")
        return self._entries[key]


def to_toml(entries: Mapping[str, Any]) -> str:
    """The text of nested mappings; a mapping becomes ``[table]``, a list of mappings ``[[table]]``."""
    return "\n".join(_table_lines(entries, "")).strip("\n") + "\n"


def _table_lines(entries: Mapping[str, Any], prefix: str) -> Iterator[str]:
    yield from (f"{key} = {_value(value)}" for key, value in entries.items() if not _is_table(value))
    for key, value in entries.items():
        if not _is_table(value):
            continue
        name = f"{prefix}{key}"
        for table in [value] if isinstance(value, Mapping) else value:
            yield ""
            yield f"[{name}]" if isinstance(value, Mapping) else f"[[{name}]]"
            yield from _table_lines(table, f"{name}.")


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(entry, Mapping) for entry in value)
    )


def _value(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(entry) for entry in value)}]"
    return str(value)


def _float(value: float) -> str:
    """The shortest text that reads back as the same float: ``3350000000000.0`` → ``"3.35e12"``."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return repr(value)
    digits, _, power = min(
        (f"{value:.{n}e}" for n in range(17) if float(f"{value:.{n}e}") == value), key=len
    ).partition("e")
    return f"{digits}e{int(power)}"


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ClusterError(
            f"{where} must be a number, not {value!r}", hint="write it in SI units, such as 3.35e12"
        )
    return float(value)
