"""What a rank holds at its peak, category by category, by the rules that the engine allocates by.

    e elements of the stage's local parameters, c bytes of one in computation, g of one in a sum of gradients,
    w = max(4, c) bytes of one in the optimizer, d = dp; g = w where a plan says nothing of it

                 zero=0          zero=1            zero=2                  zero=3
    parameters   e c             e c               e c                     c (two largest units + shared)
    rows         -               -                 e g / d if own masters  e g / d if own masters
    master       e w if c ≠ w    e w / d if c ≠ w  e w / d                 e w / d
    gradients    e g             e g (1 + 1 / d)   e g / d + one unit      e g / d + one unit
    optimizer    2 e w           2 e w / d         2 e w / d               2 e w / d

Rows are what ZeRO-2/3 gathers from: the masters themselves where they are as wide as gradients. With the optimizer offloaded, ``master``
and ``optimizer`` lie in the host's memory, also where c = w.

Notation as in Rajbhandari et al., "ZeRO", 2020, table 1, with the two moments of AdamW. Another framework than our engine stores some
of that otherwise: an ``Accounting`` says how.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Final, Literal, NamedTuple

from shardstage.cost.accounting import OUR_ACCOUNTING, Accounting
from shardstage.cost.profile import Profile, UnitCost
from shardstage.cost.setup import StepSetup
from shardstage.graph.recompute import Recompute
from shardstage.schedule import Action

__all__ = ["MemoryModel", "MemoryUse", "rank_memory", "stage_elements", "stage_memory", "step_bytes"]

MOMENTS: Final = 2
"""AdamW's: the running means of the gradient and of its square."""

GATHERED_UNITS: Final = 2
"""FSDP2 gathers the next block while one computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryUse:
    """Bytes of one rank at its peak; ``recompute`` and ``transient`` come and go, the others stay through the backward.

    ``fixed`` are an ``Accounting``'s workspaces. ``host`` are bytes of the host's memory, not of the device's.
    """

    parameters: int
    master: int
    gradients: int
    optimizer: int
    activations: int
    recompute: int
    transient: int
    communication: int
    fixed: int = 0
    host: int = 0

    @property
    def total_bytes(self) -> int:
        """Of the device."""
        return sum(num_bytes for _, num_bytes in self.categories())

    def categories(self) -> Iterator[tuple[str, int]]:
        """Each category of the device's memory with its bytes, empty ones left out."""
        names = (name for name in self.__slots__ if name != "host")
        yield from ((name, num_bytes) for name in names if (num_bytes := getattr(self, name)))


def stage_elements(profile: Profile, setup: StepSetup, stage: int) -> int:
    """Local parameter elements of a stage; one that several of its units share counts once."""
    units = [profile.units[index] for index in setup.units_of(stage, profile)]
    shared = {name for unit in units for name in unit.shared}
    return sum(unit.own_elements for unit in units) + sum(profile.shared_elements[name] for name in shared)


class MemoryModel:
    """What stages and ranks of one setup hold; stages of equal units that hold as many microbatches are asked once."""

    def __init__(self, profile: Profile, setup: StepSetup, accounting: Accounting = OUR_ACCOUNTING) -> None:
        self.profile = profile
        self.setup = setup
        self.accounting = accounting
        self._known: dict[tuple[object, ...], MemoryUse] = {}

    def stage(self, stage: int) -> MemoryUse:
        """``stage_memory``."""
        setup, units = self.setup, self.profile.units
        own = setup.units_of(stage, self.profile)
        following = units[own.stop].input_bytes if own.stop < len(units) else None
        held = setup.in_flight(stage)
        key = (
            *(id(units[i]) for i in own),
            *setup.modes_of(stage, self.profile),
            held,
            stage == 0,
            following,
        )
        if key not in self._known:
            self._known[key] = stage_memory(self.profile, setup, stage, self.accounting)
        return self._known[key]

    def rank(self, rank: int) -> MemoryUse:
        """``rank_memory``."""
        setup, stages = self.setup, self.setup.stages_of(rank)
        uses = [self.stage(stage) for stage in stages]
        if len(stages) == 1:
            return uses[0]
        passing = max(uses, key=lambda use: use.recompute + use.transient)
        together = {name: sum(getattr(use, name) for use in uses) for name in MemoryUse.__slots__}
        together |= {"recompute": passing.recompute, "transient": passing.transient, "fixed": passing.fixed}
        of_one = [
            use.activations // max(1, setup.in_flight(stage)) for stage, use in zip(stages, uses, strict=True)
        ]
        if setup.custom is not None:
            held = dict(zip(stages, of_one, strict=True))
            together["activations"] = _peak_activation_bytes(setup.custom.actions[rank], held)
        else:
            moments = setup.in_flight_together(rank)
            together["activations"] = max(sum(map(mul, counts, of_one)) for counts in moments)
        return MemoryUse(**together)


