"""What a framework adapter has to offer. Session and api know adapters through these protocols only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy.typing as npt

from hvdlm.options import Options
from hvdlm.plan import Share
from hvdlm.world import World

if TYPE_CHECKING:
    from hvdlm.state.snapshot import Snapshot

__all__ = ["Adapter", "Collectives", "Course", "Fingerprint", "Kind", "Recorder"]

Kind = Literal["model", "optimizer", "loader", "dataset", "scheduler", "scaler"]
"""What an adapter can recognise among a train function's arguments."""

Op = Literal["sum", "max", "min"]


class Fingerprint(NamedTuple):
    """What one tensor of the replicas is, short enough to compare between ranks."""

    name: str
    digest: int
    """64 bits of XXH3 over its bytes."""
    trained: bool
    """Whether it is a parameter; else a buffer or another statistic that the model keeps."""


class Collectives(Protocol):
    """Small agreements between workers, on NumPy arrays and bytes. Every rank makes the same calls in one order."""

    on_wait: Callable[[str, float, float], None] | None
    """Told of each wait that ends: the collective, and from when to when (``time.monotonic()``)."""

    def allreduce(self, array: npt.NDArray[Any], op: Op = "sum") -> npt.NDArray[Any]:
        """Element-wise sum, max or min over ranks, of arrays equal in shape and dtype (float64, float32, int64)."""
        ...

    def broadcast(self, payload: bytes, root: int = 0) -> bytes:
        """The bytes of rank ``root``, on every rank."""
        ...

    def allgather(self, payload: bytes) -> list[bytes]:
        """The bytes of each rank, in rank order."""
        ...

    def blocked(self) -> tuple[tuple[str, float] | None, float]:
        """(collective that is waited for now and since when, or None; seconds waited so far). Other threads call it."""
        ...

    def end_timeline(self) -> None:
        """Make Horovod close the file of its timeline, if it writes one."""
        ...


class Recorder(Protocol):
    """What adapters tell while training runs. Calls are cheap; only those that say so may make a collective."""

    def batch(self, share: Share, epoch: int, loader: str) -> None:
        """A training batch was handed to the script."""
        ...

    def loss(self, value: Any, share: Share | None) -> None:
        """A backward started from this scalar (kept as it is; read only when shown)."""
        ...

    def step(self) -> None:
        """An optimizer made a step."""
        ...

    def data(self, seconds: float) -> None:
        """The script waited this long for a training batch."""
        ...

    def reduced(self) -> None:
        """Gradients were made global, at the same place of the program on every rank. May make a collective."""
        ...

    def event(self, name: str, **facts: Any) -> None:
        """Something happened that the run's events and its report show."""
        ...

    def epoch(self, loader: str, number: int, num_samples: int, num_planned: int, steps: int) -> None:
        """A training loader starts an epoch of ``steps`` global batches over ``num_samples`` samples."""
        ...

    def epoch_done(self, loader: str, number: int, skew: float | None = None) -> None:
        """A training loader was read to its end.

        ``skew`` says how even the homes of its samples are (:meth:`hvdlm.plan.Partition.home_skew`).
        """
        ...


