"""Horovod's collectives as hvdlm uses them: torch tensors for gradients, NumPy arrays for small agreements."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hvdlm.contracts import Op

__all__ = ["TorchWire"]


class TorchWire:
    """Collectives among the workers of a job, through ``horovod.torch``.

    Args:
        hvd: The initialised ``horovod.torch`` module.
        process_set: Horovod's name for those who take part; all workers if None.
        account: Where waiting is written down; here if None.
    """

    on_wait: Callable[[str, float, float], None] | None = None

    def __init__(self, hvd: Any, process_set: Any = None, account: TorchWire | None = None) -> None:
        self._hvd, self._set, self._account = hvd, process_set or hvd.global_process_set, account or self
        self.rank, self.size = int(self._set.rank()), int(self._set.size())
        self.sums_halves = bool(hvd.mpi_enabled())
        """Whether the allreduce adds half floats as fast as it moves them: MPI's does, Gloo's adds them one by one."""
        self.waited = 0.0
        """Seconds spent waiting for the other ranks so far."""
        self._splits = torch.zeros(self.size, dtype=torch.int32)
        self.waiting: tuple[str, float] | None = None
        """The collective that is waited for now, and since when (``time.monotonic()``)."""
        self._names: dict[Any, str] = {}

    def among(self, sets: Sequence[Sequence[int]]) -> TorchWire:
        """Collectives among the set of ranks that this worker is in. All workers call it with the same sets.

        Raises:
            ValueError: Horovod was started without ``HOROVOD_DYNAMIC_PROCESS_SETS``.
        """
        known = [_process_set(self._hvd, list(ranks)) if len(ranks) < self.size else self._set for ranks in sets]
        own = next(found for found, ranks in zip(known, sets, strict=True) if self.rank in ranks)
        return TorchWire(self._hvd, own, self._account)

    def start(self, tensor: torch.Tensor, name: str) -> Any:
        """Begin summing ``tensor`` in place over ranks; returns a handle."""
        return self._named(self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Sum, process_set=self._set), name)

    def _named(self, handle: Any, name: str) -> Any:
        self._names[handle] = name
        return handle

    def wait(self, handle: Any) -> Any:
        """Wait until the sum is in place; returns it."""
        start = time.monotonic()
        name = self._names.pop(handle, "a collective")
        account = self._account
        account.waiting = (name, start)
        try:
            return self._hvd.synchronize(handle)
        finally:
            end = time.monotonic()
            account.waited += end - start
            account.waiting = None
            if account.on_wait is not None:
                account.on_wait(name, start, end)

    def exchange(self, tensor: torch.Tensor, out: torch.Tensor, name: str) -> Any:
        """Begin to send row k of ``tensor`` to rank k; the rows that ranks send here land in ``out``, of equal shape.

        Horovod's public functions make a new output at every call. Those below them take one, and write in place where
        it already has the right shape.
        """
        from horovod.torch import mpi_ops

        handle = mpi_ops._alltoall_async(tensor, None, out, self._splits, name, self._set)
        return self._named(handle, name)

    def collect(self, tensor: torch.Tensor, out: torch.Tensor, name: str) -> Any:
        """Begin to send ``tensor`` to all ranks; row k of ``out`` becomes that of rank k."""
        from horovod.torch import mpi_ops

        return self._named(mpi_ops._allgather_async(tensor[None], out, name, self._set), name)

    def arrived(self, handle: Any) -> bool:
        """Whether waiting would return at once."""
        return bool(self._hvd.poll(handle))

    def gather(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """The tensors of all ranks one after the other along the first axis, whose length may differ."""
        gathered: torch.Tensor = self.wait(
            self._named(self._hvd.allgather_async(tensor.contiguous(), name=name, process_set=self._set), name)
        )
        return gathered

    def send(self, tensor: torch.Tensor, name: str, root: int = 0) -> Any:
        """Begin to overwrite ``tensor`` with that of rank ``root``; returns a handle."""
        return self._named(self._hvd.broadcast_async_(tensor, root, name=name, process_set=self._set), name)

    def begin(self, array: npt.NDArray[Any], name: str) -> Callable[[], npt.NDArray[Any]]:
        """Begin to sum a copy of an array over ranks; returns what waits for the sum, to be called once."""
        tensor = torch.from_numpy(np.array(array))
        handle = self.start(tensor, name)

        def finish() -> npt.NDArray[Any]:
            self.wait(handle)
            result: npt.NDArray[Any] = tensor.numpy()
            return result

        return finish

    def blocked(self) -> tuple[tuple[str, float] | None, float]:
        """See :class:`hvdlm.contracts.Collectives`."""
        return self.waiting, self.waited

    def end_timeline(self) -> None:
        """See :class:`hvdlm.contracts.Collectives`."""
        self._hvd.stop_timeline()

    def allreduce(self, array: npt.NDArray[Any], op: Op = "sum") -> npt.NDArray[Any]:
        """See :class:`hvdlm.contracts.Collectives`."""
        kind = {"sum": self._hvd.Sum, "max": self._hvd.Max, "min": self._hvd.Min}[op]
        tensor = torch.from_numpy(np.array(array))
        name = f"hvdlm.{op}.{array.dtype}"
        self.wait(self._named(self._hvd.allreduce_async_(tensor, name=name, op=kind, process_set=self._set), name))
        result: npt.NDArray[Any] = tensor.numpy()
        return result

    def broadcast(self, payload: bytes, root: int = 0) -> bytes:
        """See :class:`hvdlm.contracts.Collectives`."""
        length = torch.tensor([len(payload)], dtype=torch.int64)
        self.wait(self.send(length, "hvdlm.broadcast.length", root))
        buffer = torch.zeros(int(length), dtype=torch.uint8)
        if self.rank == root and payload:
            buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        if len(buffer):
            self.wait(self.send(buffer, "hvdlm.broadcast.bytes", root))
        return buffer.numpy().tobytes()

    def allgather(self, payload: bytes) -> list[bytes]:
        """See :class:`hvdlm.contracts.Collectives`."""
        lengths = self.gather(torch.tensor([len(payload)], dtype=torch.int64), "hvdlm.allgather.lengths").tolist()
        if not any(lengths):
            return [b""] * len(lengths)
        # Horovod's allgather of an empty tensor is fragile: every rank sends at least one byte.
        own = torch.frombuffer(bytearray(payload + b"\0"), dtype=torch.uint8)
        everything = self.gather(own, "hvdlm.allgather.bytes").numpy().tobytes()
        result, at = [], 0
        for length in lengths:
            result.append(everything[at : at + length])
            at += length + 1
        return result


def _process_set(hvd: Any, ranks: list[int]) -> Any:
    """The process set of some ranks: one that Horovod has from an earlier session of this process, or a new one."""
    from horovod.common import process_sets

    for number, known in process_sets._basics._get_process_set_ids_and_ranks().items():
        if list(known) == ranks:
            found = hvd.ProcessSet(ranks)
            found.process_set_id = number
            return found
    return hvd.add_process_set(ranks)
