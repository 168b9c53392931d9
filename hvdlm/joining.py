"""Among which processes this one trains, where ``hvdlm run`` did not say it: those of a communicator, or a launcher's.

Horovod takes a communicator of the MPI it was built with. With any other MPI, and with none, its workers find each
other through what the launcher or mpi4py offers, and train over Gloo.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from hvdlm.adapters.engine import give_communicator
from hvdlm.contracts import Collectives
from hvdlm.environment import Environment
from hvdlm.errors import ConfigError, EngineError
from hvdlm.launchers.engine import Engine, find_engine
from hvdlm.launchers.meeting import meet
from hvdlm.pmi import Pmi

__all__ = ["family_of", "join", "part_of_cores", "share_threads"]

_place: tuple[int, int, str] | None = None
"""(rank, size, group) in the communicator that this process was given, which holds to its end."""


def join(environment: Environment, comm: Any = None) -> Environment:
    """See that Horovod starts among the right processes; returns the environment as it is among them.

    Args:
        environment: What the launcher said.
        comm: A communicator of mpi4py, or a list of ranks; None for all processes of the launcher.

    Raises:
        ConfigError: It is no communicator, this process is not in it, or the job is elastic.
        EngineError: Horovod cannot use it.
    """
    global _place
    if comm is not None:
        if _place is not None:
            raise ConfigError("a communicator was given before.", hint="give it once: hvdlm.init(comm=...)")
        joined = _in_communicator(environment, comm)
        _place = joined.rank, joined.size, joined.group
        return joined
    if _place is not None:
        rank, size, group = _place
        return dataclasses.replace(environment.placed(rank, size), group=group)
    return environment if environment.pmi is None else _through_launcher(environment, environment.pmi)


def _in_communicator(environment: Environment, comm: Any) -> Environment:
    if environment.control is not None:
        raise ConfigError("an elastic job has no communicators.", hint="leave out comm=...")
    engine = find_engine()
    if isinstance(comm, Sequence):
        return _among(environment, comm, engine)
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not isinstance(comm, mpi.Intracomm) or comm == mpi.COMM_NULL:
        raise ConfigError(
            f"comm is {comm!r}; a communicator of mpi4py (not COMM_NULL) or a list of ranks is allowed.",
            hint="comm=MPI.COMM_WORLD.Split(color), in the processes that train",
        )
    if mpi.COMM_WORLD.size != environment.size:
        raise EngineError(
            f"{environment.launcher or 'no launcher'} started {environment.size} processes, but mpi4py sees "
            f"{mpi.COMM_WORLD.size}: it uses another MPI ({mpi.Get_library_version().split(',')[0].strip()}).",
            hint="start the script with the mpirun of that MPI",
        )
    first = int(comm.bcast(environment.rank))
    placed = _grouped(environment.placed(comm.rank, comm.size), first)
    if engine.mpi and engine.family == family_of(mpi.Get_library_version()):
        give_communicator(comm)
    else:
        placed = _meet(placed, comm.allgather)
    return placed


def _through_launcher(environment: Environment, handle: int) -> Environment:
    engine = find_engine()
    if engine.mpi and engine.family == "mpich":
        return environment  # Horovod asks the launcher itself
    mpi = sys.modules.get("mpi4py.MPI")
    allgather: Callable[[str], list[str]]
    if mpi is not None and mpi.Is_initialized() and mpi.COMM_WORLD.size == environment.size:
        allgather = mpi.COMM_WORLD.allgather  # the launcher's connection is in its hands
    else:
        allgather = Pmi(handle, environment.rank, environment.size).allgather
    return _meet(environment, allgather)


def _meet(environment: Environment, allgather: Callable[[str], list[str]]) -> Environment:
    found = meet(allgather, environment.rank, environment.nics)
    os.environ.update(found)
    return dataclasses.replace(environment, nics=(found["HOROVOD_GLOO_IFACE"],))


def _among(environment: Environment, ranks: Sequence[int], engine: Engine) -> Environment:
    if sorted(set(ranks)) != sorted(ranks) or environment.rank not in ranks:
        raise ConfigError(
            f"comm is {list(ranks)!r}, and this is rank {environment.rank}: the ranks that train are named once each, "
            "and only they call hvdlm.",
            hint="if rank in ranks: hvdlm.init(comm=ranks)",
        )
    if not engine.mpi or environment.launcher != "mpirun":
        raise EngineError(
            "a list of ranks needs a job of the MPI that Horovod was built with.",
            hint="mpirun -np 4 python train.py, or: hvdlm run --mpi",
        )
    give_communicator(list(ranks))
    return _grouped(environment.placed(list(ranks).index(environment.rank), len(ranks)), ranks[0])


def _grouped(environment: Environment, first: int) -> Environment:
    """Each group of processes leaves a run directory of its own."""
    return environment if first == 0 else dataclasses.replace(environment, group=f"from-rank-{first}")


def family_of(library_version: str) -> str | None:
    r"""``openmpi`` or ``mpich``, from what an MPI library says it is.

    >>> family_of("Open MPI v5.0.11, package: ..."), family_of("MPICH Version:\t4.2")
    ('openmpi', 'mpich')
    """
    if library_version.startswith("Open MPI"):
        return "openmpi"
    return "mpich" if any(name in library_version for name in ("MPICH", "Intel", "MVAPICH")) else None


def part_of_cores(own: Sequence[int], there: Sequence[Sequence[int]]) -> int:
    """How many threads a process may have.

    >>> part_of_cores([0, 1, 2, 3], [[0, 1, 2, 3], [0, 1, 2, 3], [4]]), part_of_cores([4], [[0, 1], [4]])
    (2, 1)

    Args:
        own: The cores it may run on.
        there: Those of each process on its host, its own too.
    """
    sharing = [cores for cores in there if set(cores) & set(own)]
    return max(1, len({core for cores in sharing for core in cores}) // len(sharing))


def share_threads(collectives: Collectives, host: str) -> int | None:
    """Limit this process's compute threads to its part of the cores of its host; returns how many, None if unchanged.

    Launchers other than ours start workers that each take all cores. What a launcher bound a process to stays its own.

    Args:
        collectives: All workers call it.
        host: This host.
    """
    own = sorted(os.sched_getaffinity(0))
    told = [json.loads(each) for each in collectives.allgather(json.dumps([host, own]).encode())]
    count = part_of_cores(own, [cores for name, cores in told if name == host])
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() > count:
        torch.set_num_threads(count)
        return count
    return None
