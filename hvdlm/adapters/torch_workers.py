"""What the processes of a DataLoader do first."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.context import ForkProcess

from hvdlm.processes import die_with_parent

__all__ = ["EndsWithRank"]


class EndsWithRank:
    """Sees to it that a loader worker ends with its rank, then does what the person's ``worker_init_fn`` asks for.

    PyTorch's workers look whether their parent is another one than when they started. One whose rank was killed before
    that waits for ever, and holds the rank's output open: mpirun, which waits for its end, never learns that a rank is
    lost, and the other ranks wait in their collective.

    Args:
        own: The person's function of the worker's number.
    """

    def __init__(self, own: Callable[[int], None] | None) -> None:
        self._own = own

    def __call__(self, worker: int) -> None:
        """Runs in the worker."""
        parent = multiprocessing.parent_process()
        if parent is not None and _is_forked():
            # The kernel tells of the end of the thread that has forked, so that has to be the one that lasts.
            if threading.current_thread().name == "MainThread":
                die_with_parent()
            if os.getppid() != parent.pid:
                os._exit(1)
        if self._own is not None:
            self._own(worker)


def _is_forked() -> bool:
    """Whether this process was forked off its parent; a fork server's has another parent."""
    process = multiprocessing.current_process()
    if isinstance(process, ForkProcess):
        return True
    return type(process) is multiprocessing.Process and multiprocessing.get_start_method() == "fork"
