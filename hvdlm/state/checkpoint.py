"""How a state is written: tensors as safetensors, the rest as JSON, and a manifest with a checksum of every byte.

Tensors are written from the snapshot's block as they lie, piece by piece: the safetensors library would first build
the whole file in memory, with the interpreter locked, and training would stand still meanwhile.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import xxhash

from hvdlm import __version__
from hvdlm.errors import CheckpointError
from hvdlm.state.snapshot import Entry, Snapshot
from hvdlm.state.store import LAST_FILE, Store

__all__ = ["STATE_FILE", "TENSOR_FILE", "VERSION", "Damaged", "name_of", "number_of", "read", "write"]

VERSION = 1
"""Of the files; a checkpoint of a newer one is refused."""
TENSOR_FILE, STATE_FILE = "tensors.safetensors", "state.json"
_PIECE_BYTES = 4 * 2**20


class Damaged(Exception):
    """A checkpoint that is not what was written."""


def name_of(number: int) -> str:
    """The name of the checkpoint of a step.

    >>> name_of(1200), number_of("step-000000001200")
    ('step-000000001200', 1200)
    """
    return f"step-{number:012d}"


def number_of(name: str) -> int:
    """The step of the checkpoint of a name."""
    return int(name.removeprefix("step-"))


def write(store: Store, snapshot: Snapshot, check: Callable[[], None] = lambda: None) -> int:
    """Write a checkpoint; returns its size in bytes.

    Args:
        store: Where to.
        snapshot: The state; not changed meanwhile.
        check: Called now and then; may raise to give up.
    """
    files: dict[str, dict[str, Any]] = {}

    def write_file(create: Callable[[str], Any], name: str, pieces: Iterator[Any]) -> None:
        hasher, size = xxhash.xxh3_128(), 0
        with create(name) as out:
            for piece in pieces:
                check()
                _write_all(out, piece)
                hasher.update(piece)
                size += len(piece)
        files[name] = {"bytes": size, "xxh3_128": hasher.hexdigest()}

    def write_files(create: Callable[[str], Any]) -> None:
        write_file(create, TENSOR_FILE, _tensor_file(snapshot))
        state = {"number": snapshot.number, "tree": snapshot.tree}
        write_file(create, STATE_FILE, iter([json.dumps(state).encode()]))
        manifest = {"version": VERSION, "hvdlm": __version__, "step": snapshot.number, "time": time.time()}
        with create(LAST_FILE) as out:
            _write_all(out, _sealed({**manifest, "files": files}))

    store.write(name_of(snapshot.number), write_files)
    return sum(int(file["bytes"]) for file in files.values())


def _write_all(out: Any, piece: Any) -> None:
    view = memoryview(piece)
    while view:
        written = out.write(view)
        view = view[len(view) if written is None else written :]  # an unbuffered file may take a part


def _tensor_file(snapshot: Snapshot) -> Iterator[Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "hvdlm"}}
    for name, entry in snapshot.entries.items():
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [entry.start, entry.end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for start in range(0, len(snapshot.data), _PIECE_BYTES):
        yield snapshot.data[start : start + _PIECE_BYTES].data


def _sealed(body: dict[str, Any]) -> bytes:
    """JSON that holds the checksum of its own content, in the one way in which it may be spelled."""
    text = json.dumps(body, sort_keys=True)
    return f'{{"manifest": {text}, "xxh3_128": "{xxhash.xxh3_128_hexdigest(text.encode())}"}}\n'.encode()


def read(store: Store, name: str) -> Snapshot:
    """Read a checkpoint and check every byte of it.

    Raises:
        Damaged: It is not what was written; says where.
        CheckpointError: A newer version of hvdlm wrote it.
        OSError: The store fails.
    """
    manifest = _manifest(_file(store, name, LAST_FILE))
    if manifest["version"] > VERSION:
        raise CheckpointError(
            f"checkpoint {name} has version {manifest['version']}, written by hvdlm {manifest['hvdlm']}; this hvdlm "
            f"({__version__}) reads up to {VERSION}.",
            hint="pip install --upgrade hvdlm",
        )
    contents = {}
    for file in (STATE_FILE, TENSOR_FILE):
        content, expected = _file(store, name, file), manifest["files"][file]
        if len(content) != expected["bytes"]:
            raise Damaged(f"{file} has {len(content)} bytes instead of {expected['bytes']}")
        if xxhash.xxh3_128_hexdigest(content) != expected["xxh3_128"]:
            raise Damaged(f"{file} has another checksum than when it was written")
        contents[file] = content
    state = json.loads(contents[STATE_FILE])
    tensors = contents[TENSOR_FILE]
    start = 8 + int.from_bytes(tensors[:8], "little")
    header = json.loads(tensors[8:start])
    entries = {
        key: Entry(e["dtype"], tuple(e["shape"]), *e["data_offsets"])
        for key, e in header.items()
        if key != "__metadata__"
    }
    data = np.frombuffer(tensors, dtype=np.uint8)[start:].copy()
    return Snapshot(state["tree"], entries, data, state["number"])


def _file(store: Store, name: str, file: str) -> bytes:
    try:
        return store.read(name, file)
    except FileNotFoundError:
        raise Damaged(f"{file} is missing") from None


def _manifest(content: bytes) -> Any:
    try:
        body = json.loads(content)["manifest"]
        whole = _sealed(body) == content
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise Damaged(f"{LAST_FILE} is not as it was written")
    return body
