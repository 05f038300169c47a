"""The law of DESIGN.md §3: who may import whom."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable

import pytest
from tests.house.source import ORDER, SOURCE, Module, modules, parse

TORCH_FREE = (
    "errors",
    "units",
    "cluster",
    "layout",
    "timeline",
    "sharding",
    "schedule",
    "cost",
    "plan",
    "program",
    "simulator",
    "planner",
)
# What turns a model into a graph, as opposed to the graph itself.
GRAPH_WITH_TORCH = (
    "graph/capture",
    "graph/fallback",
    "graph/normalise",
    "graph/saved_trace",
    "graph/skeleton",
    "graph/source",
    "graph/tasks",
)
USES_DISTRIBUTED = ("compat", "operators", "runtime", "checkpoint", "inference")


def is_torch_free(module: Module) -> bool:
    if module.package == "graph":
        return not module.path.startswith(GRAPH_WITH_TORCH)
    return module.package in TORCH_FREE and module.path != "cluster/probe.py"


def may_use_distributed(module: Module) -> bool:
    return module.package in USES_DISTRIBUTED or module.path == "cluster/probe.py"


def upward_imports(module: Module) -> list[str]:
    """Imports of a package that is not above the module's own, as ``file:line imports target``."""
    if module.package == "":
        return []
    allowed = ORDER[: ORDER.index(module.package) + 1]
    return [
        f"{module.path}:{found.line} imports {found.target}"
        for found in module.imports()
        if found.target.startswith("shardstage.")
        and found.target.split(".")[1] not in (*allowed, "__version__")
    ]


def torch_imports(module: Module, *, eager_only: bool = False) -> list[str]:
    return [
        f"{module.path}:{found.line} imports {found.target}"
        for found in module.imports(eager_only=eager_only)
        if found.target.split(".")[0] == "torch"
    ]


def distributed_names(module: Module) -> list[str]:
    found = (*module.imports(), *module.attribute_chains())
    return [f"{module.path}:{name.line} {name.target}" for name in found if is_distributed(name.target)]


def is_distributed(name: str) -> bool:
    return name == "torch.distributed" or name.startswith("torch.distributed.")


def private_torch_names(module: Module) -> list[str]:
    found = (*module.imports(), *module.attribute_chains())
    return sorted(
        {f"{module.path}:{name.line} {name.target}" for name in found if is_private_torch(name.target)}
    )


def is_private_torch(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "torch" and any(is_private(part) for part in parts[1:])


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def offences(rule_of: Iterable[list[str]]) -> list[str]:
    return [line for lines in rule_of for line in lines]


def test_every_package_has_its_place_in_the_order() -> None:
    assert {module.package for module in modules()} - {""} <= set(ORDER)


def test_a_package_imports_only_from_those_above_it() -> None:
    assert offences(upward_imports(module) for module in modules()) == []


def test_planning_packages_never_import_torch() -> None:
    assert offences(torch_imports(module) for module in modules() if is_torch_free(module)) == []


def test_torch_distributed_appears_only_where_ranks_talk() -> None:
    assert (
        offences(distributed_names(module) for module in modules() if not may_use_distributed(module)) == []
    )


def test_private_torch_names_live_in_compat() -> None:
    outside = (module for module in modules() if module.path != "compat.py")
    assert offences(private_torch_names(module) for module in outside) == []


@pytest.mark.parametrize(
    ("reader", "stranger"), [("simulator", "runtime"), ("runtime", "simulator"), ("planner", "runtime")]
)
def test_prediction_and_execution_meet_only_in_program_and_timeline(reader: str, stranger: str) -> None:
    home = f"shardstage.{stranger}"
    found = [
        f"{module.path}:{name.line}"
        for module in modules()
        if module.package == reader
        for name in module.imports()
        if name.target == home or name.target.startswith(f"{home}.")
    ]
    assert found == []


def test_modules_import_each_other_without_cycles() -> None:
    graph = {module.dotted: imported_modules(module) for module in modules()}
    assert find_cycle(graph) is None


def test_nothing_that_planning_modules_load_imports_torch() -> None:
    graph = {module.dotted: imported_modules(module) for module in modules()}
    with_torch = {module.dotted for module in modules() if torch_imports(module, eager_only=True)}
    found = {
        f"{module.path} → {name}"
        for module in modules()
        if is_torch_free(module)
        for name in reachable(module.dotted, graph) & with_torch
    }
    assert found == set()


def test_importing_the_cluster_leaves_torch_unloaded() -> None:
    """The law above read from the source; here once by running it."""
    code = "import sys, shardstage, shardstage.cluster, shardstage.units; sys.exit('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SOURCE.parent)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_law_sees_an_import_of_a_lower_package_in_any_form() -> None:
    texts = (
        "from shardstage.runtime import Engine",
        "import shardstage.runtime.stage",
        "from ..runtime import Engine",
    )
    for text in (*texts, "from shardstage import runtime", "def late():\n    from shardstage import cli"):
        assert len(upward_imports(parse("plan/check.py", text))) == 1


def test_the_law_sees_torch_distributed_and_private_names_in_any_form() -> None:
    for text in (
        "import torch.distributed as dist",
        "from torch import distributed",
        "torch.distributed.barrier()",
    ):
        assert distributed_names(parse("parity/compare.py", text))
    for text in (
        "torch._C._log()",
        "from torch.distributed._tensor import x",
        "from torch.fx import _pytree",
    ):
        assert private_torch_names(parse("graph/capture.py", text))
    assert private_torch_names(parse("graph/capture.py", "torch.__version__; torch.add_(x)")) == []


def test_what_a_module_loads_includes_the_packages_around_it() -> None:
    graph = {"a": set(), "a.b": {"c.d"}, "c": {"e"}, "c.d": set(), "e": set(), "f": {"a"}}
    assert reachable("a.b", graph) == {"a", "a.b", "c", "c.d", "e"}


def test_the_law_sees_a_cycle() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def imported_modules(module: Module) -> set[str]:
    """The source modules that load when ``module`` is imported; an import inside a function runs later."""
    names = {other.dotted for other in modules()}
    targets = {found.target for found in module.imports(eager_only=True)}
    direct = {target if target in names else target.rpartition(".")[0] for target in targets}
    return (direct & names) - {module.dotted}


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    """All that loads with a module: what it imports, the packages around that, and so on."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [*graph.get(name, ()), *filter(None, [name.rpartition(".")[0]])]
    return found


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """The first cycle by depth-first search, as the path that closes on itself; None when there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for target in sorted(graph.get(name, ())):
            if cycle := visit(target, [*path, name]):
                return cycle
        done.add(name)
        return None

    return next((cycle for name in sorted(graph) if (cycle := visit(name, []))), None)
