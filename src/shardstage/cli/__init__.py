"""The command line: one file a verb.

Owns flags, help and tables. In goes what the user typed, out come an exit code and text: 0 done, 1 a proof that failed or a rank that died,
2 bad input. It refuses to decide anything: every verb calls one public function of a package above.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

_SPINS = "1000"
"""How often an idle OpenMP thread looks for work before it sleeps: microseconds, where libgomp's own default is milliseconds.

Threads that spin keep the cores from those that have work: on 2 cores with 6 other busy programs a proof took 115 s by default, 16 s so.
"""

_COLLECTED_OBJECTS = 100_000
"""New objects after which Python looks for cycles among them. Its own number, 700, takes a tenth of a search's time, as nearly all of them
are kept and none is part of a cycle. What was imported stays anyway and is left out for good."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs ``shardstage`` and exits."""
    os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)  # libgomp reads it once, when torch is loaded
    gc.disable()
    from shardstage.cli.app import run

    gc.freeze()
    gc.enable()
    gc.set_threshold(_COLLECTED_OBJECTS)
    sys.exit(run(arguments))
