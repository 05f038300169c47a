"""``Plan``: every decision about how one model runs on many ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shardstage.graph.recompute import StageRecompute, is_selective
from shardstage.layout import Mesh, balanced_sizes

__all__ = ["GradientDtype", "Offload", "Plan", "Precision", "ScheduleName", "StageRange"]

ScheduleName = Literal[
    "gpipe", "1f1b", "interleaved-1f1b", "looped-bfs", "zb-h1", "zb-v", "dualpipe-v", "custom"
]
Precision = Literal["float32", "bfloat16", "float16", "float64"]
GradientDtype = Literal["float32", "bfloat16"]
Offload = Literal["none", "optimizer"]

PLAN_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRange:
    """A stage: the ops from the one called ``first`` to the one called ``last``, both included, in graph order."""

    first: str
    last: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model runs: mesh, stages, sharding, memory savers, schedule, batch.

    ``global_batch`` samples of ``sequence`` tokens make a step. ``shares[d]`` of them go to data-parallel rank d, which runs them in
    microbatches of ``microbatch`` samples (its last one smaller where that does not divide).
    ``zero``: 0 everything replicated over dp; 1 optimizer state sharded; 2 gradients too; 3 parameters too.
    ``zero_ranks`` neighbouring replicas share what it cuts, and more of them hold copies (all replicas share it where nothing is said).
    ``stage_recompute`` says for each stage what ``recompute`` says for all. ``recompute_modules`` (globs over module paths) says what
    selective means: what lies in these modules of a layer is computed again, the rest of it kept.
    ``ep`` ranks deal an expert layer's experts out among them: of the replicas, or, where ``etp`` is 1, of all their tensor-parallel ranks,
    each of which then computes whole experts, on its part of the tokens (None: all tensor-parallel ranks cut each expert).
    ``precision`` is the dtype of computation; master weights and optimizer state are always float32 or wider. ``gradient_dtype`` is that of
    gradients where they are summed, over microbatches and over ranks (None: the master weights').
    ``offload``: ``optimizer`` keeps master weights and optimizer state in the host's memory, and updates there.
    There are ``pp`` stages, or a multiple of it where a schedule gives each rank several. ``actions`` are the rows of a schedule that is
    written by hand or found by search (``schedule = "custom"``): one text of actions (``0F0 0F1 0B0``) for each pipeline rank.
    ``replicate`` names parameters (globs over their fqn) that tensor parallelism must leave whole.
    """

    mesh: Mesh
    stages: tuple[StageRange, ...]
    global_batch: int
    sequence: int | None
    microbatch: int
    shares: tuple[int, ...]
    zero: Literal[0, 1, 2, 3] = 0
    recompute: StageRecompute = "none"
    stage_recompute: tuple[StageRecompute, ...] = ()
    recompute_modules: tuple[str, ...] = ()
    schedule: ScheduleName = "1f1b"
    actions: tuple[str, ...] = ()
    precision: Precision = "float32"
    is_sequence_parallel: bool = False
    is_compiled: bool = False
    replicate: tuple[str, ...] = ()
    bucket_bytes: int = 25 * 2**20
    graph_fingerprint: str = ""
    version: int = PLAN_VERSION
    ep: int = 1
    etp: Literal[1] | None = None
    zero_ranks: int | None = None
    gradient_dtype: GradientDtype | None = None
    offload: Offload = "none"

    def recompute_of(self, stage: int) -> StageRecompute:
        """What a stage computes again in its backward."""
        return self.stage_recompute[stage] if self.stage_recompute else self.recompute

    @property
    def is_selective(self) -> bool:
        """Whether a stage recomputes some layer selectively."""
        return any(map(is_selective, self.stage_recompute or (self.recompute,)))

    def microbatches(self, dp: int) -> tuple[int, ...]:
        """Sizes of the microbatches of data-parallel rank ``dp``, largest first; every rank runs equally many.

        The number is that of the rank with the largest share, so that all ranks meet in the same collectives.
        """
        return balanced_sizes(self.shares[dp], self.num_microbatches)

    @property
    def stages_per_rank(self) -> int:
        return len(self.stages) // self.mesh.pp

    @property
    def num_microbatches(self) -> int:
        return -(-max(self.shares) // self.microbatch)
