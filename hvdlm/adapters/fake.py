"""An adapter without a framework, and collectives among threads: a job in one process, for tests and debugging."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from hvdlm.adapters.single import SingleCollectives
from hvdlm.balancing import starting_weights
from hvdlm.contracts import Collectives, Course, Fingerprint, Kind, Op, Recorder
from hvdlm.options import Options
from hvdlm.plan import Epoch, Partition
from hvdlm.state.course import Straight
from hvdlm.state.snapshot import Gatherer, Snapshot, rebuild
from hvdlm.world import World

__all__ = ["FakeAdapter", "FakeJob", "FakeLoader", "FakeModel"]

T = TypeVar("T")
_REDUCE: dict[str, Callable[..., Any]] = {"sum": np.sum, "max": np.max, "min": np.min}


class FakeModel:
    """Parameters: arrays by name."""

    def __init__(self, **parameters: npt.NDArray[np.float64]) -> None:
        self.parameters = parameters
        self.gradients: dict[str, npt.NDArray[np.float64]] = {}


class FakeLoader:
    """Sample ids in batches; a training epoch yields arrays of this worker's ids.

    Args:
        num_samples, batch_size, shuffle: Samples in the data set and per global batch; whether epochs are permuted.
    """

    def __init__(self, num_samples: int, batch_size: int, shuffle: bool = True) -> None:
        self.num_samples, self.batch_size, self.shuffle = num_samples, batch_size, shuffle


class FakeJob:
    """Workers that are threads of this process.

    Args:
        size, time_limit: Number of workers, and seconds after which :meth:`run` gives up and says where each is.

    Example:
        >>> FakeJob(2).run(lambda collectives: int(collectives.allreduce(np.ones(1))[0]))
        [2, 2]
    """

    def __init__(self, size: int, time_limit: float = 90.0) -> None:
        self.size, self._time_limit = size, time_limit
        self._barrier = threading.Barrier(size)
        self._slots: list[Any] = [None] * size

    def run(self, function: Callable[[ThreadCollectives], T]) -> list[T]:
        """Call ``function`` once per worker, at the same time; results in rank order.

        The first error is raised; TimeoutError where a worker still runs at the time limit, or waited in vain.
        """
        results: list[Any] = [None] * self.size
        errors, alone = list[BaseException](), list[BaseException]()

        def work(rank: int) -> None:
            try:
                results[rank] = function(ThreadCollectives(self, rank))
            except BaseException as error:
                (alone if isinstance(error, threading.BrokenBarrierError) else errors).append(error)
                self._barrier.abort()

        # Daemons: a worker that hangs must not keep the process from ending.
        threads = [threading.Thread(target=work, args=(i,), name=f"worker {i}", daemon=True) for i in range(self.size)]
        end = time.monotonic() + self._time_limit
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        if errors:
            raise errors[0]
        late = [thread.name for thread in threads if thread.is_alive()]
        if late:
            raise TimeoutError(f"{', '.join(late)} still running after {self._time_limit:g} s.\n{_stacks()}")
        if alone:
            raise TimeoutError("a worker waited for others that never came") from alone[0]
        return results

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """The values of all ranks."""
        self._barrier.wait(self._time_limit / 2)
        self._slots[rank] = value
        self._barrier.wait(self._time_limit / 2)
        return list(self._slots)


def _stacks() -> str:
    """Where every thread of this process is."""
    frames = sys._current_frames()
    told = [(thread.name, frames.get(thread.ident or 0)) for thread in threading.enumerate()]
    return "\n".join(f"{name}:\n{''.join(traceback.format_stack(frame))}" for name, frame in told if frame)


class ThreadCollectives(SingleCollectives):
    """See :class:`hvdlm.contracts.Collectives`. What threads wait is not taken for waiting."""

    def __init__(self, job: FakeJob, rank: int) -> None:
        self.job, self.rank = job, rank

    def allreduce(self, array: npt.NDArray[Any], op: Op = "sum") -> npt.NDArray[Any]:
        """See :class:`hvdlm.contracts.Collectives`."""
        result: npt.NDArray[Any] = _REDUCE[op](np.stack(self.job.exchange(self.rank, np.array(array))), axis=0)
        return result.astype(array.dtype)

    def broadcast(self, payload: bytes, root: int = 0) -> bytes:
        """See :class:`hvdlm.contracts.Collectives`."""
        received: bytes = self.job.exchange(self.rank, payload)[root]
        return received

    def allgather(self, payload: bytes) -> list[bytes]:
        """See :class:`hvdlm.contracts.Collectives`."""
        return self.job.exchange(self.rank, payload)


class FakeAdapter:
    """See :class:`hvdlm.contracts.Adapter`.

    Args:
        collectives: Those of a :class:`FakeJob`'s worker; none for one process.
    """

    name = "fake"
    data_comes_with_fit = False

    def __init__(self, collectives: ThreadCollectives | None = None) -> None:
        self._threads = collectives
        self._models: list[FakeModel] = []
        self._course: Course = Straight()
        self._epochs_done: dict[str, int] = {}
        self.detached = False

    def start(self, launched: bool, lost: Callable[[], bool] | None = None) -> World:
        """See :class:`hvdlm.contracts.Adapter`."""
        if self._threads is None:
            return World.single()
        rank, size = self._threads.rank, self._threads.job.size
        return World(rank=rank, size=size, local_rank=rank, local_size=size)

    def stop(self) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        self._threads = None

    @property
    def collectives(self) -> Collectives:
        """See :class:`hvdlm.contracts.Adapter`."""
        return self._threads or SingleCollectives()

    def recognise(self, value: object) -> Kind | None:
        """See :class:`hvdlm.contracts.Adapter`."""
        return "model" if isinstance(value, FakeModel) else "loader" if isinstance(value, FakeLoader) else None

    def signature(self, found: Sequence[tuple[str, Kind, Any]]) -> list[str]:
        """See :class:`hvdlm.contracts.Adapter`."""
        return [f"{w}.{n}: {p.shape}" for w, k, m in found if k == "model" for n, p in m.parameters.items()]

    def attach(
        self, found: Sequence[tuple[str, Kind, Any]], options: Options, world: World, recorder: Recorder
    ) -> list[Any]:
        """See :class:`hvdlm.contracts.Adapter`."""
        for _, kind, model in found:
            if kind == "model":
                for name, value in model.parameters.items():
                    sent = self.collectives.broadcast(value.tobytes())
                    model.parameters[name] = np.frombuffer(sent, dtype=value.dtype).reshape(value.shape).copy()
                self._models.append(model)
        weights = starting_weights(options, world, self.collectives)
        partition = Partition(
            strategy=options.partition, rank=world.rank, size=world.size, seed=options.seed, weights=weights
        )

        def sharded(where: str, loader: FakeLoader) -> Callable[[], Iterator[npt.NDArray[np.int64]]]:
            numbers = iter(range(1 << 30))

            def train() -> Iterator[npt.NDArray[np.int64]]:
                number = next(numbers)
                if self._course.done(where, number):
                    return
                epoch = Epoch(
                    partition=partition,
                    num_samples=loader.num_samples,
                    batch_size=loader.batch_size,
                    shuffle=loader.shuffle,
                    drop_last=False,
                    number=number,
                )
                recorder.epoch(where, number, epoch.num_samples, epoch.num_planned, len(epoch))
                for share in epoch.shares():
                    recorder.batch(share, number, where)
                    yield share.ids[: share.count]
                recorder.epoch_done(where, number)
                self._epochs_done[where] = number + 1
                self._course.boundary()

            return train

        return [sharded(where, value) if kind == "loader" else value for where, kind, value in found]

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """See :class:`hvdlm.contracts.Adapter`."""
        yield

    def eval_samples(self) -> int | None:
        """See :class:`hvdlm.contracts.Adapter`."""
        return None

    def randomise(self, seed: int, rank: int) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""

    def digest(self) -> bytes:
        """See :class:`hvdlm.contracts.Adapter`."""
        arrays = [value.tobytes() for model in self._models for value in model.parameters.values()]
        return hashlib.blake2b(b"".join(arrays), digest_size=16).digest()

    def fingerprints(self) -> list[Fingerprint]:
        """See :class:`hvdlm.contracts.Adapter`."""
        named = (pair for model in self._models for pair in model.parameters.items())
        return [Fingerprint(n, zlib.crc32(p.tobytes()), True) for n, p in named]

    def resync(self, names: Sequence[str], root: int) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        for model in self._models:
            for name, value in model.parameters.items():
                sent = self.collectives.broadcast(value.tobytes(), root)
                model.parameters[name] = np.frombuffer(sent, dtype=value.dtype).reshape(value.shape).copy()

    def follow(self, course: Course) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        self._course = course

    def pool(self, whole: bool) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""

    def capture(self, kept: Mapping[str, Any], old: Snapshot | None) -> Snapshot:
        """See :class:`hvdlm.contracts.Adapter`."""
        gather = Gatherer(lambda value: None, lambda value, out: None)
        tree = {
            "models": [gather.add(model.parameters, f"model{i}") for i, model in enumerate(self._models)],
            "loaders": {name: {"cursor": {"epoch": epoch}} for name, epoch in self._epochs_done.items()},
            "kept": {name: gather.add(value, name) for name, value in kept.items()},
        }
        return gather.pack(tree, old)

    def restore(self, snapshot: Snapshot, whole: bool, lr_factor: float) -> dict[str, Any]:
        """See :class:`hvdlm.contracts.Adapter`."""
        value_of = functools.partial(rebuild, snapshot, tensor=lambda mark, entry, data: data)
        for model, tree in zip(self._models, snapshot.tree["models"], strict=True):
            model.parameters.update(value_of(tree))
        return {name: value_of(tree) for name, tree in snapshot.tree["kept"].items()} if whole else {}

    def synchronised(self) -> bool:
        """See :class:`hvdlm.contracts.Adapter`."""
        return True

    def synchronise(self) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""

    def number(self, value: Any) -> float:
        """See :class:`hvdlm.contracts.Adapter`."""
        return float(value)

    def like(self, value: float, example: Any) -> Any:
        """See :class:`hvdlm.contracts.Adapter`."""
        return value

    def save(self, value: Any, path: str) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        Path(path).write_text(json.dumps(value), encoding="utf-8")

    def detach(self) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        self.detached = True
