"""The source tree as data: modules, their imports and their functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "shardstage"

# DESIGN.md §3: a package imports only from those above it.
ORDER = (
    "errors",
    "units",
    "compat",
    "graph",
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
    "operators",
    "runtime",
    "data",
    "checkpoint",
    "training",
    "parity",
    "rehearsal",
    "inference",
    "report",
    "cli",
)


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported name: ``target`` is absolute, such as ``"torch.distributed"``."""

    target: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Module:
    """One source file; ``path`` is relative to the package, such as ``"graph/capture.py"``."""

    path: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        """The word of the tree that the module belongs to, such as ``"graph"``; "" for ``__init__``."""
        first = self.path.split("/")[0].removesuffix(".py")
        return "" if first.startswith("__") else first

    @property
    def dotted(self) -> str:
        return ".".join(["shardstage", *Path(self.path).with_suffix("").parts]).removesuffix(".__init__")

    def imports(self, *, eager_only: bool = False) -> Iterator[Import]:
        """Every import; ``eager_only`` leaves out those inside functions and under ``TYPE_CHECKING``."""
        for node in _eager(self.tree) if eager_only else ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(target=alias.name, line=node.lineno)
            elif isinstance(node, ast.ImportFrom):
                home = self._absolute(node)
                for alias in node.names:
                    yield Import(target=f"{home}.{alias.name}", line=node.lineno)

    def attribute_chains(self) -> Iterator[Import]:
        """Every dotted expression, such as ``torch.distributed.all_reduce``."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute):
                yield Import(target=ast.unparse(node), line=node.lineno)

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node

    def _absolute(self, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        is_package = self.path.endswith("__init__.py")
        parts = self.dotted.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])


@cache
def modules() -> tuple[Module, ...]:
    """All source files of the package, in order of path."""
    return tuple(
        Module(path=path.relative_to(SOURCE).as_posix(), text=text, tree=ast.parse(text, str(path)))
        for path in sorted(SOURCE.rglob("*.py"))
        for text in [path.read_text(encoding="utf-8")]
    )


def parse(path: str, text: str) -> Module:
    """A module that exists only in a test."""
    return Module(path=path, text=text, tree=ast.parse(text))


def _eager(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the file is imported."""
    for node in ast.iter_child_nodes(tree):
        is_late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if is_late or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            continue
        yield node
        yield from _eager(node)
