"""A process of its own for each call of a train function on a Dask worker, and the process itself.

A train function needs its main thread, its own environment and its own Horovod, and may crash; a Dask worker has many
tasks in threads. What travels between the two goes through pipes and is pickled, by us for us.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from hvdlm import wire
from hvdlm.processes import adopt_orphans, children, die_with_parent
from hvdlm.secrets import Masker, masked, secret_values

__all__ = ["Outcome", "main", "run_child"]

_TAIL_BYTES = 8192


@dataclass(frozen=True)
class Outcome:
    """How a call ended."""

    value: Any = None
    failure: str = ""
    """The traceback, or what is known of a process that died; empty if the call returned."""
    code: int = 0
    stopped: bool = False
    """Whether it was ended because we were asked to."""


def run_child(
    payload: bytes,
    environment: Mapping[str, str],
    show: Callable[[str], None],
    asked: Callable[[], bool],
    secrets: Sequence[str] = (),
) -> Outcome:
    """Call a pickled function in a process of its own, and wait for its end.

    Args:
        payload: A pickled :class:`hvdlm.clusters.functions.Work`.
        environment: The whole environment of the process.
        show: Gets each line it prints.
        asked: Asked twice a second; the process is ended when it says yes.
        secrets: What is not to be shown, besides the secrets of the environment.
    """
    read_end, write_end = os.pipe()
    root = str(Path(__file__).resolve().parents[2])
    start = f"import sys; sys.path.append({root!r}); from hvdlm.clusters.child import main; main({write_end})"
    process = subprocess.Popen(
        [sys.executable, "-c", start],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        pass_fds=[write_end],
        start_new_session=True,
    )
    os.close(write_end)
    assert process.stdin is not None and process.stdout is not None
    tail: list[bytes] = []
    answer: list[bytes] = []
    masker = Masker((*secrets, *secret_values(environment)))
    threads = [
        threading.Thread(target=_show_lines, args=(process.stdout, show, tail, masker), daemon=True),
        threading.Thread(target=_read_all, args=(read_end, answer), daemon=True),
    ]
    for thread in threads:
        thread.start()
    stopped = False
    try:
        with contextlib.suppress(BrokenPipeError):  # it died at once: its end says why
            process.stdin.write(payload)
            process.stdin.close()
        while True:
            try:
                process.wait(0.5)
                break
            except subprocess.TimeoutExpired:
                if asked() and not stopped:
                    stopped = True
                    _end(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for thread in threads:
            thread.join(5)
        process.stdout.close()
    ended = _outcome(process.returncode, b"".join(answer), b"".join(tail), stopped)
    return replace(ended, failure=masked(ended.failure, (*secrets, *secret_values(environment))))


def _end(process: subprocess.Popen[bytes]) -> None:
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wire.SECONDS_TO_TERMINATE)
            return


def _show_lines(pipe: BinaryIO, show: Callable[[str], None], tail: list[bytes], masker: Masker) -> None:
    for read in pipe:
        line = masker.feed(read) + masker.flush()
        tail.append(line)
        while sum(map(len, tail)) > _TAIL_BYTES and len(tail) > 1:
            tail.pop(0)
        show(line.decode(errors="replace").rstrip("\n"))


def _read_all(fd: int, answer: list[bytes]) -> None:
    with open(fd, "rb") as file:
        answer.append(file.read())


def _outcome(code: int, answer: bytes, tail: bytes, stopped: bool) -> Outcome:
    if answer:
        ended: Outcome = pickle.loads(answer)
        # The function returned, but the process did not end well: hvdlm closes a run at its exit.
        if not (code and not ended.failure):
            return ended
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    said = tail.decode(errors="replace").strip()
    code = code if code >= 0 else 128 - code
    return Outcome(failure=f"{said}\nthe worker's process ended with {how}".lstrip(), code=code or 1, stopped=stopped)


def main(answer: int) -> None:
    """Take a pickled ``Work`` from standard input, call it, and answer with an :class:`Outcome`."""
    die_with_parent()
    adopt_orphans()
    payload = sys.stdin.buffer.read()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    import cloudpickle  # Dask and Horovod bring it

    from hvdlm.clusters.functions import call

    try:
        work = pickle.loads(payload)
        outcome = Outcome(value=call(work))
        message = cloudpickle.dumps(outcome)
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if code in (0, None):
            message = pickle.dumps(Outcome())
        else:
            sys.excepthook(*sys.exc_info())
            message = pickle.dumps(Outcome(failure=traceback.format_exc(), code=code if isinstance(code, int) else 1))
            _answer(answer, message)
            sys.stdout.flush()
            # Nothing may wait for the other workers now: not Horovod's shutdown, nor a thread of the script.
            for pid in children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os._exit(1)
    _answer(answer, message)


def _answer(fd: int, message: bytes) -> None:
    with open(fd, "wb") as file:
        file.write(message)
