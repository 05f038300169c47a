"""What one asks as text, and what the answers must be."""

from __future__ import annotations

import pytest
from tests.simulator.planned_cases import CLUSTER, GRAPH, planned
from tests.simulator.programs import MESSAGE_BYTES, pipeline, prices

from shardstage.errors import ConfigError
from shardstage.program import Program, lower
from shardstage.simulator import Change, PlannedPrices, changed_plan, parse_change, planned_prices, what_if


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("bandwidth=0.5", Change(kind="bandwidth", value=0.5)),
        ("node.bandwidth=2", Change(kind="bandwidth", value=2, level="node")),
        ("network.latency=10", Change(kind="latency", value=10, level="network")),
        ("slow=3:1.5", Change(kind="slow", value=1.5, rank=3)),
        ("nodes=+2", Change(kind="nodes", value=2)),
        ("nodes=-1", Change(kind="nodes", value=-1)),
        ("dp=16", Change(kind="dp", value=16)),
        ("microbatch=2", Change(kind="microbatch", value=2)),
    ],
)
def test_a_change_reads_back_what_it_writes(text: str, change: Change) -> None:
    assert parse_change(text) == change
    assert str(change) == text


@pytest.mark.parametrize(
    ("text", "problem", "hint"),
    [
        ("bandwith=2", "is no change; one can ask for bandwidth, latency, slow", "bandwidth=0.5"),
        ("bandwidth", "is no change", "bandwidth=0.5"),
        ("bandwidth=half", "'half' is no positive factor", "bandwidth=0.5"),
        ("latency=-1", "'-1' is no positive factor", "latency=2"),
        ("slow=1.5", "names no rank and factor", "slow=3:1.5"),
        ("slow=3:0", "'0' is no positive factor", "slow=3:1.5"),
        ("nodes=2", "is not a number with a sign", "nodes=+2"),
        ("dp=0", "is not a number of one or more", "dp=16"),
        ("microbatch=2.5", "is not a number of one or more", "microbatch=2"),
        ("node.slow=3:1.5", "only bandwidth and latency are of a link level", "slow=3:1.5"),
    ],
)
def test_a_text_that_is_no_change_is_refused_with_a_right_one(text: str, problem: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        parse_change(text)
    assert f'--what-if "{hint}"' in str(caught.value)


def test_half_the_bandwidth_doubles_what_messages_take() -> None:
    """One rank's worth of talk: two stages, one microbatch, a message of a second each way."""
    program, table = pipeline("gpipe", 2, 1), prices(2, bytes_per_s=MESSAGE_BYTES, latency_s=0.25)
    found = what_if(program, table, parse_change("bandwidth=0.5"))
    assert (found.before_s, found.after_s) == (6 + 2 * 1.25, 6 + 2 * 2.25)
    assert found.speed_up == pytest.approx(8.5 / 10.5)
    assert what_if(program, table, parse_change("latency=2")).after_s == 6 + 2 * 1.5


def test_only_the_links_of_a_level_change() -> None:
    """Four stages on a node of four: nothing crosses the network."""
    _, program, priced = planned("pp=4,mb=2")
    inside = what_if(program, priced, parse_change("node.bandwidth=0.1"))
    outside = what_if(program, priced, parse_change("network.bandwidth=0.1"))
    assert inside.after_s > inside.before_s and outside.after_s == outside.before_s
    with pytest.raises(ConfigError, match="no link level 'rack'; the cluster's are: node, network"):
        what_if(program, priced, parse_change("rack.bandwidth=0.1"))


def test_a_slow_device_holds_up_the_pipeline() -> None:
    program, table = pipeline("1f1b", 4, 8), prices(4)
    found = what_if(program, table, parse_change("slow=2:2"))
    assert found.before_s == 33
    assert found.after_s == 2 + 8 * 6 + 4 + 1, (
        "two forwards come before it, two backwards after, and once it waits for the last stage"
    )
    with pytest.raises(ConfigError, match="there are ranks 0 to 3"):
        what_if(program, table, parse_change("slow=4:2"))


def test_another_plan_is_lowered_anew() -> None:
    plan, program, priced = planned("pp=2,dp=2,mb=2")

    def lowered(change: Change) -> tuple[Program, PlannedPrices]:
        other = changed_plan(plan, change, devices_per_node=4)
        return lower(GRAPH, other), planned_prices(GRAPH, other, CLUSTER)

    assert what_if(program, priced, parse_change("dp=4"), lower=lowered).speed_up > 1
    assert what_if(program, priced, parse_change("nodes=+1"), lower=lowered).speed_up > 1
    assert what_if(program, priced, parse_change("microbatch=16"), lower=lowered).speed_up < 1
    with pytest.raises(ConfigError, match="changes the plan, and this program's model is not at hand"):
        what_if(program, priced, parse_change("dp=4"))


def test_plans_that_a_change_cannot_make_are_refused() -> None:
    plan, _, _ = planned("pp=2,dp=2,mb=2")
    assert changed_plan(plan, parse_change("nodes=+1"), devices_per_node=4).mesh.dp == 4
    assert changed_plan(plan, parse_change("dp=3"), devices_per_node=4).shares == (11, 11, 10)
    assert changed_plan(plan, parse_change("microbatch=99"), devices_per_node=4).microbatch == 16
    with pytest.raises(ConfigError, match="leaves 0 ranks, and one copy of the model takes 2"):
        changed_plan(plan, parse_change("nodes=-1"), devices_per_node=4)
    with pytest.raises(ConfigError, match="makes 33 data-parallel ranks"):
        changed_plan(plan, parse_change("dp=33"), devices_per_node=4)
