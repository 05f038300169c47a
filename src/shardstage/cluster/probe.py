"""Measures this machine as a cluster: what each rank gets while all ranks ask at the same time.

In goes a number of ranks and a time budget; out comes a ``Cluster`` whose numbers include contention, because ranks that
share cores, memory and links are the truth of a real run. One process per rank, one thread each on a CPU, one device each
on GPUs; every measurement starts on all ranks together and the median rank counts.
"""

# torch declares forward and backward of an autograd function with any arguments.
# mypy: disable-error-code="override"

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import resource_tracker
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.functional import linear

from shardstage.cluster.cluster import Cluster
from shardstage.cluster.machine import cpu_model, memory_bytes, num_cores
from shardstage.cluster.samples import COLLECTIVES, Sample, cluster_from_samples, group_sizes
from shardstage.errors import ClusterError, RankFailedError

__all__ = ["probe"]

_KIB: Final = 1024
_MIB: Final = 1024**2
_SMALL_LAYERS: Final = 16
_SMALL_KERNELS: Final = 9 * _SMALL_LAYERS
"""Of a product, a scaling, a tanh and a sum: four forward; backward two products, two, and the sum of two gradients."""
_START_S: Final = 15.0
"""Seconds set aside for starting the ranks: importing torch takes 2 to 4 s a rank (2 cores, 4 ranks)."""


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What is measured on a kind of device."""

    gemm_edges: tuple[int, ...]
    dtypes: tuple[str, ...]
    copy_bytes: int
    collective_bytes: tuple[int, ...]


_SIZES: Final = {
    "cpu": _Sizes(
        gemm_edges=(32, 64, 128, 256, 512, 1024),
        dtypes=("float32", "bfloat16", "float64"),
        copy_bytes=32 * _MIB,
        collective_bytes=(_KIB, 32 * _KIB, 256 * _KIB, 2 * _MIB, 8 * _MIB),
    ),
    "cuda": _Sizes(
        gemm_edges=(256, 512, 1024, 2048, 4096, 8192),
        dtypes=("float32", "bfloat16", "float64"),
        copy_bytes=512 * _MIB,
        collective_bytes=(_KIB, 64 * _KIB, _MIB, 16 * _MIB, 128 * _MIB),
    ),
}


def probe(
    ranks: int,
    *,
    budget_s: float = 45.0,
    device: str | None = None,
    backend: str | None = None,
    prepare: Callable[[], None] | None = None,
) -> Cluster:
    """A cluster of ``ranks`` devices as measured on this machine within about ``budget_s``.

    ``device`` is "cpu" or "cuda" (default: cuda where every rank can have one). ``backend`` names the process group to
    measure (default: nccl or gloo); ``prepare`` is called on every rank first, for example to register that backend: it
    must be a function that can be pickled. Raises ClusterError when the machine cannot hold the ranks and
    RankFailedError when one fails.
    """
    kind = _device_kind(ranks, device)
    spec = _RankSpec(
        num_ranks=ranks,
        device=kind,
        backend=backend or ("nccl" if kind == "cuda" else "gloo"),
        window_s=_window_s(_SIZES[kind], ranks, budget_s),
        timeout_s=2 * budget_s + _START_S,
        prepare=prepare,
    )
    samples = _measure_on_all(spec)
    name = _device_name(kind)
    return cluster_from_samples(
        samples,
        num_ranks=ranks,
        device_name=name,
        device_kind=kind,
        memory_bytes=_memory_bytes(spec),
        source=f"measured by shardstage probe on {name}, torch {torch.__version__}, {ranks} ranks, {spec.backend}",
        compute_capability=_compute_capability(kind),
    )


@dataclass(frozen=True, kw_only=True)
class _RankSpec:
    num_ranks: int
    device: str
    backend: str
    window_s: float
    timeout_s: float
    prepare: Callable[[], None] | None


def _device_kind(ranks: int, device: str | None) -> str:
    if ranks < 1:
        raise ClusterError(
            f"a machine cannot be measured with {ranks} ranks", hint="shardstage probe --ranks 4"
        )
    if device not in (None, *_SIZES):
        raise ClusterError(f"unknown device {device!r}", hint=f"one of {', '.join(_SIZES)}")
    num_gpus = torch.cuda.device_count()
    if device == "cuda" and num_gpus < ranks:
        raise ClusterError(
            f"{ranks} ranks need {ranks} GPUs and this machine has {num_gpus}", hint="--device cpu"
        )
    return device or ("cuda" if num_gpus >= ranks else "cpu")


def _compute_capability(kind: str) -> float | None:
    if kind != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability()
    return major + minor / 10


def _window_s(sizes: _Sizes, ranks: int, budget_s: float) -> float:
    """Seconds for each measurement, so that all of them with their warm-up take the budget less the start."""
    num_gemms = len(sizes.dtypes) * len(sizes.gemm_edges)
    num_collectives = len(group_sizes(ranks)) * len(COLLECTIVES) * len(sizes.collective_bytes)
    return min(max((budget_s - _START_S) / (num_gemms + num_collectives + 4) / 2, 0.02), 0.2)


def _measure_on_all(spec: _RankSpec) -> list[Sample]:
    """Runs the measurements on ``num_ranks`` new processes; every sample is already the median rank's."""
    store = dist.TCPStore(
        "127.0.0.1", 0, None, True, timedelta(seconds=spec.timeout_s), wait_for_workers=False
    )
    with _holding_interrupts():
        context = multiprocessing.start_processes(  # type: ignore[no-untyped-call]
            _run_rank, (store.port, spec), spec.num_ranks, join=False, daemon=True, start_method="spawn"
        )
    deadline = time.monotonic() + spec.timeout_s
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise RankFailedError(
                    f"the probe did not end in {spec.timeout_s:.0f} s", hint="use fewer ranks"
                )
    except (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException) as error:
        raise RankFailedError(f"rank {error.error_index} of the probe failed: {_last_line(error)}") from error
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return [Sample(*fields) for fields in json.loads(store.get("samples"))]


