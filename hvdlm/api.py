"""What a training script calls. Each function works the same in one process and in many."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from hvdlm.adapters import choose_adapter, framework_of
from hvdlm.autowrap.scope import Scope
from hvdlm.elastic import elastic_of, refuse_wrap
from hvdlm.environment import read_environment
from hvdlm.joining import join
from hvdlm.processes import at_end_of_script, report_uncaught_exceptions
from hvdlm.recognise import recognises, replace_all
from hvdlm.saving import save_on_main
from hvdlm.session import Session
from hvdlm.state.extras import check_extra
from hvdlm.world import World

P = ParamSpec("P")
R = TypeVar("R")

__all__ = [
    "barrier",
    "distribute",
    "epochs",
    "init",
    "is_main",
    "local_rank",
    "local_size",
    "log",
    "mean",
    "no_sync",
    "rank",
    "register",
    "save",
    "size",
    "wrap",
]

_session: Session | None = None
_extras: dict[str, Any] = {}
_closing_at_exit = False


def _current() -> Session:
    """The run of this process, which begins now if it has not."""
    if _session is None:
        init()
    assert _session is not None
    return _session


def init(framework: str | None = None, *, comm: Any = None, **options: object) -> World:
    """Start hvdlm in this process. The other functions call it where it was not called.

    Args:
        framework: ``"torch"`` or ``"keras"``; by default the one the script has imported.
        comm: The processes that train, where they are not all that the launcher started: a communicator of mpi4py,
            or the list of their ranks. Given once; the others do not call hvdlm, but have to start MPI.
        options: As for :func:`distribute`.

    Returns:
        Where this process stands among the workers.

    Raises:
        ConfigError: An option is unknown or not allowed.
        EngineError: The script was launched on several workers and Horovod cannot be used.
    """
    global _session
    if _session is None:
        report_uncaught_exceptions()
        environment = join(read_environment(), comm)
        make = functools.partial(Session, choose_adapter(framework), code=options, extras=_extras)
        elastic = elastic_of(environment)
        _session = make(environment) if elastic is None else elastic.session(make, environment)
    else:
        _session.configure(options)
    return _session.world


def wrap(*objects: Any, **options: object) -> Any:
    """Make models, optimizers and loaders distributed.

    Models and optimizers are returned as they are: from now on ``backward()`` leaves the gradients of the global batch.
    Loaders (and lists, tuples or dicts with loaders in them) come back as stand-ins that yield this worker's share.

    Args:
        objects: Modules, optimizers, DataLoaders, datasets, schedulers, in any order.
        options: As for :func:`distribute`.

    Returns:
        The objects in the order given; a single object for one argument.

    Raises:
        RecognitionError: Neither a model nor an optimizer is among them.
        MismatchError: Ranks hold different models or options.

    Example:
        >>> model, optimizer, loader = hvdlm.wrap(model, optimizer, loader)  # doctest: +SKIP
    """
    if Scope.active is not None:
        Scope.active.stand_down()
    refuse_wrap(read_environment())
    init(framework_of(objects), **options)
    args, _ = replace_all(objects, {}, _current().adapter.recognise, _current().attach)
    _current().started()
    _finish_when_the_script_ends()
    return args[0] if len(args) == 1 else args


def distribute(function: Callable[P, R] | None = None, /, **options: object) -> Any:
    """Decorate a train function so that what it is called with is made distributed.

    Modules, optimizers, DataLoaders and datasets are recognised among its arguments by type: in any order, positional
    or by keyword, inside lists and dicts. Started as one process, the function trains as one process.

    Args:
        function: The train function, for use without parentheses.
        options: Any of :class:`hvdlm.Options`.

    Raises:
        ConfigError: An option is unknown or not allowed.
        RecognitionError: Neither a model nor an optimizer is among the arguments of a call.

    Example:
        >>> @hvdlm.distribute(compression="fp16")  # doctest: +SKIP
        ... def train(model, optimizer, loader): ...
    """

    def decorate(train: Callable[P, R]) -> Callable[P, R]:
        def once(*args: P.args, **kwargs: P.kwargs) -> R:
            global _session
            if Scope.active is not None:
                Scope.active.stand_down()
            init(framework_of([*args, *kwargs.values()]), **options)
            session = _current()
            try:
                if recognises(args, kwargs, session.adapter.recognise):
                    new_args, new_kwargs = replace_all(args, kwargs, session.adapter.recognise, session.attach)
                    session.started()
                    result = train(*new_args, **new_kwargs)
                else:
                    with Scope(lambda _: session) as scope:  # it makes its own model inside
                        result = train(*args, **kwargs)
                        scope.finished("@hvdlm.distribute")
                session.finish()
            except BaseException:
                session.abandon(wait=False)
                raise
            finally:
                session.abandon()
                if _session is session:
                    _session = None
            return result

        @functools.wraps(train)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            elastic = elastic_of(read_environment())
            return once(*args, **kwargs) if elastic is None else elastic.run(lambda: once(*args, **kwargs))

        return run

    return decorate if function is None else decorate(function)


def epochs(*bounds: int) -> Iterator[int]:
    """The numbers of the epochs to train, like ``range``: those that are left where a run goes on.

    Args:
        bounds: As for ``range``: the number of epochs, or first and end.

    Yields:
        The number of each epoch. Before the first, the state of the training is restored if there is one.

    Example:
        >>> for epoch in hvdlm.epochs(10):  # doctest: +SKIP
        ...     train_one_epoch(model, loader)
    """
    numbers = range(*bounds)
    steward = _current().steward
    yield from numbers if steward is None else steward.epochs(numbers)


def register(name: str, value: Any) -> None:
    """Keep an object's state with that of the training: a best score, a history, an early stopper.

    Args:
        name: Tells it from others; the same in each run of the script.
        value: A dict, a list, or an object with ``state_dict`` and ``load_state_dict``. Where a run goes on, it is
            put back in place when the committed position is reached.

    Raises:
        RecognitionError: Its state could not be put back.
    """
    check_extra(name, value)
    _extras[name] = value
    if _session is not None and _session.steward is not None:
        _session.steward.extras.registered(name, value)


def rank() -> int:
    """Index of this worker, 0 <= rank < size."""
    return _current().world.rank


def size() -> int:
    """Number of workers."""
    return _current().world.size


def local_rank() -> int:
    """Index of this worker on its host."""
    return _current().world.local_rank


def local_size() -> int:
    """Number of workers on this host."""
    return _current().world.local_size


def is_main() -> bool:
    """Whether this is the worker that speaks for the job (rank 0)."""
    return _current().world.is_main


def log(**metrics: Any) -> None:
    """Record metrics: on rank 0, in ``metrics.jsonl`` of the run directory and on the screen; elsewhere nothing.

    Args:
        metrics: Numbers or one-element tensors by name.
    """
    _current().log(metrics)


def mean(value: Any, weight: float | None = None) -> Any:
    """The mean of a number or one-element tensor over workers; every rank calls it and gets the same.

    Args:
        value: This worker's value. Ignored (it may be NaN) where the weight is 0.
        weight: What it counts; by default the samples this worker read in the last evaluation with
            ``eval="sharded"``, else 1.

    Returns:
        The weighted mean, of the type of ``value``.
    """
    return _current().mean(value, weight)


def barrier() -> None:
    """Wait until every worker is here."""
    _current().adapter.collectives.allgather(b"")


def save(value: Any, path: str | os.PathLike[str]) -> None:
    """Write an object on rank 0, atomically; the other workers wait until it is there.

    Args:
        value: What the framework's own save takes: a ``state_dict`` for torch, a model for Keras.
        path: The file. A reader sees the old one or the new one, never half of one.
    """
    session = _current()
    if session.steward is not None and session.steward.skipping:
        return  # what it wrote when it was here for the first time is better
    session.adapter.synchronise()
    save_on_main(session.adapter, session.world, value, os.fspath(path))


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Let gradients of the backwards inside accumulate on each worker; the next one outside sends the sum, once."""
    with _current().adapter.no_sync():
        yield


def _finish_when_the_script_ends() -> None:
    """Close the session of a script that used :func:`wrap` at exit."""
    global _closing_at_exit
    if not _closing_at_exit:
        _closing_at_exit = True
        at_end_of_script(_finish_at_exit)


def _finish_at_exit(failing: bool) -> None:
    if _session is None:
        return
    if failing:  # then nothing may wait for the other workers
        _session.abandon()
    else:
        _session.finish()
