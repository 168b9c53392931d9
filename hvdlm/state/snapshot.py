"""A training's state as one flat block of bytes and a tree of plain values that says what lies where in it.

Nothing is pickled. The block is what a safetensors file holds behind its header, so that a snapshot is copied, sent
and written as a whole. In the tree numbers, text, booleans and None stand as they are; all else is a dict with one key:
``l`` a list, ``u`` a tuple, ``d`` a dict (as pairs, for keys need not be text), ``t`` a tensor and ``n`` an array (by
the name of the entry), ``x`` something that cannot be kept (by its type).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdlm.state.copying import Copying

__all__ = ["LOCAL", "OWN", "Bytes", "Entry", "Gatherer", "Leaf", "Snapshot", "is_whole", "rebuild"]

Bytes = npt.NDArray[np.uint8]

_NUMPY = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


class _Local:
    """Stands for a value that could not be kept: the one that is there stays."""


LOCAL = _Local()

OWN = "own"
"""What is kept under this name is that worker's alone: it is left out where another gets its snapshot."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    dtype: str
    """As safetensors names it: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    """First byte in the block."""
    end: int


@dataclass
class Snapshot:
    """The state at one moment, equal on all ranks.

    Args:
        tree: What the adapter and hvdlm keep, see above.
        entries: Tensors by name, in the order in which they lie.
        data: All of their bytes, shape (n,), uint8.
        number: Optimizer steps of the whole training so far.
    """

    tree: Any
    entries: dict[str, Entry]
    data: Bytes
    number: int = 0
    pins: int = 0
    """How many are reading it: only with none its block may be overwritten."""
    copying: Copying | None = None
    """What fills the block still."""

    def wait(self) -> bool:
        """Wait until the block is filled; False if it came to nothing. To be called before the block is read."""
        return self.copying is None or self.copying.wait()

    def disown(self) -> Snapshot:
        """Make it the snapshot of a worker that has nothing of its own; returns it."""
        for name in self.entries:
            if name.startswith(f"{OWN}."):
                self.bytes_of(name)[:] = 0
        return self

    def bytes_of(self, name: str) -> Bytes:
        """The bytes of an entry, not copied."""
        entry = self.entries[name]
        return self.data[entry.start : entry.end]


@dataclass(frozen=True)
class Leaf:
    """How a tensor of the framework is kept.

    Args:
        dtype: As safetensors names it; ``U8`` for what it has no name for.
        shape: With ``U8`` for want of a name, (bytes,).
        nbytes: Length.
        more: What rebuilding it takes beside, plain values.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    more: dict[str, Any]


