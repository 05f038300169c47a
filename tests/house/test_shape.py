"""How the code reads, where a machine can tell: sizes, names, docstrings (STYLE.md)."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess

from tests.house.source import ROOT, SOURCE, modules

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_MEDIAN_FUNCTION_LINES = 12
BANNED_MODULES = {
    "utils",
    "util",
    "helpers",
    "helper",
    "common",
    "manager",
    "base",
    "misc",
    "worker",
    "chunk",
    "handle",
    "process",
}
# Written in pieces, so that this file does not offend itself.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:" + "work|root|" + "home)/[a-z]")


def function_lengths() -> list[tuple[int, str]]:
    return sorted(
        (function.end_lineno - function.lineno + 1, f"{module.path}:{function.lineno} {function.name}")
        for module in modules()
        for function in module.functions()
        if function.end_lineno is not None
    )


def tracked_text_files() -> list[str]:
    """Empty in a source archive, which has no list of tracked files."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    suffixes = (".py", ".md", ".toml", ".txt", ".sh", "Makefile", ".ci/run")
    return [
        name for name in listed.stdout.splitlines() if name.endswith(suffixes) and (ROOT / name).is_file()
    ]


def test_a_file_holds_one_idea() -> None:
    sizes = {module.path: module.text.count("\n") for module in modules()}
    assert {path: lines for path, lines in sizes.items() if lines > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    lengths = function_lengths()
    long = [where for lines, where in lengths if lines > MAX_FUNCTION_LINES]
    assert len(long) <= 0.05 * len(lengths), long
    assert statistics.median(lines for lines, _ in lengths) <= MAX_MEDIAN_FUNCTION_LINES


def test_every_module_says_what_it_is_for() -> None:
    assert [module.path for module in modules() if not ast.get_docstring(module.tree)] == []


def test_every_folder_of_source_is_a_package() -> None:
    folders = {path.parent for path in SOURCE.rglob("*.py")}
    assert [
        folder.relative_to(ROOT).as_posix() for folder in folders if not (folder / "__init__.py").is_file()
    ] == []


def test_no_module_is_named_after_nothing() -> None:
    # A process group is torch's own term.
    named = {
        module.path: set(re.split(r"[/_.]", module.path.replace("process_group", ""))) for module in modules()
    }
    assert [path for path, words in named.items() if words & BANNED_MODULES] == []


def test_no_state_lives_in_a_module() -> None:
    found = [
        f"{module.path}:{node.lineno}"
        for module in modules()
        for function in module.functions()
        for node in ast.walk(function)
        if isinstance(node, ast.Global)
    ]
    assert found == []


def test_data_of_the_planning_half_is_frozen_and_keyword_only() -> None:
    """A small value with slots, made by the thousand, may be positional."""
    data_packages = {"cluster", "layout", "timeline", "schedule", "plan", "program"}
    found = [
        f"{module.path}:{node.lineno} {node.name}"
        for module in modules()
        if module.package in data_packages
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
        for decorator in map(ast.unparse, node.decorator_list)
        if "dataclass" in decorator
        and not ("frozen=True" in decorator and ("kw_only=True" in decorator or "slots=True" in decorator))
    ]
    assert found == []


def test_no_file_names_a_path_of_one_machine() -> None:
    found = [
        f"{name}:{number}"
        for name in tracked_text_files()
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []
