"""The seconds of a step by cause: they add up, each axis shows in its own, and a cluster's calibration weighs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.cluster.test_calibration import FACTORS, FOUND
from tests.cost.machines import round_machine
from tests.cost.test_memory import setup
from tests.cost.toy import toy_graph

from shardstage.cluster import CAUSES, Cluster
from shardstage.cost import Links, Prediction, fold, least_step_s, predict_step, profile
from shardstage.cost.step import CALIBRATIONS
from shardstage.layout import Mesh

GRAPH = toy_graph(num_layers=4)
MESHES: tuple[dict[str, Any], ...] = (
    {"mesh": Mesh()},
    {"mesh": Mesh(dp=4)},
    {"mesh": Mesh(dp=4), "zero": 1},
    {"mesh": Mesh(dp=4), "zero": 3},
    {"mesh": Mesh(tp=2)},
    {"mesh": Mesh(pp=2), "starts": (0, 3), "num_microbatches": 4},
    {"mesh": Mesh(dp=2, pp=2, tp=2), "starts": (0, 2), "num_microbatches": 8, "recompute": "full"},
    {
        "mesh": Mesh(pp=2),
        "starts": (0, 3),
        "num_microbatches": 4,
        "recompute": "selective",
        "schedule": "gpipe",
    },
)


def both(cluster: Cluster, changes: dict[str, Any]) -> tuple[Prediction, float]:
    """The prediction, and its lower bound."""
    case = setup(**changes)
    units = profile(fold(GRAPH), cluster, tp=case.mesh.tp, microbatch=case.microbatch, sequence=16)
    links = Links(cluster, case.mesh)
    return predict_step(units, case, links), least_step_s(units, case, links)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("changes", MESHES)
def test_parts_add_up_to_the_step(changes: dict[str, Any], kind: str) -> None:
    found, _ = both(round_machine(64, kind=kind, op_latency_s=1e-6, latency_s=1e-5), changes)
    assert tuple(found.parts) == CAUSES
    assert min(found.parts.values()) >= 0
    assert CALIBRATIONS[kind].expected * sum(found.parts.values()) == pytest.approx(found.step_time_s)


def test_each_axis_shows_in_its_own_part() -> None:
    cluster = round_machine(64, latency_s=1e-3)
    for axis in ("dp", "tp", "pp"):
        starts = {"starts": (0, 3)} if axis == "pp" else {}
        found, _ = both(cluster, {"mesh": Mesh(**{axis: 2}), **starts})
        for other in ("tp", "pp"):
            assert (found.parts[other] > 1e-12) == (axis == other)
        assert found.parts["dp"] > 0, "the sum of the norm talks to all ranks"


def test_launching_is_the_host_s() -> None:
    quick, slow = (both(round_machine(1, op_latency_s=s), {"mesh": Mesh()})[0] for s in (0.0, 1e-3))
    assert quick.parts["host"] == 0
    assert slow.parts["products"] == pytest.approx(quick.parts["products"])
    assert slow.parts["host"] == pytest.approx(
        slow.step_time_s - quick.step_time_s - (slow.optimizer_s - quick.optimizer_s)
    )


def test_recomputing_repeats_each_part_but_no_more_products_than_asked() -> None:
    cluster = round_machine(1, op_latency_s=1e-5)
    none, some, full = (
        both(cluster, {"mesh": Mesh(), "recompute": recompute})[0].parts
        for recompute in ("none", "selective", "full")
    )
    assert none["memory"] < some["memory"] == pytest.approx(full["memory"])
    assert none["products"] < full["products"]
    assert some["products"] < full["products"]


@pytest.mark.parametrize("changes", MESHES)
def test_a_calibrated_cluster_weighs_the_parts_and_brings_its_own_interval(changes: dict[str, Any]) -> None:
    plain, _ = both(round_machine(64), changes)
    found, bound = both(replace(round_machine(64), calibration=FOUND), changes)
    assert found.parts == plain.parts
    assert found.step_time_s == pytest.approx(sum(FACTORS[cause] * plain.parts[cause] for cause in CAUSES))
    assert (found.step_time_low_s, found.step_time_s, found.step_time_high_s) == FOUND.range_s(found.parts)
    assert found.samples_per_s == pytest.approx(setup(**changes).global_batch / found.step_time_s)
    assert 0 < bound <= found.step_time_s * (1 + 1e-12), "the search would lose the best plan"