@contextmanager
def _holding_interrupts() -> Iterator[None]:
    """Ctrl-C waits: processes started meanwhile would answer it with a traceback from the midst of their imports."""
    resource_tracker.ensure_running()  # which lets interrupts through again where it is started later
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _run_rank(rank: int, port: int, spec: _RankSpec) -> None:
    signal.pthread_sigmask(
        signal.SIG_UNBLOCK, {signal.SIGINT}
    )  # torch's entry ends a rank silently from here on
    torch.set_num_threads(1)
    if spec.device == "cuda":
        torch.cuda.set_device(rank)
    if spec.prepare is not None:
        spec.prepare()
    timeout = timedelta(seconds=spec.timeout_s)
    store = dist.TCPStore("127.0.0.1", port, None, False, timeout)
    dist.init_process_group(
        spec.backend,
        store=dist.PrefixStore("ranks", store),
        rank=rank,
        world_size=spec.num_ranks,
        timeout=timeout,
    )
    try:
        samples = _RankProbe(rank, spec).samples()
        if rank == 0:
            store.set("samples", json.dumps(samples))
    finally:
        dist.destroy_process_group()


class _RankProbe:
    """The measurements of one rank, in the order that is the same on all of them."""

    def __init__(self, rank: int, spec: _RankSpec) -> None:
        self.rank = rank
        self.spec = spec
        self.sizes = _SIZES[spec.device]
        self.device = torch.device(spec.device)

    def samples(self) -> list[Sample]:
        return [*self._gemms(), *self._memory(), *self._shared_cores(), *self._collectives()]

    def _gemms(self) -> list[Sample]:
        found = []
        for dtype in self.sizes.dtypes:
            for edge in self.sizes.gemm_edges:
                seconds = self._local_s(self._products(edge, getattr(torch, dtype)))
                found.append(Sample("gemm", dtype, 1, 2.0 * edge**3, seconds))
                if 8 * seconds > 2 * self.spec.window_s:  # twice the edge takes eight times as long
                    break
        return found

    def _products(self, edge: int, dtype: torch.dtype) -> list[Callable[[], object]]:
        """As many FLOPs in three shapes of a transformer: square, up and down projection."""
        shapes = ((edge, edge), (edge // 2, 2 * edge), (2 * edge, edge // 2))
        return [
            partial(
                linear,
                torch.ones(edge, inputs, dtype=dtype, device=self.device),
                torch.ones(outputs, inputs, dtype=dtype, device=self.device),
            )
            for inputs, outputs in shapes
        ]

    def _memory(self) -> list[Sample]:
        source = torch.ones(self.sizes.copy_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return [
            Sample("op", "", 1, 1, self._local_s([self._train_small]) / _SMALL_KERNELS),
            Sample("copy", "", 1, source.nbytes, self._local_s([lambda: target.copy_(source)])),
        ]

    def _train_small(self) -> None:
        """Forward and backward of layers so small that only what an op costs is left, called as engines call them: each by its name in
        ATen, a product as an autograd function that adds its weight's gradient where that lies, and views between."""
        aten = torch.ops.aten
        weight = torch.full((8, 8), 0.1, device=self.device)
        y = torch.ones(4, 8, device=self.device, requires_grad=True)
        total, scale = torch.zeros_like(weight), torch.full((8,), 0.5, device=self.device)
        for _ in range(_SMALL_LAYERS):
            x = _Product.apply(y, weight, total)  # type: ignore[no-untyped-call]  # torch does not annotate it
            heads = aten.transpose.int(aten.view.default(x, (2, 2, 8)), 0, 1)
            heads = aten.transpose.int(aten.mul.Tensor(heads, scale), 0, 1)
            y = aten.add.Tensor(y, aten.tanh.default(aten.reshape.default(heads, (4, 8))))
        y.sum().backward()  # type: ignore[no-untyped-call]

    def _shared_cores(self) -> list[Sample]:
        """The same product by all ranks at a time and by one: ranks that share cores leave them to each other while they wait."""
        if self.spec.device != "cpu" or self.spec.num_ranks == 1:
            return []
        edge = self.sizes.gemm_edges[3]
        calls = self._products(edge, torch.float32)
        busy_s = self._local_s(calls)
        seconds = torch.zeros(1, dtype=torch.float64)
        if self.rank == 0:
            num_calls, started = 0, time.perf_counter()
            while (elapsed_s := time.perf_counter() - started) < self.spec.window_s or not num_calls:
                calls[num_calls % len(calls)]()
                num_calls += 1
            seconds[0] = elapsed_s / num_calls
        dist.broadcast(seconds, 0)
        flops = 2.0 * edge**3
        return [
            Sample("busy", "float32", 1, flops, busy_s),
            Sample("alone", "float32", 1, flops, float(seconds)),
        ]

    def _collectives(self) -> list[Sample]:
        found: list[Sample] = []
        for size in group_sizes(self.spec.num_ranks):
            group = self._own_group(size)
            for kind in COLLECTIVES if size == 2 else COLLECTIVES[:-1]:
                found += self._sizes_of(kind, group)
        return found

    def _sizes_of(self, kind: str, group: dist.ProcessGroup) -> Iterator[Sample]:
        size = dist.get_world_size(group)
        for wanted_bytes in self.sizes.collective_bytes:
            part = torch.ones(max(wanted_bytes // 4 // size, 1), device=self.device)
            seconds, core_s = self._collective_s(_collective_call(kind, part, group, self.rank))
            if kind == "p2p":  # a call is there and back
                seconds, core_s = seconds / 2, core_s / 2
                if self._has_shared_cores:
                    yield Sample("message", "float32", size, part.nbytes * size, core_s)
            yield Sample(kind, "float32", size, part.nbytes * size, seconds)
            if seconds > 2 * self.spec.window_s and wanted_bytes >= _MIB:
                return

    def _own_group(self, size: int) -> dist.ProcessGroup:
        """The group of ``size`` neighbours that holds this rank; all ranks make all groups, in the same order."""
        starts = range(0, self.spec.num_ranks, size)
        groups = {start: dist.new_group(list(range(start, start + size))) for start in starts}
        own: dist.ProcessGroup = groups[self.rank // size * size]
        return own

    def _local_s(self, calls: Sequence[Callable[[], object]]) -> float:
        """Mean seconds of a call while all ranks make calls for the whole window, one after the other.

        The mean, because a rank that waits for a core loses whole time slices between calls that are quick.
        """
        for call in calls:
            call()
        self._median_rank(0.0)
        num_calls, started, elapsed_s = 0, time.perf_counter(), 0.0
        while elapsed_s < self.spec.window_s or num_calls < len(calls):
            calls[num_calls % len(calls)]()
            num_calls += 1
            if num_calls % 16 == 0 or num_calls <= 16:
                self._synchronize()
                elapsed_s = time.perf_counter() - started
        return self._median_rank(elapsed_s / num_calls)

    @property
    def _has_shared_cores(self) -> bool:
        return self.spec.device == "cpu" and self.spec.num_ranks > num_cores()

    def _collective_s(self, call: Callable[[], object]) -> tuple[float, float]:
        """Mean seconds of a collective that all ranks call equally often, about as often as fits the window; and of a rank's cores.

        The latter are the CPU seconds of all its threads, by what share of a core it has while all ranks compute.
        """
        call()
        first_s = self._median_rank(self._repeated_s(call, 1)[0])
        num_calls = min(max(int(self.spec.window_s / first_s), 2), 500)
        seconds, cpu_s = self._repeated_s(call, num_calls)
        share = num_cores() / self.spec.num_ranks
        return self._median_rank(seconds), self._median_rank(cpu_s) / share

    def _repeated_s(self, call: Callable[[], object], num_calls: int) -> tuple[float, float]:
        """Seconds of a call, and CPU seconds."""
        started, cpu_started = time.perf_counter(), time.process_time()
        for _ in range(num_calls):
            call()
        self._synchronize()
        elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
        return elapsed_s / num_calls, cpu_s / num_calls

    def _synchronize(self) -> None:
        if self.spec.device == "cuda":
            torch.cuda.synchronize()

    def _median_rank(self, seconds: float) -> float:
        """The median over the ranks, on all of them; they go on together."""
        values = torch.zeros(self.spec.num_ranks, dtype=torch.float64, device=self.device)
        values[self.rank] = seconds
        dist.all_reduce(values)
        return float(values.median())


class _Product(torch.autograd.Function):
    """``x @ weight``, whose gradient is added to ``total``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.total = total
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight = ctx.saved_tensors
        ctx.total.addmm_(x.t(), gradient)
        return gradient @ weight.t(), None, None


def _collective_call(
    kind: str, part: torch.Tensor, group: dist.ProcessGroup, rank: int
) -> Callable[[], object]:
    """One call of a collective whose whole tensor is as large as the parts of all ranks together."""
    whole = part.repeat(dist.get_world_size(group))
    other = torch.empty_like(whole)
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: _single("all_gather_single", "all_gather_into_tensor")(
            whole, part, group=group
        ),
        "reduce_scatter": lambda: _single("reduce_scatter_single", "reduce_scatter_tensor")(
            part, whole, group=group
        ),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "p2p": lambda: _ping_pong(whole, rank),
    }
    return calls[kind]


def _single(name: str, name_before: str) -> Callable[..., object]:
    """A collective by its name from torch 2.13 on or by the one before it, which warns there."""
    found: Callable[..., object] = getattr(dist, name, None) or getattr(dist, name_before)
    return found


def _ping_pong(tensor: torch.Tensor, rank: int) -> None:
    """There and back between the ranks 2k and 2k+1."""
    peer = rank ^ 1
    if rank < peer:
        dist.send(tensor, peer)
        dist.recv(tensor, peer)
    else:
        dist.recv(tensor, peer)
        dist.send(tensor, peer)


def _memory_bytes(spec: _RankSpec) -> int:
    if spec.device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return memory_bytes() // spec.num_ranks


def _device_name(kind: str) -> str:
    return str(torch.cuda.get_device_name(0)) if kind == "cuda" else cpu_model()
