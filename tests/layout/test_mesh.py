"""Ranks and coordinates name each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardstage.layout import AXES, Mesh

SIZES = st.builds(Mesh, pp=st.integers(1, 4), dp=st.integers(1, 5), tp=st.integers(1, 3))


@given(mesh=SIZES)
def test_coordinates_and_rank_are_inverse(mesh: Mesh) -> None:
    for rank in range(mesh.world_size):
        assert mesh.rank(**{axis: mesh.coordinate(rank, axis) for axis in AXES}) == rank


@given(mesh=SIZES)
def test_the_groups_of_an_axis_tile_the_ranks(mesh: Mesh) -> None:
    for axis in AXES:
        groups = mesh.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
        assert {len(group) for group in groups} == {mesh.size(axis)}


@given(mesh=SIZES)
def test_members_of_a_group_differ_along_its_axis_only(mesh: Mesh) -> None:
    for axis in AXES:
        for group in mesh.groups(axis):
            assert [mesh.coordinate(rank, axis) for rank in group] == list(range(mesh.size(axis)))
            for other in set(AXES) - {axis}:
                assert len({mesh.coordinate(rank, other) for rank in group}) == 1


@pytest.mark.parametrize(
    ("rank", "pp", "dp", "tp"), [(0, 0, 0, 0), (1, 0, 0, 1), (2, 0, 1, 0), (6, 1, 0, 0), (11, 1, 2, 1)]
)
def test_tp_is_innermost_and_pp_outermost(rank: int, pp: int, dp: int, tp: int) -> None:
    mesh = Mesh(pp=2, dp=3, tp=2)
    assert mesh.rank(pp=pp, dp=dp, tp=tp) == rank
    assert (mesh.coordinate(rank, "pp"), mesh.coordinate(rank, "dp"), mesh.coordinate(rank, "tp")) == (
        pp,
        dp,
        tp,
    )
