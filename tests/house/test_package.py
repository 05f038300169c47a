"""The package as a user meets it before anything else."""

from __future__ import annotations

import re
import tomllib

import pytest
from tests.house.source import ROOT

import shardstage


def test_every_exported_name_resolves() -> None:
    for name in shardstage.__all__:
        assert getattr(shardstage, name) is not None
    assert dir(shardstage) == sorted(shardstage.__all__)


def test_a_name_that_does_not_exist_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Shard'"):
        _ = shardstage.Shard


def test_the_version_is_the_project_file_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert shardstage.__version__ == project["version"]


def test_constraints_pin_every_dependency_that_the_tests_need() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["hf"], *extras["dev"]]
    names = {re.split(r"[<>=\[]", line)[0] for line in wanted} - {"shardstage"}
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    }
    assert names - pinned == set()
