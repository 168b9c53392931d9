"""The memory of a process and of what it has started (Linux). Standard library only."""

from __future__ import annotations

import time

from hvdlm.processes import children

__all__ = ["MIB", "MemoryWatch", "yield_memory_first"]

MIB = 1 << 20
_SECONDS_BETWEEN_LOOKS = 0.2
_OWN = ("RssAnon:", "RssShmem:")
_FAIR = ("Pss_Anon:", "Pss_Shmem:")


class MemoryWatch:
    """Looks now and then whether a process and its descendants use more memory than they may.

    What counts is what the kernel cannot drop: memory of their own and shared memory, not the pages of files that are
    mapped (libraries, data sets). What several of them share counts once.

    Args:
        limit_mib: How much they may use, in MiB; None for any amount.
    """

    def __init__(self, limit_mib: int | None) -> None:
        self.limit_mib = limit_mib
        self.found_mib: int | None = None
        """What was found when it was more than that; None before."""
        self._next = 0.0

    @property
    def seconds(self) -> float | None:
        """Seconds until the next look; None if there is none."""
        if self.limit_mib is None or self.found_mib is not None:
            return None
        return max(0.0, self._next - time.monotonic())

    def is_passed(self, pid: int) -> bool:
        """Look, if it is time to; whether the limit is passed, which is told once."""
        if self.limit_mib is None or self.seconds != 0:
            return False
        self._next = time.monotonic() + _SECONDS_BETWEEN_LOOKS
        pids = _with_descendants(pid)
        # The quick sum counts twice what processes share after a fork; the exact one walks page tables.
        if _sum_mib(pids, "status", _OWN) > self.limit_mib:
            found = _sum_mib(pids, "smaps_rollup", _FAIR)
            if found > self.limit_mib:
                self.found_mib = found
                return True
        return False


def yield_memory_first() -> None:
    """Have the kernel end this process rather than those that watch it, when the machine is out of memory."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
    except OSError:
        return


def _with_descendants(pid: int) -> list[int]:
    found, waiting = [], [pid]
    while waiting:
        each = waiting.pop()
        found.append(each)
        waiting += children(each)
    return found


def _sum_mib(pids: list[int], name: str, fields: tuple[str, ...]) -> int:
    kib = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/{name}") as file:
                kib += sum(int(line.split()[1]) for line in file if line.startswith(fields))
        except OSError:
            continue
    return kib // 1024
