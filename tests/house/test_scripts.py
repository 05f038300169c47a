"""Commands that pages and docstrings show: a claim whose command does not run is no claim. Types are `make lint`'s."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from tests.house.source import ROOT, parse

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
    return {
        constant.value
        for call in calls(script, "add_argument")
        for given in (*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "choices"))
        for constant in ast.walk(given)
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    }


def folders_on_path(script: Path) -> list[Path]:
    """The script's own folder, and what it gives to ``sys.path``."""
    given = (*calls(script, "path.insert"), *calls(script, "path.append"))
    names = {"Path": Path, "__file__": str(script)}
    return [script.parent, *(Path(eval(ast.unparse(call.args[-1]), names)) for call in given)]


def calls(script: Path, name: str) -> Iterator[ast.Call]:
    """Of a method, such as ``"path.insert"``."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(f".{name}"):
            yield node


def unfound_modules(script: Path, every_module: set[str]) -> set[str]:
    """Of the modules beside scripts those that a start of this one imports, at whatever depth, and that lie in no folder on its path."""
    folders, waiting = folders_on_path(script), [script]
    read: set[Path] = set()
    unfound: set[str] = set()
    while waiting:
        file = waiting.pop()
        read.add(file)
        imports = parse(file.name, file.read_text(encoding="utf-8")).imports()
        for name in {found.target.split(".")[0] for found in imports} & every_module:
            home = next(filter(None, (files_of(name, folder) for folder in folders)), [])
            unfound |= set() if home else {name}
            waiting += [each for each in home if each not in read]
    return unfound


def files_of(module: str, folder: Path) -> list[Path]:
    """A module's file, or those of a package."""
    return [file for file in (folder / f"{module}.py", *(folder / module).glob("*.py")) if file.is_file()]


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


def test_a_script_finds_the_modules_beside_it() -> None:
    """`make lint` looks for them in the same folders for all; a script puts on its path what it names itself."""
    files = list((ROOT / SCRIPTS).rglob("*.py"))
    every_module = {file.stem for file in files}
    scripts = [file for file in files if "__main__" in file.read_text(encoding="utf-8")]
    assert len(scripts) >= 13
    assert {script: unfound for script in scripts if (unfound := unfound_modules(script, every_module))} == {}


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


def test_what_enters_a_recorded_unit_dies_with_its_backward() -> None:
    """A name for it kept it alive: the memory benchmark's replay was told to free what no one had allocated."""
    path = ROOT / SCRIPTS / "planner" / "memory" / "recorder.py"
    spec = spec_from_file_location("recorder", path)
    assert spec is not None and spec.loader is not None
    recorder = module_from_spec(spec)
    spec.loader.exec_module(recorder)
    given = torch.empty(3, 4, device="meta", requires_grad=True)
    passage = recorder.record(lambda x: torch.tanh(x) * 2, given, ())
    freed = {event.number for event in (*passage.forward, *passage.backward) if not event.num_bytes}
    assert passage.entered in freed
    assert passage.kept_elsewhere == []
