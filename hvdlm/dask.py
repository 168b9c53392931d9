"""Train functions on the workers of a Dask cluster.

``hvdlm.dask.run(client, train, args=(...), num_proc=4)`` calls ``train`` on four workers, each in a process of its
own, with Horovod's rendezvous (over Gloo) on the first one's machine. Dask collections among the arguments are written
once as Parquet files, which ``train`` gets as a data set of :mod:`hvdlm.sources`.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvdlm.clusters.child import Outcome
from hvdlm.clusters.dask_files import write_collection
from hvdlm.clusters.dask_task import run_rank, start_store, stop_store
from hvdlm.clusters.functions import Work, with_rows
from hvdlm.errors import ConfigError, LaunchError, WorkerFailed
from hvdlm.launchers.hosts import Host, Slot, assign
from hvdlm.secrets import secret_values
from hvdlm.wire import is_secondary

__all__ = ["run"]

_log = logging.getLogger("hvdlm")

_SECONDS_FOR_OTHERS = 15.0
"""After the first failure, for the other workers to end and tell why: theirs may be the cause."""


def run(
    client: Any,
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_proc: int | None = None,
    env: Mapping[str, str] | None = None,
    data_dir: str | None = None,
    network_interface: str | None = None,
    max_restarts: int = 0,
    restart_timeout: float = 120.0,
) -> list[Any]:
    """Call a train function on Dask workers, as one job.

    Args:
        client: A ``distributed.Client``.
        function: The train function, decorated with :func:`hvdlm.distribute` or calling :func:`hvdlm.wrap`.
        args: Its arguments. Dask DataFrames, Bags and Arrays become data sets of their rows.
        kwargs: Its keyword arguments.
        num_proc: Workers; all of the cluster's if None. Each is another Dask worker.
        env: Variables for the workers.
        data_dir: Where collections are written: a directory that all workers share, or a URL of fsspec's.
        network_interface: The interface the workers use; the one towards the first of them if None.
        max_restarts: How often the job starts again when a Dask worker is lost. With a ``checkpoint_dir`` and
            ``resume="auto"`` it then goes on where it was, else from the start.
        restart_timeout: Seconds to wait for Dask to bring its workers back.

    Returns:
        What the function returned on each worker, in the order of ranks.

    Raises:
        ConfigError: There are fewer Dask workers than asked for, or a collection and no ``data_dir``.
        WorkerFailed: A worker raised, died, or was lost; with its traceback.

    Example:
        >>> hvdlm.dask.run(client, train, args=(model, frame), num_proc=4, data_dir="/shared/rows")  # doctest: +SKIP
    """
    _check(client, num_proc)
    given = [*args, *(kwargs or {}).values()]
    values = with_rows(given, lambda value, number: write_collection(client, value, data_dir, number))
    work = Work(
        function=function,
        args=tuple(values[: len(args)]),
        kwargs=dict(zip(kwargs or {}, values[len(args) :], strict=True)),
        environment=dict(env or {}),
    )
    import cloudpickle

    payload = cloudpickle.dumps(work)
    count = num_proc or len(client.scheduler_info(n_workers=-1)["workers"])
    for attempt in range(max_restarts + 1):
        workers = _wait_for_workers(client, count, restart_timeout if attempt else 0.0)
        try:
            return _Run(client, workers, network_interface, secret_values(work.environment)).results(payload)
        except _Lost as lost:
            if attempt == max_restarts:
                raise WorkerFailed(
                    lost.args[0], 1, hint="hvdlm.dask.run(..., max_restarts=2) starts it again; see the worker's log"
                ) from None
            _log.warning("%s; starting again (%d of %d)", lost.args[0], attempt + 1, max_restarts)
    raise AssertionError("unreachable")


class _Lost(Exception):
    """A Dask worker went away."""


def _check(client: Any, num_proc: int | None) -> None:
    if not hasattr(client, "scheduler_info") or getattr(client, "asynchronous", False):
        raise ConfigError(
            f"hvdlm.dask.run takes a distributed.Client that is not asynchronous, not {type(client).__name__}.",
            hint="client = distributed.Client('tcp://scheduler:8786')",
        )
    if num_proc is not None and (not isinstance(num_proc, int) or num_proc < 1):
        raise ConfigError(f"num_proc is {num_proc!r}; 1 or more is allowed.")


def _wait_for_workers(client: Any, count: int, seconds: float) -> list[str]:
    """Addresses of the workers to use, those of one host beside each other."""
    deadline = time.monotonic() + seconds
    while True:
        found = client.scheduler_info(n_workers=-1)["workers"]
        running = [address for address, info in found.items() if info.get("status", "running") == "running"]
        if len(running) >= max(count, 1):
            return sorted(running, key=lambda address: (_host(address), address))[:count]
        if time.monotonic() >= deadline:
            raise ConfigError(
                f"{max(count, 1)} workers were asked for, and the Dask cluster has {len(running)}.",
                hint=f"num_proc={len(running)}, or client.cluster.scale({count})" if running else "start Dask workers",
            )
        time.sleep(0.2)


def _host(address: str) -> str:
    return address.partition("://")[2].rpartition(":")[0] or "localhost"


class _Run:
    """One job on some Dask workers."""

    def __init__(
        self, client: Any, workers: Sequence[str], network_interface: str | None, secrets: Sequence[str]
    ) -> None:
        self._client, self._workers, self._interface = client, workers, network_interface
        self._secrets = tuple(secrets)
        self._id = f"hvdlm-{uuid.uuid4().hex[:12]}"
        names = list(dict.fromkeys(map(_host, workers)))
        hosts = [Host(name, sum(_host(worker) == name for worker in workers)) for name in names]
        self._slots = assign(hosts, len(workers))

    def results(self, payload: bytes) -> list[Any]:
        """Run the job to its end."""
        import distributed

        client = self._client
        stop = distributed.Event(self._id, client=client)
        first = self._workers[0]
        client.subscribe_topic(self._id, lambda event: _show(event[1], len(self._slots)))
        futures: list[Any] = []
        try:
            rendezvous = client.submit(
                start_store, self._id, _host(first), self._slots, self._interface,
                workers=[first], allow_other_workers=False, pure=False,
            ).result(timeout=60)  # fmt: skip
            futures = [
                client.submit(
                    run_rank, payload, slot, rendezvous, self._interface, self._id, self._secrets,
                    workers=[worker], allow_other_workers=False, pure=False, retries=0, key=f"{self._id}-{slot.rank}",
                )
                for slot, worker in zip(self._slots, self._workers, strict=True)
            ]  # fmt: skip
            return self._wait(futures, stop)
        finally:
            # Whatever ended us (a failure, Ctrl-C): no worker goes on.
            stop.set()
            if not all(future.done() for future in futures):
                self._settle(futures, _SECONDS_FOR_OTHERS)
            client.cancel(futures, force=True)
            self._end_store(first)
            client.unsubscribe_topic(self._id)

    def _wait(self, futures: Sequence[Any], stop: Any) -> list[Any]:
        while True:
            self._check_lost(futures, stop)
            done = [future for future in futures if future.done()]
            if any(future.status != "finished" or future.result().failure for future in done):
                break
            if len(done) == len(futures):
                return [future.result().value for future in futures]
            time.sleep(0.2)
        # One failed: the others lose their peer and end by themselves, or are told to.
        self._settle(futures, 3.0)
        stop.set()
        self._settle(futures, _SECONDS_FOR_OTHERS)
        self._check_lost(futures, stop)
        raise _failure(futures, self._slots)

    def _settle(self, futures: Sequence[Any], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        here = set(self._client.scheduler_info(n_workers=-1)["workers"])
        mine = [future for future, worker in zip(futures, self._workers, strict=True) if worker in here]
        while not all(future.done() for future in mine) and time.monotonic() < deadline:
            time.sleep(0.1)

    def _check_lost(self, futures: Sequence[Any], stop: Any) -> None:
        here = set(self._client.scheduler_info(n_workers=-1)["workers"])
        lost = [
            f"{worker} (rank {slot.rank})"
            for worker, slot, future in zip(self._workers, self._slots, futures, strict=True)
            if worker not in here and future.status != "finished"
        ]
        if lost:
            stop.set()
            self._settle(futures, _SECONDS_FOR_OTHERS)
            raise _Lost(f"the Dask worker {', '.join(lost)} was lost during training")

    def _end_store(self, first: str) -> None:
        if first in self._client.scheduler_info(n_workers=-1)["workers"]:
            ending = self._client.submit(stop_store, self._id, workers=[first], pure=False)
            try:
                ending.result(timeout=10)
            except Exception as error:  # it ends with its worker at the latest
                _log.debug("the rendezvous of %s was not ended: %r", self._id, error)


def _show(message: Mapping[str, Any], size: int) -> None:
    prefix = f"[{message['rank']}] " if size > 1 else ""
    os.write(1, f"{prefix}{message['line']}\n".encode())


def _failure(futures: Sequence[Any], slots: Sequence[Slot]) -> Exception:
    """The error that tells the cause: a traceback that does not only say that another worker left."""
    found: list[tuple[bool, int, Outcome]] = []
    for future, slot in zip(futures, slots, strict=True):
        if future.status == "error":
            outcome = Outcome(failure=repr(future.exception()), code=1)
        elif future.status == "finished":
            outcome = future.result()
        else:
            continue
        if outcome.failure:
            found.append((outcome.stopped or is_secondary(outcome.failure), slot.rank, outcome))
    if not found:
        return LaunchError("the job ended without a result from all of its workers.", hint="see the Dask workers' logs")
    _, rank, outcome = min(found, key=lambda entry: entry[:2])
    host = slots[rank].hostname
    return WorkerFailed(f"rank {rank} on {host} failed:\n{outcome.failure.rstrip()}", outcome.code)
