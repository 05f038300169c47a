"""``find_repeats`` and ``shallow``: a deep model cut down to the layers that its capture needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shardstage.graph.unfold import Repeat

__all__ = ["find_repeats", "shallow"]

FEWEST_DROPPED = 6
"""Layers: below this a capture of the whole list takes no longer than the search for a shorter one."""

LONGEST_PERIOD = 8
"""Of kinds of layers: Gemma 3 has five with a window and one without, Jamba's pattern is eight long."""

_LEAD = 1  # the first layer is kept besides: it may make what all layers share, such as a position bias
_PLAIN = (bool, int, float, str, bytes, type(None))


def find_repeats(model: nn.Module) -> tuple[Repeat, ...]:
    """The outermost lists of modules in which enough members are built alike to leave some out of a capture."""
    return tuple(_repeats_under(model, ""))


def _repeats_under(module: nn.Module, path: str) -> Iterator[Repeat]:
    if isinstance(module, nn.ModuleList | nn.Sequential):
        found = _repeat(path, list(module.children()))
        if found is not None:
            yield found
            return
    for name, child in module.named_children():
        yield from _repeats_under(child, f"{path}.{name}" if path else name)


@contextmanager
def shallow(model: nn.Module, repeats: Sequence[Repeat]) -> Iterator[None]:
    """While entered, the model's lists lack the members that the repeats stand for; the members behind them have moved up."""
    lists = [(model.get_submodule(repeat.path), repeat) for repeat in repeats]
    whole = [dict(module._modules) for module, _ in lists]
    try:
        for module, repeat in lists:
            members = list(module._modules.values())
            end = repeat.first + repeat.period
            kept = [*members[:end], *members[end + repeat.copies * repeat.period :]]
            module._modules.clear()
            module._modules.update({str(i): member for i, member in enumerate(kept)})
        yield
    finally:
        for (module, _), members_before in zip(lists, whole, strict=True):
            module._modules.clear()
            module._modules.update(members_before)


def _repeat(path: str, members: Sequence[nn.Module]) -> Repeat | None:
    """The longest stretch of members that are built alike, or alternate; before it one more is kept, and a period on either side."""
    if len(members) < FEWEST_DROPPED or len({id(member) for member in members}) < len(members):
        return None
    kinds = _kinds(members)
    best: Repeat | None = None
    for period in range(1, LONGEST_PERIOD + 1):
        for lead in range(_LEAD, len(kinds) - 3 * period):
            stop = lead + period
            while stop < len(kinds) and kinds[stop] == kinds[stop - period]:
                stop += 1
            copies = (stop - lead) // period - 3
            if copies * period > (best.copies * best.period if best else FEWEST_DROPPED - 1):
                best = Repeat(path=path, first=lead + period, period=period, copies=copies)
    return best


def _kinds(members: Sequence[nn.Module]) -> list[int]:
    """A number per member, equal for those that differ neither in modules, sizes nor settings, but for their place in the list."""
    traits = [_traits(member) for member in members]
    counted = {key for key in traits[0] if [trait.get(key) for trait in traits] == list(range(len(members)))}
    found: dict[tuple[Any, ...], int] = {}
    kinds = []
    for trait in traits:
        kept = tuple((key, value) for key, value in trait.items() if key not in counted)
        kinds.append(found.setdefault(kept, len(found)))
    return kinds


def _traits(member: nn.Module) -> dict[str, Any]:
    """Everything about a module that its forward may depend on, by path: classes, sizes, plain attributes."""
    traits: dict[str, Any] = {}
    for path, module in member.named_modules():
        traits[f"{path}:class"] = type(module)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            is_parameter = isinstance(tensor, nn.Parameter)
            traits[f"{path}:{name}"] = (tuple(tensor.shape), tensor.dtype, tensor.requires_grad, is_parameter)
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE:
                traits[f"{path}.{name}"] = _trait(value)
    return traits


def _trait(value: Any) -> Any:
    """A plain value as it is; of anything else what it is called, or which object it is."""
    if isinstance(value, _PLAIN):
        return (type(value), value) if isinstance(value, bool | float) else value
    if isinstance(value, tuple | list | set | frozenset):
        return (type(value), *map(_trait, value))
    if isinstance(value, Mapping):
        return (type(value), *((_trait(key), _trait(item)) for key, item in value.items()))
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    return (type(value), getattr(value, "__qualname__", "")) if callable(value) else (type(value), id(value))


_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
