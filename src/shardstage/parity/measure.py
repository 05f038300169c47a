"""``measure_rank``: what a rank of the plan does in a proof: it runs the steps and compares its own shards with the reference's."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from shardstage.data import Microbatch
from shardstage.layout import Placement, Shard
from shardstage.layout.boxes import boxes, row_major_strides
from shardstage.parity.faults import Fault, broken_batches, inject
from shardstage.parity.signature import signatures
from shardstage.runtime.build import build_engine
from shardstage.runtime.engine import Engine, StepResult
from shardstage.runtime.environment import RankEnvironment
from shardstage.runtime.leaves import Leaf, Piece
from shardstage.training.job import TrainJob, source_of
from shardstage.training.rank import join_job, rank_batches
from shardstage.training.samples import samples_of

__all__ = [
    "REFERENCE_FILE",
    "PieceError",
    "RankReport",
    "Request",
    "measure_joined",
    "measure_rank",
    "read_reports",
]

REFERENCE_FILE = "reference.safetensors"
_REPORTS = "reports.pickle"


@dataclass(frozen=True, kw_only=True)
class Request:
    """``folder`` holds ``reference.safetensors`` with ``gradient.<fqn>`` and ``parameter.<fqn>``, and gets the reports."""

    folder: str
    num_steps: int
    fault: Fault | None = None


@dataclass(frozen=True, kw_only=True)
class PieceError:
    """A rank's piece of a tensor against the same elements of the reference: sums over its elements.

    ``digest`` tells whether two ranks that hold the same piece hold the same bits.
    """

    fqn: str
    piece: tuple[int, int, int]
    numel: int
    error_square: float
    reference_square: float
    measured_square: float
    product: float
    digest: str


@dataclass(kw_only=True)
class RankReport:
    """What one rank saw. ``activations``: value name → position → (signature, whether it is one rank's summand of it).

    ``samples``: for each step, position in the global batch → sample read for it. ``seeds``: the seed its masks were drawn from.
    """

    rank: int
    pp: int
    dp: int
    tp: int
    results: list[StepResult] = field(default_factory=list)
    gradients: list[PieceError] = field(default_factory=list)
    parameters: list[PieceError] = field(default_factory=list)
    activations: dict[str, dict[int, tuple[float, bool]]] = field(default_factory=dict)
    samples: list[dict[int, int]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)


def measure_rank(environment: RankEnvironment, job: TrainJob, request: Request) -> None:
    """Runs the job's first steps from its first values; rank 0 writes what all ranks report."""
    measure_joined(environment, job, request, join_job(environment, job.config))


def measure_joined(
    environment: RankEnvironment, job: TrainJob, request: Request, device: torch.device
) -> None:
    """``measure_rank`` of a rank that is in the world already."""
    engine = build_engine(
        job.graph,
        job.plan,
        source_of(job.config),
        rank=environment.rank,
        seed=job.config.seed,
        optimizer=job.config.optimizer,
        device=device,
        weights_folder=job.config.weights or None,
    )
    if request.fault is not None:
        inject(request.fault, engine)
    report = _run(engine, job, request)
    reports = engine.groups.gather(report)
    if engine.groups.rank == 0:
        (Path(request.folder) / _REPORTS).write_bytes(pickle.dumps(reports))


def read_reports(folder: Path) -> list[RankReport]:
    """What ``measure_rank`` wrote, by rank."""
    reports: list[RankReport] = pickle.loads((folder / _REPORTS).read_bytes())
    return reports


def _run(engine: Engine, job: TrainJob, request: Request) -> RankReport:
    groups = engine.groups
    report = RankReport(rank=groups.rank, pp=groups.pp, dp=groups.dp, tp=groups.tp)
    batches = rank_batches(job, engine, samples_of(job.config.data, source_of(job.config)))
    reference = Path(request.folder) / REFERENCE_FILE

    def see_gradients(engine: Engine) -> None:
        report.gradients += _compare(engine, reference, "gradient", lambda leaf: leaf.gradient())

    for step in range(request.num_steps):
        microbatches: Sequence[Microbatch] = batches.step(step)
        if request.fault is not None:
            microbatches = broken_batches(request.fault, batches, step, groups)
        report.samples.append(
            {p: s for b in microbatches for p, s in zip(b.positions, b.sample_ids, strict=True)}
        )
        report.seeds.append(engine.random.seed)
        if step:
            report.results.append(engine.step(step, microbatches))
        else:
            with _watched(engine, report):
                report.results.append(engine.step(step, microbatches, on_gradients=see_gradients))
    report.parameters += _compare(engine, reference, "parameter", lambda leaf: leaf.master)
    return report


@contextmanager
def _watched(engine: Engine, report: RankReport) -> Iterator[None]:
    """Takes signatures of what every block of the stage puts out."""

    def see(block: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        size, positions = args[0], args[1]
        sharding = engine.graphs.sharding_at(size)
        for name, tensor in zip(block.outputs(size), outputs, strict=True):
            value = sharding.graph.values.get(name)
            if value is not None and value.requires_grad and value.shape[:1] == (size,):
                _note(report, name, tensor, positions, sharding.placements[name])

    handles = [block.register_forward_hook(see) for block in engine.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(
    report: RankReport, name: str, tensor: Tensor, positions: Sequence[int], placement: Placement
) -> None:
    if isinstance(placement, Shard) and placement.dim == 0:
        return
    found = signatures(name, tensor, placement, report.tp)
    is_part = isinstance(placement, Shard)
    report.activations.setdefault(name, {}).update(
        {position: (value, is_part) for position, value in zip(positions, found, strict=True)}
    )


def _compare(
    engine: Engine, path: Path, kind: str, tensor_of: Callable[[Leaf], Tensor | None]
) -> Iterator[PieceError]:
    """Every piece of every leaf of this rank against the same elements of the reference, read from disk box by box."""
    with safe_open(path, framework="pt") as reference:
        for leaf in engine.parameters.leaves:
            tensor = tensor_of(leaf)
            for piece in leaf.pieces:
                flat = torch.zeros_like(leaf.master) if tensor is None else tensor.detach()
                length = piece.flat_stop - piece.flat_start
                own = flat.reshape(-1)[piece.offset : piece.offset + length].to(
                    "cpu", torch.float64, copy=True
                )
                yield _piece_error(own, piece, reference, kind, engine.groups.tp)


def _piece_error(own: Tensor, piece: Piece, reference: Any, kind: str, tp: int) -> PieceError:
    parameter = piece.parameter
    whole = reference.get_slice(f"{kind}.{parameter.fqn}")
    strides = row_major_strides(parameter.local_shape)
    error = size = mine = product = 0.0
    flat_range = (piece.flat_start, piece.flat_stop)
    for box, start in boxes(parameter.shape, parameter.placement, tp, flat_range):
        expected = _read(whole, box.offsets, box.sizes)
        part = own.as_strided(box.sizes, strides, start)
        error += float((part - expected).square().sum())
        size += float(expected.square().sum())
        mine += float(part.square().sum())
        product += float((part * expected).sum())
    is_sharded = isinstance(parameter.placement, Shard)
    return PieceError(
        fqn=parameter.fqn,
        piece=(tp if is_sharded else 0, *flat_range),
        numel=own.numel(),
        error_square=error,
        reference_square=size,
        measured_square=mine,
        product=product,
        digest=hashlib.blake2b(own.numpy().tobytes(), digest_size=8).hexdigest(),
    )


def _read(whole: Any, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    if not sizes:
        scalar: Tensor = whole[...]
        return scalar
    part: Tensor = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
    return part
