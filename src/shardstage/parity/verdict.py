"""``Verdict``: whether a run is equal to a single device's, by how much, and why not."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from shardstage.parity.tolerance import Derivation

__all__ = ["Cause", "FirstFailure", "Row", "Verdict"]

_WHERE_COLUMNS = 37


@dataclass(frozen=True, kw_only=True)
class Row:
    """One compared quantity: its largest error relative to the tolerance, and the tensor or step that has it.

    Both are absolute; those of tensors are L2 norms over the whole tensor. ``reference`` is the size of what was compared.
    """

    quantity: str
    where: str
    error: float
    tolerance: float
    reference: float
    count: int

    @property
    def ratio(self) -> float:
        """Error over tolerance; an error where none is allowed is infinite, and so is one that is no number."""
        if self.error != self.error:
            return float("inf")
        return self.error / self.tolerance if self.tolerance else (0.0 if not self.error else float("inf"))

    @property
    def is_equal(self) -> bool:
        return self.ratio <= 1


@dataclass(frozen=True, kw_only=True)
class FirstFailure:
    """Where a run leaves its reference: the first module in forward order, or, where the forward is right, in backward order."""

    module: str
    direction: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Cause:
    """The probable cause: ``name`` in a few words, ``evidence`` in a sentence with numbers."""

    name: str
    evidence: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``logged`` says how the losses relate to those of the training run's log; empty where there is none."""

    subject: str
    rows: tuple[Row, ...]
    derivation: Derivation
    logged: str = ""
    is_log_equal: bool = True
    failure: FirstFailure | None = None
    cause: Cause | None = None

    @property
    def is_equal(self) -> bool:
        return self.is_log_equal and all(row.is_equal for row in self.rows)

    @property
    def largest_ratio(self) -> float:
        return max(row.ratio for row in self.rows)

    def text(self) -> str:
        """Table, derivation and verdict in lines of at most 80 columns (longer module names are kept whole)."""
        return "\n".join([self.subject, "", *self._table(), "", self.derivation.text(), "", *self._end()])

    def to_json(self) -> str:
        """The verdict as a JSON object: everything in it, ``is_equal`` and each row's ``ratio``."""
        rows = [{**asdict(row), "ratio": row.ratio} for row in self.rows]
        return json.dumps({"is_equal": self.is_equal, **asdict(self), "rows": rows}, indent=2) + "\n"

    def _table(self) -> list[str]:
        head = f"{'compared':<14}{'worst at':<{_WHERE_COLUMNS}}{'error':>9}{'allowed':>10}{'ratio':>9}"
        lines = [head]
        for row in self.rows:
            where = _shortened(row.where, _WHERE_COLUMNS - 1)
            figures = f"{row.error:>9.1e}{row.tolerance:>10.1e}{_ratio(row.ratio):>9}"
            lines.append(f"{row.quantity:<14}{where:<{_WHERE_COLUMNS}}{figures}")
        if self.logged:
            lines.append(f"{'training log':<14}{self.logged}")
        return lines

    def _end(self) -> list[str]:
        if self.is_equal:
            return [
                f"EQUAL: the run computes what one device computes (largest ratio {self.largest_ratio:.2g})"
            ]
        lines = ["NOT EQUAL to a single device"]
        if self.failure is not None:
            ranks = ", ".join(map(str, self.failure.ranks))
            word = "rank" if len(self.failure.ranks) == 1 else "ranks"
            lines.append(f"  first at  {self.failure.module} ({self.failure.direction}), {word} {ranks}")
        if self.cause is not None:
            lines.append(f"  probably  {self.cause.name}")
            lines += [f"            {line}" for line in _wrapped(self.cause.evidence, 68)]
        return lines


def _ratio(ratio: float) -> str:
    return f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0e}"


def _shortened(text: str, columns: int) -> str:
    return text if len(text) <= columns else "…" + text[-(columns - 1) :]


def _wrapped(text: str, columns: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > columns:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
