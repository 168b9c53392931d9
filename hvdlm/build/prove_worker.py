"""Programs of a proof, run by :mod:`hvdlm.build.prove` with ``python -m``.

``CONTROLLER FRAMEWORK MARK`` starts two workers and waits for them; ``worker FRAMEWORK CONTROLLER MARK`` is one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.launchers.base import JobSpec, cores
from hvdlm.launchers.gloo import worker_environment
from hvdlm.launchers.hosts import Host, Slot
from hvdlm.launchers.mpi import detect, find_mpirun, render
from hvdlm.launchers.rendezvous import Rendezvous

__all__ = ["main"]

_SIZE = 2


def main(argv: Sequence[str]) -> int:
    """Run one of the programs and return its exit code."""
    program, framework, *rest = argv
    if program == "worker":
        return _worker(framework, rest[0], rest[1])
    worker = [sys.executable, "-m", "hvdlm.build.prove_worker", "worker", framework, program, rest[0]]
    return _start_gloo(worker) if program == "gloo" else _start_mpi(worker)


def _slots() -> tuple[Slot, ...]:
    return tuple(
        Slot(
            hostname="localhost",
            rank=rank,
            size=_SIZE,
            local_rank=rank,
            local_size=_SIZE,
            cross_rank=0,
            cross_size=1,
        )
        for rank in range(_SIZE)
    )


def _start_gloo(worker: list[str]) -> int:
    slots = _slots()
    server = Rendezvous("127.0.0.1", slots)
    processes = [
        subprocess.Popen(worker, env=worker_environment(os.environ, slot, server.environment(), ["lo"]))
        for slot in slots
    ]
    server.start()
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                break  # the other one would wait for it for ever
            time.sleep(0.05)
        return max(abs(process.poll() or 0) for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        server.close()


def _start_mpi(worker: list[str]) -> int:
    spec = JobSpec(
        command=tuple(worker), num_proc=_SIZE, hosts=(Host("localhost", _SIZE),), slots=_slots(), run_dir=Path()
    )
    mpi = detect(find_mpirun(None))
    argv = render(spec, mpi, worker, root=os.geteuid() == 0, num_cores=cores(), threads=1)
    return subprocess.call(argv, env=os.environ | {"HOROVOD_CONTROLLER": "mpi", "HOROVOD_CPU_OPERATIONS": "mpi"})


def _worker(framework: str, controller: str, mark: str) -> int:
    hvd, reduce = _torch() if framework == "torch" else _tensorflow()
    hvd.init()
    rank = hvd.rank()
    wrong = ""
    enabled = hvd.gloo_enabled() if controller == "gloo" else hvd.mpi_enabled()
    if hvd.size() != _SIZE:
        wrong = f"the job has {hvd.size()} processes, not {_SIZE}"
    elif not enabled:
        wrong = f"it does not run over {controller}"
    else:
        for dtype in ("float32", "float16"):
            # No multiple of a vector register's length, so that the vectorised sums and their tails are both used.
            given = np.arange(1003, dtype=dtype) % 50 * (rank + 1)
            if not np.array_equal(reduce(given, f"proof.{dtype}"), np.arange(1003, dtype=dtype) % 50 * 3):
                wrong = f"a wrong sum of {dtype}"
    hvd.shutdown()
    sys.stdout.write(f"{mark}{json.dumps({'rank': rank, 'wrong': wrong})}\n")
    sys.stdout.flush()
    return 1 if wrong else 0


def _torch() -> tuple[Any, Callable[[Any, str], Any]]:
    import torch  # noqa: I001  before Horovod's extension, which is linked with it
    import horovod.torch as hvd

    return hvd, lambda array, name: hvd.allreduce(torch.from_numpy(array), op=hvd.Sum, name=name).numpy()


def _tensorflow() -> tuple[Any, Callable[[Any, str], Any]]:
    import horovod.tensorflow as hvd
    import tensorflow as tf

    return hvd, lambda array, name: hvd.allreduce(tf.constant(array), op=hvd.Sum, name=name).numpy()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
