"""Every exception hvdlm raises on purpose.

The tree, and what each is for:

    HvdlmError                  base: a message, and a HINT with the next command to run
    ├── ConfigError             an option, flag or argument that cannot be used (also a ValueError)
    ├── EngineError             Horovod is missing, built for something else, or sees another world
    ├── BuildError              building Horovod failed
    ├── LaunchError             the job could not be started
    ├── BelowMinimum            an elastic job had too few workers for too long; exit code 75
    ├── WorkerFailed            a worker raised, exited or was killed; carries its exit code
    ├── RecognitionError        nothing to distribute was found, or an object cannot be wrapped rightly
    ├── DataError               a dataset, sampler, key or weight that cannot be partitioned rightly
    ├── CheckpointError         a state to go on from that is missing, damaged, newer or of other objects
    └── MismatchError           ranks differ in what has to be equal (options, model, parameters)

    Reset                       no error: this generation of an elastic job ends here, and another one follows
    ├── PeerLost                a worker of the job was lost
    │   └── EngineLost          ... at a moment at which this process cannot start Horovod again
    └── WorkersChanged          all workers stop at one boundary, because some leave or come
"""

from __future__ import annotations

__all__ = [
    "BelowMinimum",
    "BuildError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EngineError",
    "EngineLost",
    "HvdlmError",
    "LaunchError",
    "MismatchError",
    "PeerLost",
    "RecognitionError",
    "Reset",
    "WorkerFailed",
    "WorkersChanged",
]


class HvdlmError(Exception):
    """Base of all errors that hvdlm raises on purpose.

    Args:
        message: What was given and what is allowed.
        hint: The next thing to do, usually a command. Printed after ``HINT:``.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = message
        self.hint = hint
        super().__init__(message if hint is None else f"{message}\nHINT: {hint}")


class ConfigError(HvdlmError, ValueError):
    """An option, flag or argument that cannot be used."""


class EngineError(HvdlmError, RuntimeError):
    """Horovod is missing, was built for something else, or sees another world than the launcher."""


class BuildError(HvdlmError, RuntimeError):
    """Building Horovod failed."""

    exit_code = 1


class LaunchError(HvdlmError, RuntimeError):
    """The job could not be started."""


class BelowMinimum(HvdlmError, RuntimeError):
    """An elastic job had fewer workers than its minimum for too long. It can be started again."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: a batch system may try again


class WorkerFailed(HvdlmError, RuntimeError):
    """A worker raised, exited with a code other than zero, or was killed.

    Args:
        message: Which rank failed and how.
        exit_code: The worker's exit code; 128 + signal number for a worker that a signal ended.
        hint: The next thing to do.
    """

    def __init__(self, message: str, exit_code: int, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


class RecognitionError(HvdlmError, TypeError):
    """Nothing to distribute was found, or an object cannot be wrapped rightly."""


class DataError(HvdlmError, ValueError):
    """A dataset, sampler, key or weight that cannot be partitioned rightly."""


class CheckpointError(HvdlmError, ValueError):
    """A state to go on from that is missing, damaged, of a newer version or of other objects."""


class MismatchError(HvdlmError, RuntimeError):
    """Ranks differ in what has to be equal: options, model structure, parameters."""


class Reset(BaseException):
    """This generation of an elastic job ends here: the train function is left, and called again.

    No ``Exception``, for it is none of the script's business: ``except Exception`` around a step must not swallow it.
    """


class PeerLost(Reset):
    """A worker of the job was lost; this one goes on from the newest commit."""


class EngineLost(PeerLost):
    """A worker was lost at a moment at which this process cannot start Horovod again: it has to be replaced."""


class WorkersChanged(Reset):
    """All workers stop at one boundary between steps, because some leave or come."""
