"""The command line: one file a verb.

Owns flags, help and tables. In goes what the user typed, out come an exit code and text: 0 done, 1 a proof that failed or a rank that died,
2 bad input. It refuses to decide anything: every verb calls one public function of a package above.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs ``shardstage`` and exits."""
    from shardstage.cli.app import run

    sys.exit(run(arguments))
