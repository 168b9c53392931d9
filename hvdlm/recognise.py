"""Finds objects to distribute among arguments, inside lists, tuples and dicts too, and puts their stand-ins back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hvdlm.contracts import Kind
from hvdlm.errors import DataError
from hvdlm.world import World

__all__ = ["find", "part_of", "recognises", "replace", "replace_all"]


def find(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], recognise: Callable[[object], Kind | None]
) -> list[tuple[str, Kind, Any]]:
    """(where, kind, object) of each recognised object, each object once.

    >>> find(([1, "a"],), {"n": 2}, lambda v: "model" if isinstance(v, int) else None)
    [('arg0.0', 'model', 1), ('n', 'model', 2)]
    """
    found: dict[int, tuple[str, Kind, Any]] = {}
    named = [(f"arg{i}", value) for i, value in enumerate(args)]
    for name, value in itertools.chain(named, kwargs.items()):
        for where, leaf in _leaves(name, value):
            kind = recognise(leaf)
            if kind is not None:
                found.setdefault(id(leaf), (where, kind, leaf))
    return list(found.values())


def _leaves(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    if type(value) in (list, tuple):
        for i, item in enumerate(value):
            yield from _leaves(f"{where}.{i}", item)
    elif type(value) is dict:
        for key, item in value.items():
            yield from _leaves(f"{where}.{key}", item)
    else:
        yield where, value


def replace(value: Any, stand_ins: Mapping[int, Any]) -> Any:
    """``value`` with each object whose ``id`` is a key replaced; containers are copied only where something changes."""
    if id(value) in stand_ins:
        return stand_ins[id(value)]
    if type(value) in (list, tuple):
        items = [replace(item, stand_ins) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else type(value)(items)
    if type(value) is dict:
        changed = {key: replace(item, stand_ins) for key, item in value.items()}
        return value if all(changed[key] is value[key] for key in value) else changed
    return value


def replace_all(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recognise: Callable[[object], Kind | None],
    attach: Callable[[list[tuple[str, Kind, Any]]], list[Any]],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with what ``attach`` gives instead of each recognised object."""
    found = find(args, kwargs, recognise)
    stand_ins = {id(old): new for (_, _, old), new in zip(found, attach(found), strict=True) if new is not old}
    return tuple(replace(a, stand_ins) for a in args), {k: replace(v, stand_ins) for k, v in kwargs.items()}


def recognises(args: tuple[Any, ...], kwargs: Mapping[str, Any], recognise: Callable[[object], Kind | None]) -> bool:
    """Whether there is something to train among some arguments."""
    return any(kind in ("model", "optimizer") for _, kind, _ in find(args, kwargs, recognise))


def part_of(tensor: Any, dim: int, world: World) -> Any:
    """A worker's equal part of a tensor or array along a dimension, as a view.

    Raises:
        DataError: The dimension does not exist, or the workers do not divide it.
    """
    shape = tuple(getattr(tensor, "shape", ()))
    if not -len(shape) <= dim < len(shape):
        raise DataError(f"shard: there is no dimension {dim} in a {type(tensor).__name__} of shape {shape}.")
    length = int(shape[dim])
    if length % world.size or not length:
        fitting = [n for n in range(1, min(length, 64) + 1) if length % n == 0]
        raise DataError(
            f"shard: {length} along dimension {dim} cannot be cut into {world.size} equal parts.",
            hint=f"run on {', '.join(map(str, fitting[-6:]))} workers, or cut the tensor to a multiple first",
        )
    each = length // world.size
    index = [slice(None)] * len(shape)
    index[dim] = slice(world.rank * each, (world.rank + 1) * each)
    return tensor[tuple(index)]
