"""A training run from its file to its table: what was asked for, what each rank does, what came out.

Owns ``RunConfig`` (run.toml), the preparation in the launcher, the entry of every rank and the run folder. In goes a RunConfig, out come
a log, checkpoints and a ``RunSummary``. It refuses to know how a plan is searched, how a rank computes or how a proof is made.
"""

from shardstage.training.run_config import (
    RunConfig,
    load_run_config,
    run_config_from_toml,
    run_config_to_toml,
)

__all__ = ["RunConfig", "load_run_config", "run_config_from_toml", "run_config_to_toml"]
