"""Takes the state of Keras objects into a :class:`hvdlm.state.snapshot.Snapshot`, and puts it back in place."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from hvdlm.adapters.keras_job import Job
from hvdlm.adapters.keras_optimizers import multiply_learning_rates, optimizers_of
from hvdlm.adapters.keras_state import model_variables, separate_streams
from hvdlm.errors import CheckpointError
from hvdlm.state.snapshot import Bytes, Entry, Gatherer, Leaf, Snapshot, rebuild

__all__ = ["capture", "restore"]

_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def _leaf_of(value: Any) -> Leaf | None:
    if not isinstance(value, keras.Variable):
        return None
    dtype = keras.backend.standardize_dtype(value.dtype)
    shape = tuple(int(n) for n in value.shape)
    nbytes = int(np.prod(shape, dtype=np.int64)) * _itemsize(dtype)
    return Leaf(_NAMES[dtype], shape, nbytes, {})


def _itemsize(dtype: str) -> int:
    return 1 if dtype.startswith(("bool", "float8")) else int("".join(c for c in dtype if c.isdigit())) // 8


def _copy_to(variable: Any, out: Bytes) -> None:
    array = np.ascontiguousarray(keras.ops.convert_to_numpy(variable))
    out[:] = array.reshape(-1).view(np.uint8)


def _no_tensor(mark: Mapping[str, Any], entry: Entry, data: Bytes) -> Any:
    raise CheckpointError("a variable of Keras was kept as a value.", hint="register a dict of numbers or arrays")


def capture(
    models: Sequence[Any],
    optimizers: Sequence[Any],
    job: Job,
    kept: Mapping[str, Any],
    old: Snapshot | None,
) -> Snapshot:
    """The state of all of these.

    Args:
        models: In an order that is the same in each run of the script.
        optimizers: Likewise.
        job: Knows where the training stands.
        kept: What hvdlm and the person keep beside, by name.
        old: A snapshot that may be overwritten.
    """
    gather = Gatherer(_leaf_of, _copy_to)
    tree = {
        "models": [_tree(gather, model_variables(model), f"model{i or ''}") for i, model in enumerate(models)],
        "optimizers": [_tree(gather, o.variables, f"optimizer{i or ''}") for i, o in enumerate(optimizers)],
        "loaders": job.place.loaders(),
        "kept": {name: gather.add(value, name) for name, value in kept.items()},
        "random": gather.add([np.random.get_state(), random.getstate()], "random"),
    }
    return gather.pack(tree, old)


def _tree(gather: Gatherer, variables: Sequence[Any], title: str) -> list[Any]:
    return [[v.path, gather.add(v, f"{title}.{v.path}")] for v in variables]


def restore(
    models: Sequence[Any], optimizers: Sequence[Any], job: Job, snapshot: Snapshot, whole: bool, lr_factor: float
) -> dict[str, Any]:
    """Put a state back, in place.

    Args:
        models: In the order of :func:`capture`.
        optimizers: Likewise.
        job: Learns where the training stands.
        snapshot: The state.
        whole: Else only models, and where the training stands.
        lr_factor: What learning rates are multiplied by.

    Returns:
        What hvdlm and the person keep beside.

    Raises:
        CheckpointError: It is of other objects; names the first difference.
    """
    tree = snapshot.tree
    job.place.load(tree["loaders"])
    for i, model in enumerate(models[: len(tree["models"])]):
        variables = model_variables(model)
        # One that gets its variables from its first data has none yet, or had none when it was kept.
        if variables and tree["models"][i]:
            _assign(variables, tree["models"][i], f"model{i or ''}", snapshot)
    if not whole:
        return {}
    for kind, own in (("models", models), ("optimizers", optimizers)):
        if len(own) != len(tree[kind]):
            raise CheckpointError(
                f"the state to go on from has {len(tree[kind])} {kind}, and this script has {len(own)}.",
                hint="run the script that wrote it, or give another --checkpoint-dir",
            )
    for i, optimizer in enumerate(optimizers):
        if not optimizer.built:
            optimizer.build(_trained_by(optimizer, models))
        _assign(optimizer.variables, tree["optimizers"][i], f"optimizer{i or ''}", snapshot)
    multiply_learning_rates(optimizers, lr_factor)
    for model in models:
        separate_streams(model_variables(model), job.world.rank)
    numpy_state, python_state = rebuild(snapshot, tree["random"], _no_tensor)
    np.random.set_state(numpy_state)
    random.setstate(python_state)
    return {name: rebuild(snapshot, value, _no_tensor) for name, value in tree["kept"].items()}


def _trained_by(optimizer: Any, models: Sequence[Any]) -> list[Any]:
    owner = next((model for model in models if any(o is optimizer for o in optimizers_of(model))), models[0])
    variables: list[Any] = owner.trainable_variables
    return variables


def _assign(variables: Sequence[Any], marks: Sequence[Any], title: str, snapshot: Snapshot) -> None:
    # Keras numbers its layers in the order in which a process makes them: places count, paths are for the message.
    for i in range(max(len(variables), len(marks))):
        leaf = _leaf_of(variables[i]) if i < len(variables) else None
        entry = snapshot.entries[marks[i][1]["t"]] if i < len(marks) else None
        here = "nothing" if leaf is None else f"{variables[i].path}, {leaf.dtype} {list(leaf.shape)},"
        there = "nothing" if entry is None else f"{marks[i][0]}, {entry.dtype} {list(entry.shape)},"
        if leaf is None or entry is None or (leaf.dtype, leaf.shape) != (entry.dtype, entry.shape):
            raise CheckpointError(
                f"the state to go on from is of another model. First difference: variable {i} of {title} is {here} in "
                f"this script, and {there} in the state.",
                hint="build the model as in the run that wrote it, or give another --checkpoint-dir",
            )
    for variable, (_, mark) in zip(variables, marks, strict=True):
        dtype = keras.backend.standardize_dtype(variable.dtype)
        value = snapshot.bytes_of(mark["t"]).view(_numpy_type(dtype)).reshape(tuple(variable.shape))
        variable.assign(value.copy())


def _numpy_type(dtype: str) -> Any:
    if dtype.startswith(("bfloat", "float8")):
        import ml_dtypes  # comes with Keras

        return getattr(ml_dtypes, dtype)
    return np.dtype(dtype)
