"""``python -m shardstage`` is the command ``shardstage``."""

from __future__ import annotations

from shardstage.cli import main

if __name__ == "__main__":
    main()
