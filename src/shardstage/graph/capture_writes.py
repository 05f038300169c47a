"""``Storages``: what a change in place becomes where every value is made once.

z = zeros(4, 8)                  z  = zeros(4, 8)
v = z[:, 1:]                     v  = slice(z, 1, 1)
v.copy_(x)              →        v′ = copy(v, x)
z.sum()                          z′ = slice_scatter(z, v′, 1, 1)
                                 sum(z′)                          and every other view of z is a view of z′
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from shardstage.compat import storage_key
from shardstage.errors import CaptureError
from shardstage.graph.model_graph import Op, Ref

__all__ = ["Storages"]

# Views of all elements: the inverse gives them the shape of what they viewed.
_RESHAPES = frozenset(
    f"aten.{name}"
    for name in (
        "view.default reshape.default flatten.using_ints unflatten.int unsqueeze.default squeeze.dim squeeze.default "
        "contiguous.default alias.default detach.default to.dtype to.device _unsafe_view.default view_as.default"
    ).split()
)
_SCATTERS = {
    "aten.slice.Tensor": "aten.slice_scatter.default",
    "aten.select.int": "aten.select_scatter.default",
    "aten.diagonal.default": "aten.diagonal_scatter.default",
}


@dataclass(eq=False)
class _View:
    """A value of a storage: ``name`` is the one that holds its present content; ``op`` made it of ``parent``."""

    name: str
    shape: tuple[int, ...]
    op: Op | None
    parent: _View | None
    output: int = 0


class Storages:
    """The values of a graph by the storage that they view."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self._inputs = frozenset(storage_key(tensor) for tensor in inputs.values())
        self._tensors: list[Tensor] = list(inputs.values())  # kept, so that their storages keep their keys
        self._views: dict[int, list[_View]] = {}

    def outlives_the_graph(self, tensor: Tensor) -> bool:
        """Whether a change of it is a change of an input, parameter or buffer, which must really happen."""
        return storage_key(tensor) in self._inputs

    def note(self, name: str, tensor: Tensor, op: Op, output: int = 0) -> None:
        """Records a value that an op has made."""
        self._tensors.append(tensor)
        group = self._views.setdefault(storage_key(tensor), [])
        parent = next((view for view in group if view.name in op.inputs), None)
        group.append(
            _View(
                name=name, shape=tuple(tensor.shape), op=op if parent else None, parent=parent, output=output
            )
        )

    def write(self, name: str, tensor: Tensor, result: str, emit: Callable[[Op], str]) -> dict[str, str]:
        """What becomes of each value of the storage when ``result`` takes the place of ``name``: old name → new name.

        ``emit`` adds an op, under a fresh name, and returns it. Raises CaptureError for a view that cannot be written through.
        """
        group = self._views.get(storage_key(tensor), [])
        written = next((view for view in group if view.name == name), None)
        if written is None:
            return {name: result}
        before = {view.name: view for view in group}
        written.name = result
        at = written
        while at.parent is not None:
            at.parent.name = emit(_scatter(at, at.parent))
            at = at.parent
        for view in group:
            if view.parent is not None and view.op is not None:
                view.name = emit(_on(view.op, view.parent.name, view.output))
        return {old: view.name for old, view in before.items()}


def _on(op: Op, parent: str, output: int) -> Op:
    """The same view of another value."""
    outputs = tuple(name if i == output else None for i, name in enumerate(op.outputs))
    return replace(op, args=(Ref(parent), *op.args[1:]), outputs=outputs)


def _scatter(view: _View, parent: _View) -> Op:
    """The parent's content with the view's in its place."""
    assert view.op is not None
    target, options = view.op.target, view.op.args[1:]
    source, onto = Ref(view.name), Ref(parent.name)
    if target in _SCATTERS:
        return replace(view.op, target=_SCATTERS[target], args=(onto, source, *options))
    if target in _RESHAPES:
        return replace(view.op, target="aten.reshape.default", args=(source, parent.shape), kwargs=())
    if target in ("aten.transpose.int", "aten.t.default"):
        return replace(view.op, args=(source, *options))
    if target == "aten.permute.default":
        inverse = tuple(sorted(range(len(options[0])), key=lambda i: options[0][i] % len(options[0])))
        return replace(view.op, args=(source, inverse))
    raise CaptureError(
        f"the model writes through a view made by {target}, which cannot be followed\n  at {view.op.source}",
        hint="write to the tensor itself, or make a new one",
    )
