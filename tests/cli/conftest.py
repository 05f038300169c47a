"""What tests of the command line share."""

from __future__ import annotations

import pytest

from shardstage.cli import waiting


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes longer than a user's patience: a line that says so is looked for in ``test_waiting`` alone."""
    monkeypatch.setattr(waiting, "PATIENCE_S", 600.0)