class Course(Protocol):
    """Where a training run stands that keeps its state. What it does by default is in ``hvdlm.state.course``."""

    @property
    def skipping(self) -> bool:
        """Whether the script, called again, is on its way to the position that the run goes on from."""
        ...

    def done(self, loader: str, epoch: int) -> bool:
        """Whether this epoch of a loader, which the script starts now, was completed before that position.

        Where it was not, that position is reached: the state is restored before this returns.
        """
        ...

    def boundary(self) -> None:
        """Between two steps: all that loaders handed out is in the model, and the script has done all of the step."""
        ...

    def backward(self) -> None:
        """A backward starts: in a script that draws its batches by hand a boundary, for the step before is complete."""
        ...

    def grown(self) -> None:
        """The model has all its variables only now: a state that was taken before its first step has to be again."""
        ...

    def evaluation(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of an evaluation, as far as they are worth reading."""
        ...


class Adapter(Protocol):
    """One framework. ``hvdlm.adapters.torch_adapter`` and ``hvdlm.adapters.keras_adapter`` have the same face."""

    name: str
    """The framework's name, as in the summary."""
    data_comes_with_fit: bool
    """Whether scripts hand their data to a method of the model later, so that its absence at the start says nothing."""

    def start(self, launched: bool, lost: Callable[[], bool] | None = None) -> World:
        """Start Horovod if the process was launched with others, and say where this process stands.

        Args:
            launched: Whether there are others.
            lost: In an elastic job, tells whether one of them was lost meanwhile; None in others.

        Raises:
            EngineError: Horovod is missing or cannot be used.
            PeerLost: In an elastic job, another worker was lost.
        """
        ...

    def stop(self) -> None:
        """End Horovod, so that it can be started for another set of workers. Makes no collective."""
        ...

    @property
    def collectives(self) -> Collectives:
        """Small agreements between workers; only after :meth:`start`."""
        ...

    def recognise(self, value: object) -> Kind | None:
        """What a value is to this framework, None if nothing."""
        ...

    def attach(
        self, found: Sequence[tuple[str, Kind, Any]], options: Options, world: World, recorder: Recorder
    ) -> list[Any]:
        """Make the objects distributed.

        Args:
            found: (where it was found, kind, object) for each recognised object; each object once.
            options: What to do.
            world: Where this process stands.
            recorder: Told of batches, losses and steps.

        Returns:
            What the script uses instead of each object, in the order of ``found``; the same object where it can be.
        """
        ...

    def signature(self, found: Sequence[tuple[str, Kind, Any]]) -> list[str]:
        """One line per thing that has to be equal on all ranks: variables with shape and dtype, loaders with size."""
        ...

    def no_sync(self) -> Any:
        """A context manager in which gradients only accumulate on each worker."""
        ...

    def eval_samples(self) -> int | None:
        """Samples this worker read in the last evaluation that was shared out; None if it was read whole."""
        ...

    def randomise(self, seed: int, rank: int) -> None:
        """Give this rank random streams of its own, for scripts that draw their batches by hand."""
        ...

    def digest(self) -> bytes:
        """A bitwise digest of all attached parameters."""
        ...

    def fingerprints(self) -> list[Fingerprint]:
        """One for each tensor that has to be equal on all ranks, in the order of the model."""
        ...

    def resync(self, names: Sequence[str], root: int) -> None:
        """Give every rank what rank ``root`` holds: the tensors of these names, and the state of optimizers."""
        ...

    def synchronised(self) -> bool:
        """Whether replicas are equal now; under ``sync="local"`` they are not between two synchronisations."""
        ...

    def synchronise(self) -> None:
        """Make replicas equal where they are not. Every rank calls it between the same two steps."""
        ...

    def number(self, value: Any) -> float:
        """A Python float from a number, an array or a tensor with one element."""
        ...

    def like(self, value: float, example: Any) -> Any:
        """``value`` as the type of ``example``: a tensor for a tensor, a float for a number."""
        ...

    def save(self, value: Any, path: str) -> None:
        """Write an object the way the framework does."""
        ...

    def follow(self, course: Course) -> None:
        """Tell ``course`` of steps, and act on what it says; called before :meth:`attach`, only if state is kept."""
        ...

    def pool(self, whole: bool) -> None:
        """Put together what each worker has only its part of; every rank calls it just before it captures.

        Args:
            whole: Also what is as long as the model: this commit may be all that is left of some workers.
        """
        ...

    def capture(self, kept: Mapping[str, Any], old: Snapshot | None) -> Snapshot:
        """A copy of the state of everything attached, taken between two steps; equal on all ranks.

        Args:
            kept: Values to keep beside, by name.
            old: A snapshot that nobody needs any more, whose memory may be used.
        """
        ...

    def restore(self, snapshot: Snapshot, whole: bool, lr_factor: float) -> dict[str, Any]:
        """Put a state back, in place.

        Args:
            snapshot: What :meth:`capture` gave, here or in another process.
            whole: Else only what models hold: the position is yet to be reached.
            lr_factor: What learning rates are multiplied by, for they were those of another number of workers.

        Returns:
            The values kept beside; empty unless ``whole``.

        Raises:
            CheckpointError: It is of other objects; names the first difference.
        """
        ...

    def detach(self) -> None:
        """Undo everything :meth:`attach` changed outside the person's objects. Makes no collective; safe to repeat."""
        ...
