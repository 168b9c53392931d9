"""Holds back what only one worker should write: output, progress bars, checkpoints, logs of experiments."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from hvdlm.autowrap.imports import AfterImport
from hvdlm.environment import quieten_libraries
from hvdlm.private import open_private
from hvdlm.secrets import masked

__all__ = ["hold_back", "meet_on_main"]


class _Held(io.TextIOWrapper):
    """A text file that shows no secret; no supervisor masks what goes there."""

    def __init__(self, file: IO[bytes], secrets: Sequence[str] = ()) -> None:
        super().__init__(file, encoding="utf-8", errors="replace", line_buffering=True)
        self._secrets = tuple(secrets)

    def write(self, text: str) -> int:
        super().write(masked(text, self._secrets))
        return len(text)


def hold_back(
    run_dir: str | None, rank: int, barrier: Callable[[], None], secrets: Sequence[str] = ()
) -> Callable[[], None]:
    """Have this process, of a rank other than 0, write nothing that rank 0 writes too. Returns the undo.

    What it prints goes to ``logs/rank-N.held.log`` of the run directory; errors and warnings still show. Files that
    rank 0 saves are there when this rank loads them.

    Args:
        run_dir: The run directory; None if it is not known.
        rank: This worker's.
        barrier: Waits for all workers.
        secrets: What the file does not show.
    """
    undo: list[Callable[[], None]] = []
    target = Path(run_dir) / "logs" / f"rank-{rank}.held.log" if run_dir else Path(os.devnull)
    try:
        held = _Held(open_private(target, "wb"), secrets)
    except OSError:
        held = _Held(open(os.devnull, "wb"))  # noqa: SIM115 - until the undo
    stdout, sys.stdout = sys.stdout, held
    speak = quieten_libraries()
    saved: set[str] = set()
    imports = AfterImport(
        {
            "torch": lambda module: undo.extend(_torch_files(module, saved, barrier)),
            "safetensors.torch": lambda module: undo.append(_nothing(module, "save_file")),
            "torch.utils.tensorboard": lambda module: undo.append(_silent_writer(module)),
            "tensorboardX": lambda module: undo.append(_silent_writer(module)),
            "keras": lambda module: undo.extend(
                [_nothing(module.Model, "save"), _nothing(module.Model, "save_weights")]
            ),
        }
    )
    imports.install()

    def restore() -> None:
        imports.remove()
        for back in reversed(undo):
            back()
        sys.stdout = stdout
        held.close()
        speak()

    return restore


def _set(owner: Any, name: str, value: Any) -> Callable[[], None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, original)


def _nothing(owner: Any, name: str) -> Callable[[], None]:
    @functools.wraps(getattr(owner, name))
    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    return _set(owner, name, nothing)


def _torch_files(torch: ModuleType, saved: set[str], barrier: Callable[[], None]) -> list[Callable[[], None]]:
    save = torch.save

    @functools.wraps(save)
    def on_main(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(file, (str, os.PathLike)):
            saved.add(os.path.abspath(os.fspath(file)))
            return
        save(value, file, *args, **kwargs)  # to memory

    return [_set(torch, "save", on_main), _meet_at_load(torch, saved, barrier)]


def meet_on_main(barrier: Callable[[], None]) -> Callable[[], None]:
    """On rank 0: have the others wait until a file that they are about to load is there. Returns the undo."""
    undo: list[Callable[[], None]] = []
    saved: set[str] = set()

    def watch(torch: ModuleType) -> None:
        save = torch.save

        @functools.wraps(save)
        def remembering(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            save(value, file, *args, **kwargs)
            if isinstance(file, (str, os.PathLike)):
                saved.add(os.path.abspath(os.fspath(file)))

        undo.extend([_set(torch, "save", remembering), _meet_at_load(torch, saved, barrier)])

    imports = AfterImport({"torch": watch})
    imports.install()

    def restore() -> None:
        imports.remove()
        for back in reversed(undo):
            back()

    return restore


def _meet_at_load(torch: ModuleType, saved: set[str], barrier: Callable[[], None]) -> Callable[[], None]:
    """Have all workers meet before one loads a file that this run saved."""
    load = torch.load

    @functools.wraps(load)
    def together(file: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, (str, os.PathLike)) and os.path.abspath(os.fspath(file)) in saved:
            barrier()
        return load(file, *args, **kwargs)

    return _set(torch, "load", together)


def _silent_writer(module: ModuleType) -> Callable[[], None]:
    class SilentWriter:
        """Takes what a SummaryWriter takes, and writes nothing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.log_dir = kwargs.get("log_dir", args[0] if args else None)

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args, **kwargs: None

        def __enter__(self) -> SilentWriter:
            return self

        def __exit__(self, *_: object) -> None:
            return None

    return _set(module, "SummaryWriter", SilentWriter)
