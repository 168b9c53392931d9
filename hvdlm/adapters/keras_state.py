"""State that has to be equal on all workers before the first step: weights, optimizer slots, random streams.

Nothing is pickled: values travel as their bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import xxhash

from hvdlm.algorithms.hashing import derive_seed
from hvdlm.contracts import Collectives

__all__ = ["broadcast_variables", "digest", "fingerprint", "is_random_state", "model_variables", "separate_streams"]

_CHUNK_BYTES = 64 * 2**20


def model_variables(model: Any) -> list[Any]:
    """All variables of a model, each once: weights, moving averages, states of random streams."""
    return list({id(v): v for v in model.variables}.values())


def is_random_state(variable: Any) -> bool:
    """Whether a variable is the state of a Keras seed generator."""
    return str(getattr(variable, "name", "")).startswith("seed_generator_state")


def broadcast_variables(variables: Sequence[Any], collectives: Collectives, root: int = 0) -> None:
    """Overwrite variables with those of rank ``root``, bit for bit, whatever their data type.

    Args:
        variables: ``keras.Variable`` objects, the same list on all ranks.
        collectives: To send with.
        root: Whose variables are right.
    """
    for chunk in _chunks(variables):
        arrays = [_array(v) for v in chunk]
        payload = collectives.broadcast(b"".join(a.tobytes() for a in arrays), root)
        at = 0
        for variable, array in zip(chunk, arrays, strict=True):
            value = np.frombuffer(payload, array.dtype, array.size, at).reshape(array.shape)
            at += array.nbytes
            if value.tobytes() != array.tobytes():
                variable.assign(value)


def _chunks(variables: Sequence[Any]) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    size = 0
    for v in variables:
        nbytes = _array(v).nbytes
        if chunk and size + nbytes > _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(v)
        size += nbytes
    if chunk:
        yield chunk


def _array(variable: Any) -> Any:
    return np.asarray(keras.ops.convert_to_numpy(variable), order="C")


def separate_streams(variables: Iterable[Any], rank: int) -> None:
    """Give every rank but 0 dropout masks of its own; rank 0 keeps those of a single process."""
    if rank == 0:
        return
    for number, variable in enumerate(variables):
        if is_random_state(variable):
            seed, count = (int(n) for n in keras.ops.convert_to_numpy(variable))
            variable.assign(np.array([derive_seed("dropout", seed, number, rank) & 0x7FFFFFFF, count]))


def fingerprint(variable: Any) -> int:
    """64 bits of XXH3 over a variable's bytes."""
    return xxhash.xxh3_64_intdigest(_array(variable).tobytes())


def digest(variables: Iterable[Any]) -> bytes:
    """XXH3-128 of the variables' bytes, in order: equal on two ranks if and (all but certainly) only if they are."""
    hasher = xxhash.xxh3_128()
    for variable in variables:
        hasher.update(_array(variable).tobytes())
    return hasher.digest()
