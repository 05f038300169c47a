"""``require_modules``: refuses named modules that a plan cannot recompute; ``children_of_layers``: what one may name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import translate

from shardstage.errors import PlanError
from shardstage.graph import ModelGraph
from shardstage.graph.named_modules import modules_of_layers

__all__ = ["children_of_layers", "require_modules"]


def require_modules(modules: Sequence[str], graph: ModelGraph, *, is_compiled: bool = False) -> None:
    """Raises ``PlanError`` for a glob that matches no module within a layer, and for modules in a plan that compiles blocks."""
    if not modules:
        return
    if is_compiled:
        raise PlanError(
            f"modules={'/'.join(modules)} cuts layers into parts, and compile makes one kernel plan for each layer as a whole",
            hint='--plan "...,compile,recompute=full", or leave out compile',
        )
    paths = modules_of_layers(graph)
    for glob in modules:
        pattern = re.compile(translate(glob))
        if not any(map(pattern.match, paths)):
            raise PlanError(
                f"modules={glob} matches no module in a layer of this model{_example(paths)}",
                hint=f'--plan "...,recompute=selective,modules={"/".join(_near(glob, paths)) or "*"}"',
            )


def children_of_layers(graph: ModelGraph) -> tuple[str, ...]:
    """Names of the modules that a layer consists of, such as ``self_attn``, in graph order; those of all kinds of layer."""
    layers = {block.module for block in graph.blocks if block.is_layer}
    found = (path.rpartition(".") for path in modules_of_layers(graph))
    return tuple(dict.fromkeys(name for layer, _, name in found if layer in layers))


def _example(paths: Sequence[str]) -> str:
    return f", which are called {paths[-1]} and the like" if paths else ": it has no layers"


def _near(glob: str, paths: Sequence[str]) -> Iterator[str]:
    """Globs for the modules whose names come closest."""
    globs = {path.rpartition(".")[2]: "*." if "." in path else "" for path in paths}
    asked = glob.rpartition(".")[2].strip("*?")
    yield from (f"{globs[name]}{name}" for name in get_close_matches(asked, globs, n=2, cutoff=0.5))
