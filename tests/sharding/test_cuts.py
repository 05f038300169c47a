"""A cut becomes coarser when asked, and ends whole where nothing fits."""

from __future__ import annotations

from fractions import Fraction

from shardstage.layout import Shard
from shardstage.sharding.cuts import Cut, Cuts
from shardstage.sharding.state import Blocked, Origin, Refine


def cuts_of(length: int) -> Cuts:
    cuts = Cuts(2)
    assert cuts.shard("w", 0, length) is not None
    return cuts


def test_a_dim_is_cut_as_fine_as_can_be_at_first() -> None:
    assert Cuts(3).shard("w", 1, 10) == Shard(dim=1, sections=((4, 3, 3),))


def test_a_unit_is_never_divided() -> None:
    cuts = cuts_of(20)
    assert cuts.reconsider(Refine("v", "heads", unit=4), (cuts.origin("w"),)) == ("w",)
    assert cuts.shard("w", 0, 20) == Shard(dim=0, sections=((12, 8),))


def test_a_unit_of_a_value_is_scaled_to_the_parameter() -> None:
    cuts = cuts_of(24)
    heads = Origin("w", Fraction(4), 0, 1)
    cuts.reconsider(Refine("v", "groups of two heads", unit=2), (heads,))
    assert cuts.shard("w", 0, 24) == Shard(dim=0, sections=((16, 8),))
    assert cuts.unit(heads) == 2


def test_boundaries_make_sections_that_are_cut_on_their_own() -> None:
    cuts = cuts_of(18)
    cuts.reconsider(Refine("v", "split", boundaries=(6, 12, 18)), (cuts.origin("w"),))
    assert cuts.shard("w", 0, 18) == Shard(dim=0, sections=((3, 3),) * 3)


def test_one_section_may_be_coarser_than_the_others() -> None:
    cut = Cut(sections=(8, 4), units=(1, 1)).with_unit(4, 0, 1)
    assert cut == Cut(sections=(8, 4), units=(4, 1))


def test_a_unit_that_does_not_divide_leaves_the_parameter_whole() -> None:
    cuts = cuts_of(10)
    cuts.reconsider(Refine("v", "no such heads", unit=4), (cuts.origin("w"),))
    assert cuts.shard("w", 0, 10) is None
    assert cuts.whole == {"w": "no such heads"}


def test_a_request_that_changes_nothing_leaves_the_parameter_whole() -> None:
    cuts = cuts_of(8)
    for _ in range(2):
        cuts.reconsider(Refine("v", "asked twice", unit=2), (cuts.origin("w"),))
    assert cuts.whole == {"w": "asked twice"}


def test_what_is_blocked_is_whole_for_the_first_reason_given() -> None:
    cuts = cuts_of(8)
    origin = cuts.origin("w")
    cuts.reconsider(Blocked(("v",), "first"), (origin,))
    cuts.reconsider(Blocked(("v",), "second"), (origin,))
    assert cuts.whole == {"w": "first"}


def test_a_parameter_is_cut_along_one_dim_only() -> None:
    cuts = cuts_of(8)
    assert cuts.shard("w", 1, 4) is None