def stage_memory(
    profile: Profile, setup: StepSetup, stage: int, accounting: Accounting = OUR_ACCOUNTING
) -> MemoryUse:
    """The peak of a rank of one stage: the backward of its costliest unit, with the activations of all microbatches in flight held.

    ``transient`` are the gradients of the unit's largest op: as large as what the op reads and writes.
    """
    units = [profile.units[index] for index in setup.units_of(stage, profile)]
    elements = stage_elements(profile, setup, stage)
    shared = sum(profile.shared_elements[n] for n in {name for unit in units for name in unit.shared})
    by_size = sorted((unit.own_elements for unit in units), reverse=True)
    largest = max([by_size[0], shared])
    has_loss = stage == setup.num_stages - 1
    works = _works(units, setup.modes_of(stage, profile), accounting, has_loss=has_loss)
    recomputed, transient = max(((work.recomputed, work.transient) for work in works), key=sum)
    level, c, w = setup.sharding_level, setup.compute_bytes, setup.master_bytes
    g = setup.gradient_bytes if accounting.gradient_bytes is None else accounting.gradient_bytes
    experts = sum(unit.expert_elements for unit in units)
    part = setup.part_elements(elements, experts)
    if level >= 2:
        whole = elements if level == 2 else min(elements, sum(by_size[:GATHERED_UNITS]) + shared)
        gradients = part * g + largest * (c + g)
    else:
        whole = elements
        has_part = level and accounting.copies_reduced_part
        reduced = setup.reduced_elements(elements, experts) if has_part else 0
        gradients = elements * g + reduced * setup.gradient_bytes
    masters = part * w if level >= 2 or setup.has_own_masters else 0
    return MemoryUse(
        parameters=whole * c + (part * setup.gradient_bytes if level >= 2 and setup.has_own_masters else 0),
        master=0 if setup.is_offloaded else masters,
        gradients=gradients,
        optimizer=0 if setup.is_offloaded else MOMENTS * part * w,
        host=masters + MOMENTS * part * w if setup.is_offloaded else 0,
        activations=setup.in_flight(stage)
        * (sum(work.kept for work in works) + _held_at_ends(profile, setup, stage, accounting))
        + (accounting.loss.kept_bytes * (_losses_held(setup) - 1) if has_loss and accounting.loss else 0),
        recompute=recomputed,
        transient=transient,
        communication=_communication_bytes(setup, profile, stage, elements, accounting),
        fixed=accounting.fixed_bytes,
    )


def rank_memory(
    profile: Profile, setup: StepSetup, rank: int, accounting: Accounting = OUR_ACCOUNTING
) -> MemoryUse:
    """The peak of a pipeline rank: of its one stage, or of several, whose activations do not peak together."""
    return MemoryModel(profile, setup, accounting).rank(rank)


def step_bytes(use: MemoryUse, setup: StepSetup, accounting: Accounting) -> int:
    """What the same rank holds in the optimizer's step, after the last backward: state, gradients and the step's own copies."""
    part = use.optimizer // (MOMENTS * setup.master_bytes)
    state = use.parameters + use.master + use.gradients + use.optimizer + use.fixed
    return state + max(round(part * accounting.update_bytes), accounting.bucket_bytes)


class _Work(NamedTuple):
    """Bytes of a unit: kept of a microbatch, brought back by recomputing, and its backward's own."""

    kept: int
    recomputed: int
    transient: int


def _works(
    units: Sequence[UnitCost], modes: Sequence[Recompute], accounting: Accounting, *, has_loss: bool
) -> list[_Work]:
    """What each unit of a stage holds; the last of the last stage as the framework's loss does."""
    kept = [unit.kept[mode] for unit, mode in zip(units, modes, strict=True)]
    works = [
        _Work(k.saved_bytes, k.extra_bytes, unit.transient_bytes) for k, unit in zip(kept, units, strict=True)
    ]
    if has_loss and accounting.loss is not None:
        works[-1] = _Work(0, 0, accounting.loss.kept_bytes + accounting.loss.transient_bytes)
    return works


def _losses_held(setup: StepSetup) -> int:
    """Most microbatches of the last stage between their F and their B or I: what a loss keeps, the gradients of weights do not need."""
    if setup.schedule == "1f1b" and setup.custom is None:
        return 1
    order, last = setup.short_order(), setup.num_stages - 1
    row = order.actions[order.stage_ranks[last]]
    return _peak_activation_bytes([a for a in row if a.stage == last and a.kind != "W"], {last: 1}, "I")


def _peak_activation_bytes(
    row: Sequence[Action], held: Mapping[int, int], last_half: Literal["I", "W"] = "W"
) -> int:
    """Most bytes of a rank's microbatches in flight, ``held`` by each on a stage from its F to the end of its B or of ``last_half``."""
    now = most = 0
    for action in row:
        if action.kind == "F":
            now += held[action.stage]
            most = max(most, now)
        elif action.kind in ("B", last_half):
            now -= held[action.stage]
    return most


def _held_at_ends(profile: Profile, setup: StepSetup, stage: int, accounting: Accounting) -> int:
    """Bytes of a microbatch that a stage received or sent and that no unit keeps."""
    received = profile.units[setup.starts[stage]].input_bytes if stage and accounting.has_own_receives else 0
    is_sender = accounting.keeps_sent and stage + 1 < setup.num_stages
    return received + (profile.units[setup.starts[stage + 1]].input_bytes if is_sender else 0)


def _communication_bytes(
    setup: StepSetup, profile: Profile, stage: int, elements: int, accounting: Accounting
) -> int:
    """Receives that are posted ahead, in both directions, and the copy of a bucket's part that ZeRO-1 gathers from."""
    stages = range(stage, min(stage + 2, setup.num_stages))
    ahead = accounting.num_posted_receives
    posted = sum(ahead * profile.units[setup.starts[s]].input_bytes for s in stages if s)
    bucket = min(setup.bucket_bytes, elements * setup.compute_bytes) // setup.num_shards
    return posted + (bucket if setup.sharding_level == 1 and accounting.copies_reduced_part else 0)
