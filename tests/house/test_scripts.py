"""Commands that pages and docstrings show: a claim whose command does not run is no claim. Types are `make lint`'s."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.house.source import ROOT

SCRIPTS = "benchmarks"
# A comment, prose or a quote ends a command; its options may stand in brackets.
COMMAND = re.compile(rf"python3? ({SCRIPTS}/[\w/]+\.py)((?: \[?[^\s`#(\"]+)*)")


def commands(text: str) -> Iterator[tuple[str, set[str]]]:
    """The script and the options of each command; a first word without dashes is what is to be run."""
    for script, rest in COMMAND.findall(text):
        words = rest.split()
        yield script, {*re.findall(r"--[\w-]+", rest), *(words[:1] if re.match(r" \w", rest) else [])}


def accepted(script: Path) -> set[str]:
    """Options and choices that its parser is given, read from the source: peers that it imports need not be installed."""
    calls = (
        node for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    )
    return {
        constant.value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
        for given in (*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "choices"))
        for constant in ast.walk(given)
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    }


def pages() -> Iterator[Path]:
    yield ROOT / "README.md"
    for folder, kind in (("docs", "*.md"), (SCRIPTS, "*.md"), (SCRIPTS, "*.py")):
        yield from sorted((ROOT / folder).rglob(kind))


def test_a_command_that_is_shown_names_a_script_and_options_that_exist() -> None:
    shown = [(page, *command) for page in pages() for command in commands(page.read_text(encoding="utf-8"))]
    assert len(shown) >= 20
    for page, script, words in shown:
        assert (ROOT / script).is_file(), f"{page}: {script}"
        assert words <= accepted(ROOT / script), f"{page}: {script} {words}"


def test_every_benchmark_has_a_page_that_says_how_to_run_it() -> None:
    for script in (ROOT / SCRIPTS).rglob("run.py"):
        page = script.with_name("README.md").read_text(encoding="utf-8")
        assert script.relative_to(ROOT).as_posix() in {name for name, _ in commands(page)}, script


def test_a_command_ends_where_prose_begins() -> None:
    text = (
        "PYTHONPATH=src python benchmarks/a/run.py --rows --only x  # --not-an-option\n"
        "`python benchmarks/b/run.py` (`--rows` prints every run)\n"
        "python benchmarks/c/run.py [--rates 1,5] [--out FILE]   (root: it --makes hosts)\n"
        "python benchmarks/d/run.py search      the best --named schedule\n"
    )
    found = [("a", {"--rows", "--only"}), ("b", set()), ("c", {"--rates", "--out"}), ("d", {"search"})]
    assert list(commands(text)) == [(f"benchmarks/{name}/run.py", words) for name, words in found]