class Gatherer:
    """Walks values and notes where their tensors will lie, then copies all of them.

    Args:
        leaf: What a value is to the framework, None if it is no tensor of its.
        copy: Copies a tensor to bytes.
    """

    def __init__(self, leaf: Callable[[Any], Leaf | None], copy: Callable[[Any, Bytes], None]) -> None:
        self._leaf, self._copy = leaf, copy
        self._sources: dict[str, tuple[Leaf, Any]] = {}
        self._calm: set[str] = set()
        self._names: dict[int, str] = {}
        self.dropped: list[str] = []
        """Names of what cannot be kept."""

    def add_calm(self, value: Any, name: str) -> Any:
        """As :meth:`add`, of what may be copied while training goes on, up to the next step of an optimizer."""
        known = set(self._sources)
        tree = self.add(value, name)
        self._calm |= self._sources.keys() - known
        return tree

    def add(self, value: Any, name: str) -> Any:
        """The tree of a value; its tensors will be entries whose names start with ``name``."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        leaf = self._leaf(value)
        if leaf is not None:
            return {"t": self._note(leaf, value, name), **leaf.more}
        if isinstance(value, np.generic):
            return self.add(value.item(), name)
        if isinstance(value, np.ndarray) and value.dtype.name in _NUMPY:
            return {"n": self._note(Leaf(_NUMPY[value.dtype.name], value.shape, value.nbytes, {}), value, name)}
        if isinstance(value, (list, tuple)):
            return {"l" if isinstance(value, list) else "u": [self.add(v, f"{name}.{i}") for i, v in enumerate(value)]}
        if isinstance(value, dict):
            return {"d": [[self.add(k, f"{name}.key"), self.add(v, f"{name}.{k}")] for k, v in value.items()]}
        if isinstance(value, (bool, int, float, str)):  # subclasses: enumerations, numpy's float64
            plain = next(kind for kind in (bool, int, float, str) if isinstance(value, kind))
            return plain(value)
        self.dropped.append(name)
        return {"x": type(value).__name__}

    def _note(self, leaf: Leaf, value: Any, name: str) -> str:
        known = self._names.get(id(value))
        if known is not None:
            return known  # tied weights
        unique, number = name, 1
        while unique in self._sources:
            number += 1
            unique = f"{name}#{number}"
        self._sources[unique], self._names[id(value)] = (leaf, value), unique
        return unique

    def pack(self, tree: Any, old: Snapshot | None, version: Callable[[Any], int] | None = None) -> Snapshot:
        """Copy everything noted.

        Args:
            tree: What :meth:`add` gave, put together.
            old: A snapshot that nobody needs any more: fresh memory costs more than the copy itself.
            version: See :class:`hvdlm.state.copying.Copying`, which copies what is calm; None to copy all of it now.
        """
        # The widest types first, so that each entry is aligned, as safetensors does.
        order = sorted(self._sources, key=lambda n: -_width(self._sources[n][0].dtype))
        entries: dict[str, Entry] = {}
        at = 0
        for name in order:
            leaf, _ = self._sources[name]
            entries[name] = Entry(leaf.dtype, leaf.shape, at, at + leaf.nbytes)
            at += leaf.nbytes
        data = old.data if old is not None and len(old.data) == at else np.empty(at, dtype=np.uint8)
        later = []
        for name, entry in entries.items():
            _, value = self._sources[name]
            view = data[entry.start : entry.end]
            if isinstance(value, np.ndarray):
                view[:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            elif version is not None and name in self._calm:
                later.append((value, functools.partial(self._copy, value, view)))
            elif len(view):
                self._copy(value, view)
        copying = Copying(later, version) if later and version is not None else None
        return Snapshot(tree, entries, data, copying=copying)


def _width(dtype: str) -> int:
    digits = "".join(c for c in dtype.partition("_")[0] if c.isdigit())
    return int(digits) // 8 if digits else 1


def rebuild(snapshot: Snapshot, tree: Any, tensor: Callable[[dict[str, Any], Entry, Bytes], Any]) -> Any:
    """The value that :meth:`Gatherer.add` made a tree of; :data:`LOCAL` for what could not be kept.

    Args:
        snapshot: Where its tensors lie.
        tree: The tree.
        tensor: Makes a tensor of the framework from the mark in the tree, the entry and its bytes, which it copies.
    """
    if not isinstance(tree, dict):
        return tree
    if "t" in tree:
        return tensor(tree, snapshot.entries[tree["t"]], snapshot.bytes_of(tree["t"]))
    if "n" in tree:
        entry = snapshot.entries[tree["n"]]
        kind = next(name for name, short in _NUMPY.items() if short == entry.dtype)
        return snapshot.bytes_of(tree["n"]).copy().view(kind).reshape(entry.shape)
    ((kind, content),) = tree.items()
    if kind == "d":
        return {rebuild(snapshot, k, tensor): rebuild(snapshot, v, tensor) for k, v in content}
    if kind == "x":
        return LOCAL
    items = [rebuild(snapshot, v, tensor) for v in content]
    return items if kind == "l" else tuple(items)


def is_whole(value: Any) -> bool:
    """Whether nothing inside a rebuilt value had to be left out."""
    if isinstance(value, dict):
        return all(is_whole(v) for v in value.values())
    return all(is_whole(v) for v in value) if isinstance(value, (list, tuple)) else value is not LOCAL
