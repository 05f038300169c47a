"""The command line: one file a verb.

Owns flags, help and tables. In goes what the user typed, out come an exit code and text: 0 done, 1 a proof that failed or a rank that died,
2 bad input, 130 Ctrl-C, 141 a pipe that nobody reads. It refuses to decide anything: every verb calls one public function of a
package above.
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs ``shardstage`` and exits."""
    os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)  # libgomp reads it once, when torch is loaded
    gc.disable()  # what is imported stays, and is not looked through for cycles, now or later
    try:
        from shardstage.cli.app import run

        gc.freeze()
        gc.enable()
        code = run(arguments)
    except KeyboardInterrupt:  # before there is anything that could say so
        print("stopped", file=sys.stderr)
        code = 130
    sys.exit(code)
